"""Losses: model and batch in, StepOutput out."""
