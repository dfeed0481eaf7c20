"""What a recipe may not ask for, refused before a GPU is touched."""
