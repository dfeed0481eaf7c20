"""Studies: a grid of recipes with one token budget and one evaluation, run cell by cell and compared."""
