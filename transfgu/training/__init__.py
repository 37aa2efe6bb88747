"""The trainer: order, step, schedule, worker, checkpoints and trackers."""
