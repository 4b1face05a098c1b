"""Checkpoints to complete Hugging Face directories of the whole model."""
