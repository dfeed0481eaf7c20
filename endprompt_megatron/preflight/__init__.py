"""Whether a recipe, its files and the machines are ready for a run: one table, one verdict, on all ranks."""
