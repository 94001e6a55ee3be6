"""Fine-tuning toward the tilted target: offline GDRO; Flow-GRPO, DiffusionNFT; a critic."""
