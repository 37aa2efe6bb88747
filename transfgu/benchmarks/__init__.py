"""Measure each stage and compare it with a lower bound."""
