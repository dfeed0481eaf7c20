"""What EndPrompt is: position ids, prompts, RoPE scaling, and the distances they supervise.  No torch, but for RoPE."""
