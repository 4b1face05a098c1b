"""Event log, which is the truth of a run, and the views made from it."""
