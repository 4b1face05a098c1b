"""Offline work: sources to shards and index, and the demo corpus."""
