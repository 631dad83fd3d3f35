"""Training without a Trainer: two levels, chains of levels, one level, checkpoints."""
