"""Ray as the stages share it: connecting, capacity, work in parts, failures, progress."""
