"""From an indexed dataset to a rank's micro-batches."""
