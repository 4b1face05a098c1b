"""`python -m launch`: the same command line as `omni-train`."""

from __future__ import annotations

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
