"""How cost grows: six measurements over growing sizes, with the exponents of what is measured.

    python -m benchmarks.growth --out growth.json [--rows 7]    measures
    python -m benchmarks.growth_picture growth.json docs/growth.png

    planning     seconds to open a set and to plan a window, 10^4 .. 10^7 samples, 1,000 a shard
    resume       seconds from nothing to the first global step, at window 1 .. 10^4
    checkpoint   seconds that training waits, by bytes of optimiser state
    step         seconds of a step of the tiny Thinker with 512 .. 32,768 tokens: in documents of
                 512, and in one document, whose attention is a square
    ranks        lockstep cost over its lower bound on 8 .. 256 simulated ranks, and milliseconds of
                 planning a global step; seconds of a step of 4 packs on 1 and 2 real ranks

Seconds are the processor's, of the process (of its main thread while a checkpoint is written), so
that other work on the machine changes them less. Each point is the median of three; the exponent is
the slope of the least-squares line through the logarithms.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import b05_balance, b08_resume, b11_save, b12_trainer
from benchmarks.b04_packing import document
from benchmarks.shards import write_copies
from omni_train.data.collate import collate
from omni_train.data.plan import assign, lockstep_cost
from omni_train.data.tokenizer import train_tokenizer
from omni_train.models.build import build_thinker
from omni_train.models.config import ModelConfig

TIMES = 3
PER_SHARD = 1000
WINDOWS = (1, 10, 100, 1_000, 10_000)
MEGABYTES = (13, 50, 200, 400)
DOCUMENT = 512
PACKED_TOKENS = (512, 2048, 8192, 32_768)
# One document of 32,768 would be two minutes a step here, for a line that is straight before it.
WHOLE_TOKENS = (512, 1024, 2048, 4096, 8192)
RANKS = (8, 16, 32, 64, 128, 256)
REAL_RANKS, REAL_PACKS, REAL_STEPS = (1, 2), 4, 3


@dataclass(frozen=True, slots=True)
class Series:
    """One line of the picture.

    Args:
        panel: of the picture, with what x is.
        name: what y is, with its unit.
        x, y: the points.
        exponent: of y as a power of x.
    """

    panel: str
    name: str
    x: list[float]
    y: list[float]
    exponent: float


def series(panel: str, name: str, x: Sequence[float], y: Sequence[float]) -> Series:
    """Return the points with their exponent, and tell them on stderr."""
    found = Series(panel, name, list(map(float, x)), list(map(float, y)), exponent(x, y))
    print(f"{panel}: {name}: {found.y}, exponent {found.exponent:.2f}", file=sys.stderr, flush=True)
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def median_s(work: Callable[[], object], times: int = TIMES) -> float:
    """Return the median processor seconds of several calls."""
    taken = []
    for _ in range(times):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def planning(folder: Path, most: int) -> list[Series]:
    """Opening a set and planning a window of it, up to 10^most samples."""
    sizes = [10**power for power in range(4, most + 1)]
    opened, planned = [], []
    for size in sizes:
        root = write_copies(
            folder / str(size),
            b08_resume.TOKENIZER,
            num_shards=size // PER_SHARD,
            samples_per_shard=PER_SHARD,
            own_keys=False,
        )
        opened.append(median_s(lambda root=root: b08_resume.make_loader(root)))
        loader = b08_resume.make_loader(root)
        windows = iter(range(1, 1 + TIMES))
        planned.append(median_s(lambda loader=loader, w=windows: loader.plan(next(w))))
    panel = "samples in the index"
    return [
        series(panel, "s to open the set", sizes, opened),
        series(panel, "s to plan a window", sizes, planned),
    ]


def resume(folder: Path) -> list[Series]:
    """The first global step after a resume at window w of the endless stream."""
    root = write_copies(folder / "resume", b08_resume.TOKENIZER, own_keys=False)
    state = b08_resume.make_loader(root).state()
    taken = [
        median_s(lambda w=w: b08_resume.first_step(root, {**state, "window": w, "step": 0}))
        for w in WINDOWS
    ]
    return [series("window to resume at", "s to the first step", WINDOWS, taken)]


def checkpoint(folder: Path) -> list[Series]:
    """What training waits for when it saves, by the size of the state."""
    sizes, taken = [], []
    for megabytes in MEGABYTES:
        config = b11_save.RunConfig(dir=str(folder / f"save-{megabytes}"))
        with b11_save.start_run(config, stage="benchmark", settings=config) as run:
            engine = b11_save.make_engine(megabytes)
            state = b11_save.state_of(engine)
            sizes.append(sum(t.nbytes for t in state.values()) / 1e6)
            with b11_save.CheckpointWriter(engine, run, keep=2) as writer:
                found = []
                for _ in range(TIMES + 1):
                    start = time.thread_time()
                    writer.save(loader_state={}, metrics={})
                    found.append(time.thread_time() - start)
                    writer.finish()
                    engine.step += 1
                # The first save makes the buffers that the others copy into.
                taken.append(statistics.median(found[1:]))
    return [series("MB of optimiser state", "s that training waits", sizes, taken)]


def thinker() -> Any:
    """Return the tiny Thinker, ready to train."""
    tokenizer = train_tokenizer(["the words do not matter here"], vocab_size=2048)
    config = ModelConfig(tokenizer="in memory")
    return build_thinker(config, tokenizer, seed=0, dtype=torch.float32).train()


def step() -> list[Series]:
    """Forward and backward pass by tokens of the pack, in short documents and in one."""
    model = thinker()
    found = []
    for name, sizes, length in (
        (f"s, documents of {DOCUMENT}", PACKED_TOKENS, DOCUMENT),
        ("s, one document", WHOLE_TOKENS, None),
    ):
        taken = []
        for tokens in sizes:
            lengths = [length] * (tokens // length) if length else [tokens]
            pack = collate([document(n, i, model.spec) for i, n in enumerate(lengths)], model.spec)

            def run(pack: Any = pack) -> None:
                model(pack).sum().backward()

            run()
            taken.append(median_s(run))
        found.append(series("tokens of a step", name, sizes, taken))
    return found


def simulated_ranks() -> list[Series]:
    """Lockstep cost over its bound, and planning, on the mixture `web` with packs of 8,192."""
    load = b05_balance.load_of("web", b05_balance.BUDGETS[0], 0)
    steps = b05_balance.plan_load(load, b05_balance.BUDGETS[0])
    costs = b05_balance.cost_table(load.costs)
    over, taken = [], []
    for ranks in RANKS:
        ours = sum(lockstep_cost(assign(packs, ranks)) for packs in steps)
        over.append(ours / sum(b05_balance.lower_bound(packs, costs, ranks) for packs in steps))
        taken.append(b05_balance.planning_ms(load, b05_balance.BUDGETS[0], ranks))
    return [
        series("ranks, simulated", "lockstep cost over its bound", RANKS, over),
        series("ranks, simulated", "ms to plan a step", RANKS, taken),
    ]


def real_ranks() -> list[Series]:
    """Steps of the same global batch on one and on two processes, under ZeRO-3."""
    taken = []
    for ranks in REAL_RANKS:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={ranks}", "-m", "benchmarks.growth", "--worker"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        taken.append(json.loads(done.stdout.splitlines()[-1]))
    return [series("ranks, real", f"s of a rank, {REAL_PACKS} rows in all", REAL_RANKS, taken)]


def worker() -> None:
    """One rank of `real_ranks`; rank 0 prints the seconds of a step."""
    from omni_train.engine.distributed import get_world, init_distributed

    torch.set_num_threads(1)
    init_distributed()
    world = get_world()
    engine = b12_trainer.engine_of(b12_trainer.Inside())
    rows = b12_trainer.rows_of(0)[world.rank : REAL_PACKS : world.size]

    def run() -> None:
        model: nn.Module = engine.model
        for number, ids in enumerate(rows, start=1):
            engine.model.set_gradient_accumulation_boundary(number == len(rows))
            engine.model.backward(model(input_ids=ids[None])["loss"])
        engine.model.step()

    run()
    taken = median_s(run, times=REAL_STEPS)
    if world.rank == 0:
        print(json.dumps(taken), flush=True)


PARTS: dict[str, Callable[[Path, int], list[Series]]] = {
    "planning": planning,
    "resume": lambda folder, _: resume(folder),
    "checkpoint": lambda folder, _: checkpoint(folder),
    "step": lambda *_: step(),
    "simulated": lambda *_: simulated_ranks(),
    "real": lambda *_: real_ranks(),
}


def main() -> int:
    """Measure some parts or all and add them to the JSON."""
    parser = argparse.ArgumentParser(description="How cost grows.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="JSON; parts that are not measured stay in it")
    parser.add_argument("--rows", type=int, default=7, help="power of ten of the largest index")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return 0
    if not args.out or set(args.parts) - set(PARTS):
        parser.error(f"give --out, and parts of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            measured = PARTS[part](Path(folder), args.rows)
        assert all(math.isfinite(one.exponent) for one in measured), measured
        found[part] = {"series": [asdict(one) for one in measured], "load": os.getloadavg()[0]}
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="ascii")
    return 0


if __name__ == "__main__":
    sys.exit(main())
