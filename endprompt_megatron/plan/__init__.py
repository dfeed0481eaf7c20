"""What a recipe costs before it runs: memory a GPU, time, GPU-hours; layouts that fit.  No torch."""
