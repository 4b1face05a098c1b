"""Kinds of tasks, a small file each: how one reply is scored, and how scores add up."""
