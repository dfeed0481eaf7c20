"""Studies: a grid of recipes with one token budget and one evaluation, run trial by trial and compared."""
