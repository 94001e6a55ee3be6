"""Fine-tuning toward the tilted target: to come (offline GDRO, adversarial reward)."""
