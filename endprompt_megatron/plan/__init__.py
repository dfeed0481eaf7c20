"""What a recipe will cost: memory per GPU, time, GPU-hours; layouts that fit.  No torch."""
