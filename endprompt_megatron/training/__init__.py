"""What stands around the loop: the optimizer, metrics.jsonl, validation."""
