"""One script per stage of the recipe, each read from top to bottom."""
