"""Training engine: one loop, DeepSpeed set-up, checkpoints, run directory."""
