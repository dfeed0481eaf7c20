"""What a recipe may not ask for, said before a GPU is touched."""
