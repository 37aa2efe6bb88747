"""Measurements of each stage beside its bound."""
