"""The recipe: its keys as typed dataclasses (recipe.py), and what may not be combined (constraints/)."""
