"""Provide what stages share about Ray: connection, capacity, work in parts, failures, progress."""
