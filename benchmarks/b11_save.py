"""B11: how long a save keeps training waiting, and how long a restore takes, against others.

    python -m benchmarks.b11_save [--megabytes 400] [--json]

One process holds the AdamW state of a model (fp32 master weights and two moments) under our engine.
What training waits for is a copy of that state; file, fsync and hash come behind it, in a thread.

Peers, with the same tensors on the same disk, each with an fsync of what it wrote:

- copy: a `clone` of every tensor, the least that a save needs which goes on beside training;
- torch.save, safetensors' save_file, torch.distributed.checkpoint: blocking saves.

Restoring is held against the peers' loading. Ours checks every byte first, theirs do not.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.report import Row, compare, parser, show
from omni_train.engine import shards
from omni_train.engine.checkpoint import CheckpointWriter, restore_latest
from omni_train.engine.deepspeed import DeepSpeedConfig, Engine, Precision, build_engine
from omni_train.engine.groups import ParamGroup
from omni_train.engine.optim import OptimConfig
from omni_train.engine.run import Run, RunConfig, start_run

WIDTH = 1024
BYTES_PER_LAYER = 12 * WIDTH * WIDTH
OVER_COPY = 1.3
BELOW_TORCH_SAVE = 3.0

State = dict[str, Tensor]


def make_engine(megabytes: int) -> Engine:
    """Return an engine whose optimiser state takes about so much."""
    count = max(1, megabytes * 1_000_000 // BYTES_PER_LAYER)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)))
    params = list(model.named_parameters())
    group = ParamGroup(name="all", params=params, trainable=True, lr=1e-3, weight_decay=0.0)
    config = DeepSpeedConfig(zero_stage=3, precision=Precision.fp32)
    return build_engine(model, [group], OptimConfig(), config)


def state_of(engine: Engine) -> State:
    """Return what is saved, without a copy: master weights and both moments, by name."""
    found: State = {}
    for name, param in engine.groups[0].params:
        piece = shards.piece_of(param, rank=0, world_size=1)
        found[f"{name}.master"] = shards.master(param, piece)
        found |= {f"{name}.{key}": shards.moment(param, piece, key) for key in shards.MOMENTS}
    return found


def peers(state: State) -> dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]]:
    """Return how each peer saves and loads."""
    return {
        "torch.save": (
            lambda path: torch.save(state, path),
            lambda path: torch.load(path, weights_only=True),
        ),
        "safetensors": (
            lambda path: save_file(state, str(path)),
            lambda path: load_file(str(path)),
        ),
        "DCP": (
            lambda path: dcp.save({"state": state}, checkpoint_id=str(path)),
            lambda path: dcp.load({"state": state}, checkpoint_id=str(path)),
        ),
    }


def durable(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, or a directory of files, and wait until the disk has them."""
    write(path)
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def rows_of(engine: Engine, run: Run, folder: Path, pairs: int) -> list[Row]:
    """Return the table."""
    state = state_of(engine)
    rows: list[Row] = []
    with CheckpointWriter(engine, run, keep=2) as writer:

        def save() -> None:
            writer.save(loader_state={}, metrics={})

        def clone() -> int:
            return len([tensor.clone() for tensor in state.values()])

        def settle() -> None:
            writer.finish()
            os.sync()
            engine.step += 1

        name, goal = "training waits, against a copy", 1 / OVER_COPY
        rows.append(compare(name, save, clone, goal=goal, pairs=pairs, before=settle))
        for peer, (write, _) in peers(state).items():

            def blocking(peer: str = peer, write: Callable[[Path], object] = write) -> None:
                durable(folder / peer, write)

            name, goal = f"training waits, {peer}", BELOW_TORCH_SAVE * (peer == "torch.save")
            rows.append(compare(name, save, blocking, goal=goal, pairs=pairs, before=settle))
    for peer, (_, load) in peers(state).items():

        def loading(peer: str = peer, load: Callable[[Path], object] = load) -> None:
            load(folder / peer)

        name = f"restore and verify, {peer}"
        rows.append(
            compare(name, lambda: restore_latest(engine, run), loading, goal=0.0, pairs=pairs)
        )
    return rows


def main() -> int:
    """Run the table."""
    options = parser("Saving and restoring the optimiser's state.")
    options.add_argument("--megabytes", type=int, default=400, help="of state")
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = RunConfig(dir=str(folder / "run"))
        with start_run(config, stage="benchmark", settings=config) as run:
            engine = make_engine(args.megabytes)
            size = sum(tensor.nbytes for tensor in state_of(engine).values())
            rows = rows_of(engine, run, folder, args.pairs)
    seconds = rows[0].ours / 1e3 / (size / 1e9)
    notes = [f"{size / 1e6:.0f} MB of state; training waits {seconds:.2f} s per GB"]
    return show(rows, ("torch", "safetensors", "deepspeed"), notes, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
