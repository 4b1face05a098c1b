"""Preferences over spoken replies: sampled candidates, their scores, reference probabilities."""
