"""The Thinker: presets, building from checkpoints, parameter groups, the forward passes."""
