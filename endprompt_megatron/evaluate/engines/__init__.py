"""What answers an evaluation's requests: transformers, vLLM, or the training model in place."""
