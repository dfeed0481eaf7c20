"""LLaMA on Megatron-Core: its shape, its layers, its loss."""
