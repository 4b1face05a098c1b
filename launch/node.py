"""Runs this machine's share of a job of several machines, and ends with the code of the run.

    python -m launch.node --nodes 2 --node 0 --ranks 8 --endpoint host0:29500 --job name \\
        --run-dir SHARED_DIRECTORY recipes.text_lm OVERRIDES...

For pods, and for machines without a scheduler. Under SLURM the job script starts torchrun itself.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from launch.local import Place, run_module


def main() -> int:
    """Run until all machines have ended; 75 where the job wants to be started again."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("nodes", "node", "ranks"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("endpoint", "job", "run-dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--address", default="", help="of this machine; default its host name")
    parser.add_argument("--interface", default="", help="network device of the ranks")
    parser.add_argument("--stop-s", type=int, help="seconds to save in when asked to stop")
    parser.add_argument("module")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    if args.interface:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = args.interface
    place = Place(args.nodes, args.node, args.endpoint, args.address, args.job)
    return run_module(
        args.module,
        args.overrides,
        ranks=args.ranks,
        run_dir=Path(args.run_dir),
        stop_s=args.stop_s,
        place=place,
    )


if __name__ == "__main__":
    raise SystemExit(main())
