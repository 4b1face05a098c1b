"""Scores and the decoding that produces what is scored."""
