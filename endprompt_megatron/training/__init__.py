"""What the training loop calls: a step, the optimizer, metrics.jsonl, validation."""
