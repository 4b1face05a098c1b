"""Trains a toy under the real engine; started by test_resume.py on one or two ranks.

    python engine_worker.py OUT SCENARIO...

Rank 0 writes OUT/<scenario>.json. The toy has two trained groups with different learning rates and
a frozen part between them, odd sizes everywhere, so that every ZeRO partition ends in padding.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omni_train.engine.checkpoint_reader import CheckpointReader
from omni_train.engine.deepspeed import DeepSpeedConfig, Engine, Precision, build_engine
from omni_train.engine.distributed import barrier, get_world, init_distributed
from omni_train.engine.exit_codes import RunError, leave
from omni_train.engine.fit import fit
from omni_train.engine.fit_config import FitConfig
from omni_train.engine.groups import ParamGroup
from omni_train.engine.hashing import group_hashes
from omni_train.engine.optim import OptimConfig
from omni_train.engine.run import RunConfig, start_run
from omni_train.engine.types import StepItem
from omni_train.objectives.types import StepOutput
from omni_train.tracking.events import read_jsonl, read_steps

GLOBAL_BATCH = 8
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, warmup_steps=2, min_lr_ratio=0.2)


class StopHereError(Exception):
    """Ends a run in the middle."""


class Toy(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.fixed = nn.Linear(7, 7)
        self.head = nn.Linear(7, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x.to(self.body.weight.dtype)))
        return self.head(torch.tanh(self.fixed(self.dropout(hidden)))).float()


@dataclass
class ToyBatch:
    """x: float32 [N, 5], y: float32 [N, 3]."""

    keys: list[str]
    x: Tensor
    y: Tensor
    num_target_tokens: int
    bad: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.x.shape[0]

    def to(self, device: torch.device) -> ToyBatch:
        return self


class ToyLoader:
    """Samples 8s .. 8s + 7 make global step s, dealt to ranks and micro-steps."""

    def __init__(
        self,
        micro_steps: int,
        *,
        poison: tuple[int, int] | None,
        empty: int,
        stop: tuple[int, int] | None = None,
    ) -> None:
        self.position, self.micro_steps = 0, micro_steps
        self.poison, self.empty, self.stop = poison, empty, stop

    def steps(self) -> Any:
        world = get_world()
        while True:
            step = self.position
            self.position += 1
            if self.stop == (step, world.rank):
                os.kill(os.getpid(), signal.SIGUSR1)
            size = GLOBAL_BATCH // world.size // self.micro_steps
            first = step * GLOBAL_BATCH + world.rank * size * self.micro_steps
            batches = [self._batch(step, first + m * size, size) for m in range(self.micro_steps)]
            yield StepItem(micro_batches=batches, epoch=0, window=0, step=step)

    def _batch(self, step: int, first: int, size: int) -> ToyBatch:
        ids = range(first, first + size)
        x = torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in ids])
        y = torch.stack([x_i[:3].square() for x_i in x])
        if self.poison == (step, get_world().rank):
            x[0, 0] = float("nan")
        tokens = 0 if step == self.empty else size
        bad = [("toy", "shard-0", f"s{first}", "truncated")] if step == 1 else []
        return ToyBatch([f"s{i}" for i in ids], x, y, tokens, bad)

    def state(self) -> dict[str, int]:
        return {"epoch": 0, "window": 0, "step": self.position}

    def load_state(self, state: dict[str, int]) -> None:
        self.position = state["step"]

    def count_bad(self, bad: Sequence[tuple[str, str, str, str]], *, num_samples: int) -> None:
        assert all(source == "toy" for source, *_ in bad), bad


def toy_step(model: nn.Module, batch: ToyBatch) -> StepOutput:
    weight = float(batch.num_target_tokens > 0)
    rows = (model(batch.x) - batch.y).square().sum(dim=1) * weight
    errors = (rows.detach().sum(), batch.num_target_tokens)
    return StepOutput(rows.sum(), {"toy/error": errors}, batch.num_target_tokens)


def build(stage: int, precision: Precision, *, dropout: float = 0.0, threshold: int = 0) -> Engine:
    torch.manual_seed(0)
    model = Toy(dropout)
    rates = {"body": 1e-2, "fixed": 0.0, "head": 2e-3}
    groups = [
        ParamGroup(
            name=name,
            params=[(f"{name}.{key}", p) for key, p in getattr(model, name).named_parameters()],
            trainable=name != "fixed",
            lr=lr,
            weight_decay=0.1,
        )
        for name, lr in rates.items()
    ]
    config = DeepSpeedConfig(
        zero_stage=stage, precision=precision, param_persistence_threshold=threshold
    )
    return build_engine(model, groups, OPTIM, config)


def train(
    folder: Path,
    *,
    stage: int = 3,
    precision: Precision = Precision.fp32,
    stop_at: int = 0,
    micro_steps: int = 1,
    max_steps: int = 10,
    save_steps: int = 5,
    keep: int = 2,
    dropout: float = 0.0,
    threshold: int = 0,
    poison: tuple[int, int] | None = None,
    empty: int = -1,
    max_skipped_steps: int = 5,
    stop: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Run or resume; return what the events say and the group hashes after each step."""
    hashes: list[dict[str, str]] = []

    def record(engine: Engine, step: int) -> None:
        hashes.append(group_hashes(engine))
        if step == stop_at:
            raise StopHereError(f"stopped at {step}")

    loader = ToyLoader(micro_steps, poison=poison, empty=empty, stop=stop)
    cfg = FitConfig(
        max_steps=max_steps,
        save_steps=save_steps,
        keep_checkpoints=keep,
        max_skipped_steps=max_skipped_steps,
    )
    ended = "done"
    try:
        # Code may change under a long test session; what is tested here is the numbers.
        config = RunConfig(dir=str(folder), resume_allow=["code"])
        with start_run(config, stage="toy", settings=cfg) as run:
            engine = build(stage, precision, dropout=dropout, threshold=threshold)
            hashes.append(group_hashes(engine))
            fit(engine, loader, toy_step, cfg, run, every=[(1, record)])
    except (StopHereError, RunError) as error:
        ended = f"{type(error).__name__}: {error}"
    barrier()
    return {"ended": ended, "hashes": hashes, **outcome(folder)}


def outcome(folder: Path) -> dict[str, Any]:
    """What the run directory says: the steps' figures by name, state, ledger and faults."""
    steps = read_steps(folder / "events.jsonl")
    figures = {"loss": "losses", "keys": "keys", "applied": "applied", "step": "steps"}
    figures |= {"grad_norm": "norms", "lr": "lr", "metrics": "metrics"}
    return {
        **{name: [event[field] for event in steps] for field, name in figures.items()},
        "state": json.loads((folder / "state.json").read_text()),
        "events": [
            event
            for event in read_jsonl(folder / "events.jsonl")
            if event["kind"] in {"non_finite", "checkpoint_bad", "checkpoint_leftover", "resume"}
        ],
        "ledger": list(read_jsonl(folder / "ledger.jsonl")),
    }


def resume(out: Path) -> dict[str, Any]:
    """Run 10 against run 5 + resume 5, and against a stop in step 7, by stage and precision."""
    results: dict[str, Any] = {}
    for stage in (1, 2, 3):
        for precision in Precision:
            # A threshold above every size keeps all parameters gathered under ZeRO-3.
            threshold = 1000 if precision is Precision.bf16 else 0
            options: dict[str, Any] = {
                "stage": stage,
                "precision": precision,
                "dropout": 0.2,
                "threshold": threshold,
                "micro_steps": 2,
            }
            name = f"{stage}-{precision.name}"
            results[f"{name}-straight"] = train(out / f"{name}-straight", **options)
            results[f"{name}-first"] = train(out / f"{name}-resumed", **options, stop_at=5)
            results[f"{name}-resumed"] = train(out / f"{name}-resumed", **options)
            asked = train(out / f"{name}-asked", **options, stop=(6, 1))
            results[f"{name}-asked"] = asked
            results[f"{name}-went-on"] = train(out / f"{name}-asked", **options)
    return results


def equal(out: Path) -> dict[str, Any]:
    """The same data in other shapes: stages, accumulation; and a run to resume elsewhere."""
    results = {f"stage-{s}": train(out / f"stage-{s}", stage=s, keep=2) for s in (1, 2, 3)}
    for stage in (1, 2, 3):
        results[f"accumulated-{stage}"] = train(out / f"acc-{stage}", stage=stage, micro_steps=4)
    results["accumulated-bf16"] = train(out / "acc-b", precision=Precision.bf16, micro_steps=4)
    results["whole-bf16"] = train(out / "whole-b", precision=Precision.bf16)
    results["to-move"] = train(out / "moved", stop_at=5)
    return results


def damage(out: Path) -> dict[str, Any]:
    """Damage the newest of two checkpoints in each way, then resume."""
    base = out / "base"
    results = {"straight": train(out / "straight", max_steps=6, save_steps=2)}
    train(base, max_steps=6, save_steps=2, stop_at=4)
    for kind in DAMAGES:
        folder = out / kind
        if get_world().rank == 0:
            shutil.copytree(base, folder)
            DAMAGES[kind](folder / "checkpoints")
        barrier()
        results[kind] = train(folder, max_steps=6, save_steps=2)
        results[kind]["quarantine"] = sorted(p.name for p in (folder / "quarantine").glob("*"))
    return results


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(bytes(data))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _frozen_file(root: Path) -> Path:
    return next(root.glob("frozen-*")) / "rank-00000.safetensors"


def _both(root: Path) -> None:
    for step in (2, 4):
        _flip(root / f"step-{step}" / "rank-00000.safetensors")


def _half_written(root: Path) -> None:
    shutil.copytree(root / "step-4", root / "step-6.tmp-12345678")
    (root / "step-6.tmp-12345678" / "manifest.json").unlink()


DAMAGES = {
    "flip": lambda root: _flip(root / "step-4" / "rank-00001.safetensors"),
    "truncate": lambda root: _truncate(root / "step-4" / "rank-00000.safetensors"),
    "missing": lambda root: (root / "step-4" / "rank-00001.safetensors").unlink(),
    "rng": lambda root: _flip(root / "step-4" / "rank-00001.json"),
    "manifest": lambda root: _flip(root / "step-4" / "manifest.json"),
    "no-manifest": lambda root: (root / "step-4" / "manifest.json").unlink(),
    "frozen": lambda root: _flip(_frozen_file(root)),
    "pointer": lambda root: (root / "latest").write_text(""),
    "leftover": _half_written,
    "all": _both,
}


def numbers(out: Path) -> dict[str, Any]:
    """Steps that must not update: NaN on one rank, no supervised token at all."""
    results: dict[str, Any] = {}
    for stage in (1, 2, 3):
        for precision in Precision:
            name = f"{stage}-{precision.name}"
            options: dict[str, Any] = {"stage": stage, "precision": precision, "max_steps": 5}
            results[f"nan-{name}"] = train(out / f"nan-{name}", **options, poison=(2, 1))
            results[f"empty-{name}"] = train(out / f"empty-{name}", **options, empty=2)
    results["stopped"] = train(out / "stopped", poison=(2, 1), max_skipped_steps=0)
    return results


def moved(out: Path) -> dict[str, Any]:
    """Continue on this number of ranks what another number saved, and read it by name."""
    folder = out / "moved-here"
    shutil.copytree(out.parent / "equal" / "moved", folder)
    reader = CheckpointReader(folder / "checkpoints" / "step-5")
    tensors = {name: reader.full(name) for name in reader.names()}
    result = train(folder)
    result["shapes"] = {name: list(t.shape) for name, t in tensors.items()}
    torch.manual_seed(0)
    fixed = Toy(0.0).fixed.weight
    result["fixed_equal"] = bool(torch.equal(tensors["fixed.weight"], fixed.detach()))
    again = build(3, Precision.fp32)
    result["fresh"] = group_hashes(again)
    return {"moved": result}


def alone(out: Path) -> dict[str, Any]:
    """One rank against a plain torch loop, to hold the scaling of loss and gradient to account."""
    engine_run = train(out / "one", micro_steps=2)
    torch.manual_seed(0)
    model = Toy(0.0)
    model.fixed.requires_grad_(False)
    parts = [(model.body, 1e-2), (model.head, 2e-3)]
    optimizer = torch.optim.AdamW(
        [{"params": list(m.parameters()), "lr": lr, "weight_decay": 0.1} for m, lr in parts],
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.eps,
    )
    losses, norms = [], []
    for step, item in zip(range(10), ToyLoader(1, poison=None, empty=-1).steps(), strict=False):
        batch = item.micro_batches[0]
        for group, rates in zip(optimizer.param_groups, ("body", "head"), strict=True):
            group["lr"] = engine_run["lr"][step][rates]
        loss = (model(batch.x) - batch.y).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norms.append(float(nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"engine": engine_run, "plain": {"losses": losses, "norms": norms}}


SCENARIOS = {
    "resume": resume,
    "equal": equal,
    "damage": damage,
    "numbers": numbers,
    "moved": moved,
    "alone": alone,
}


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = init_distributed()
    for name in sys.argv[2:]:
        (out / name).mkdir(parents=True, exist_ok=True)
        result = SCENARIOS[name](out / name)
        if world.rank == 0:
            (out / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    leave(0)
