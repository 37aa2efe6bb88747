"""Search for better values of the recipe's fields."""
