"""Train models on Ray: order, step, schedule, worker, checkpoints and trackers."""
