"""Checks and costs known before a run starts."""
