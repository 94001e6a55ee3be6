"""Fine-tuning toward the tilted target: offline GDRO, and policy gradients with a critic."""
