"""Ratios against peers, one script each: `python -m benchmarks.NAME [--json]`."""

import os

# Before torch is imported: two threads beside another busy process cost far more than they give.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
