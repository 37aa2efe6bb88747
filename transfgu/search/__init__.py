"""Hyper-parameter search over the recipe's fields."""
