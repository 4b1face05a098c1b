"""B12: what the loop costs beside its engine's calls, against Trainer and Accelerate.

Two gloo ranks, one language model of 3.7 million parameters, rows of 1,024 tokens. Host time is the
processor time of each rank's main thread; what is spent in forward, loss, backward, clipping and
update is taken out, and what is left over, by step, is the loop's. (Wall time outside these calls
is a wait for the other rank first of all, which a plain loop spends inside of them.)

    fit        ours: DeepSpeed ZeRO-3, a vote before each update, an event for each step
    Trainer    transformers', under DDP; with a log line each step as ours, and quiet, its best
    Accelerate its own loop, under DDP; logs nothing

Rounds of a few steps take turns in the same two processes: `fit`, a bare loop over the same engine,
and the peers. Equality: `fit` and the bare loop start from the same weights with the same rows, and
their first losses must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from benchmarks.report import Row, parser, show

# A step of most of a second, as a pack of 8,192 tokens takes 7B on one large GPU.
RANKS, STEPS, TOKENS, VOCAB = 2, 5, 1024, 2048
WARM_UP = 2
MOST_SHARE = 2.0
TIMEOUT_S = 380


@dataclass
class Inside:
    """Adds up the host seconds of wrapped calls.

    Args:
        seconds: of all wrapped calls so far.
        marks: (host time, `seconds`) after each update.
    """

    seconds: float = 0.0
    marks: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, call: Callable[..., Any], *, update: bool = False) -> Callable[..., Any]:
        """Return `call`, timed; with `update` each end of it is the end of a step."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            result = call(*args, **kwargs)
            now = time.thread_time()
            self.seconds += now - start
            if update:
                self.marks.append((now, self.seconds))
            return result

        return timed

    def outside(self) -> tuple[float, float]:
        """Return host seconds a step outside of the calls, and whole, between the first and last
        update since this was last asked."""
        steps = len(self.marks) - 1
        (first, inside_first), (last, inside_last) = self.marks[0], self.marks[-1]
        self.marks = []
        whole = last - first
        return (whole - (inside_last - inside_first)) / steps, whole / steps


@dataclass
class Rows:
    """A micro-batch of `fit`: one row of ids [1, T]."""

    ids: Tensor
    keys: list[str]
    bad: list[tuple[str, str, str, str]] = field(default_factory=list)
    num_target_tokens: int = TOKENS - 1
    num_tokens: int = TOKENS

    def to(self, device: torch.device) -> Self:
        """Everything is on the CPU."""
        return self


class Model(nn.Module):
    """A causal language model that returns its summed loss."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
        self.model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, **sizes, **heads)).float()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the mean loss, as Trainer wants it."""
        return {"loss": self.model(input_ids=input_ids, labels=input_ids).loss}


def rows_of(rank: int) -> list[Tensor]:
    """Return the ids int64 [T] of one rank's rows."""
    rng = torch.Generator().manual_seed(rank)
    return [torch.randint(0, VOCAB, (TOKENS,), generator=rng) for _ in range(64)]


class FixedLoader:
    """Gives `fit` the same rows again and again."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self.rows, self.position = rows, 0

    def steps(self) -> Iterator[Any]:
        """Yield global steps of one micro-batch."""
        from omni_train.engine.types import StepItem

        while True:
            ids = self.rows[self.position % len(self.rows)][None]
            yield StepItem([Rows(ids, [str(self.position)])], 0, 0, self.position)
            self.position += 1

    def state(self) -> dict[str, int | str]:
        """Return the position."""
        return {"epoch": 0, "window": 0, "step": self.position}

    def load_state(self, state: dict[str, int | str]) -> None:
        """Continue there."""
        self.position = int(state["step"])

    def count_bad(self, bad: Sequence[tuple[str, str, str, str]], *, num_samples: int) -> None:
        """There are none."""
        assert not bad, bad


def trainer_round(rows: list[Tensor], inside: Inside, folder: Path, *, logging: bool) -> None:
    """Train for a round by transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS + WARM_UP,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="steps" if logging else "no",
        logging_steps=1,
        disable_tqdm=not logging,
        dataloader_pin_memory=False,
    )
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    data = [{"input_ids": ids, "labels": ids} for ids in rows * RANKS]
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, schedule))
    trainer.compute_loss = inside(trainer.compute_loss)
    trainer.accelerator.backward = inside(trainer.accelerator.backward)
    trainer.accelerator.clip_grad_norm_ = inside(trainer.accelerator.clip_grad_norm_)
    optimizer.step = inside(optimizer.step, update=True)  # type: ignore[method-assign]
    trainer.train()


def accelerate_round(rows: list[Tensor], inside: Inside) -> None:
    """Train for a round by Accelerate's usual loop."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True)
    plain = Model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4)
    data: Any = [{"input_ids": ids} for ids in rows * RANKS]
    model, optimizer, loader = accelerator.prepare(plain, optimizer, DataLoader(data))
    forward, backward = inside(model), inside(accelerator.backward)
    clip = inside(accelerator.clip_grad_norm_)
    update = inside(optimizer.step, update=True)
    zero = inside(optimizer.zero_grad)
    for _, batch in zip(range(STEPS + WARM_UP), loader, strict=False):
        backward(forward(**batch)["loss"])
        clip(model.parameters(), 1.0)
        update()
        zero()


class Sides:
    """One rank's engines and rounds.

    Args:
        out: directory of the run.
        rows: ids of this rank.
    """

    def __init__(self, out: Path, rows: list[Tensor]) -> None:
        self.out, self.rows = out, rows
        self.fitted, self.bare = Inside(), Inside()
        # Of `fit`'s time outside: the rank's report, most of it the norms of the gradients.
        self.reports = Inside()
        self.engine, self.other = engine_of(self.fitted), engine_of(self.bare)
        self.losses: dict[str, float] = {}
        self.found: list[dict[str, tuple[float, float]]] = []
        self.report_s: list[float] = []

    def objective(self, model: nn.Module, batch: Rows) -> Any:
        """Return what `fit` wants of a micro-batch."""
        from omni_train.objectives.types import StepOutput

        loss = model(input_ids=batch.ids)["loss"] * batch.num_target_tokens
        self.losses.setdefault("fit", float(loss) / batch.num_target_tokens)
        return StepOutput(loss, {}, batch.num_target_tokens)

    def bare_round(self) -> None:
        """Train for a round with nothing around the engine."""
        forward = self.bare(self.other.model)
        for ids in self.rows[: STEPS + WARM_UP]:
            loss = forward(input_ids=ids[None])["loss"]
            self.losses.setdefault("bare", float(loss))
            self.other.model.backward(loss)
            self.other.model.step()

    def all_rounds(self, _: Any, step: int) -> None:
        """After a round of `fit`: note its figures, then give every other side its turn."""
        figures = {"fit": self.fitted.outside()}
        rounds: dict[str, Callable[[Inside], None]] = {
            "Trainer, logging": lambda inside: self.trainer(inside, logging=True),
            "Trainer, quiet": lambda inside: self.trainer(inside, logging=False),
            "Accelerate": lambda inside: accelerate_round(self.rows, inside),
        }
        self.report_s.append(self.reports.seconds / STEPS)
        self.reports.seconds = 0.0
        self.bare_round()
        figures["bare"] = self.bare.outside()
        for name, run in rounds.items():
            inside = Inside()
            run(inside)
            inside.marks = inside.marks[WARM_UP:]
            figures[name] = inside.outside()
        self.found.append(figures)

    def trainer(self, inside: Inside, *, logging: bool) -> None:
        """A round of transformers' Trainer."""
        trainer_round(self.rows, inside, self.out / "trainer", logging=logging)


def engine_of(inside: Inside) -> Any:
    """Return a fresh engine whose backward pass and update are timed."""
    from omni_train.engine.deepspeed import DeepSpeedConfig, Precision, build_engine
    from omni_train.engine.groups import ParamGroup
    from omni_train.engine.optim import OptimConfig

    model = Model()
    params = list(model.named_parameters())
    group = ParamGroup(name="all", params=params, trainable=True, lr=1e-4, weight_decay=0.0)
    config = DeepSpeedConfig(precision=Precision.fp32)
    engine = build_engine(model, [group], OptimConfig(), config)
    engine.model.backward = inside(engine.model.backward)
    engine.model.step = inside(engine.model.step, update=True)
    return engine


def worker(out: Path, rounds: int) -> None:
    """One rank: rounds of every side in turn; rank 0 writes what was measured."""
    from omni_train.engine import fit as loop
    from omni_train.engine.distributed import get_world, init_distributed
    from omni_train.engine.fit_config import FitConfig
    from omni_train.engine.run import RunConfig, start_run

    torch.set_num_threads(1)
    init_distributed()
    rank = get_world().rank
    sides = Sides(out, rows_of(rank))
    cfg = FitConfig(max_steps=rounds * STEPS, save_steps=10_000)
    with start_run(RunConfig(dir=str(out / "run")), stage="benchmark", settings=cfg) as run:
        objective = sides.fitted(sides.objective)
        every = [(STEPS, sides.all_rounds)]
        loop.local_report = sides.reports(loop.local_report)
        loop.fit(sides.engine, FixedLoader(sides.rows), objective, cfg, run, every=every)
    if rank == 0:
        found = {"rounds": sides.found, "losses": sides.losses, "report_s": sides.report_s}
        (out / "found.json").write_text(json.dumps(found))


def measure(rounds: int) -> dict[str, Any]:
    """Start two ranks and return what they measured."""
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={RANKS}", "-m", "benchmarks.b12_trainer"]
        command += ["--worker", name, "--pairs", str(rounds)]
        # Trainer's own progress is of no interest, unless something fails.
        done = subprocess.run(
            command,
            check=False,
            timeout=TIMEOUT_S,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, (
            f"the ranks ended with {done.returncode}: {done.stdout[-3000:]}"
        )
        found: dict[str, Any] = json.loads((Path(name) / "found.json").read_text())
    return found


def table(rounds: Sequence[dict[str, tuple[float, float]]], report_s: Sequence[float]) -> list[Row]:
    """Return the rows; each round is a pair.

    Args:
        rounds: of each side, host seconds of a step outside the engine's calls, and whole.
        report_s: of each round, seconds of a step that go into the rank's report.
    """
    rows = []
    mine = [round_["fit"][0] * 1e3 for round_ in rounds]
    shares = [round_["fit"][0] / round_["fit"][1] * 100 for round_ in rounds]
    middle = statistics.median(shares)
    ends = (MOST_SHARE / max(shares), MOST_SHARE / min(shares))
    name = f"share of a step, at most {MOST_SHARE:g} %"
    rows.append(Row(name, middle, MOST_SHARE, "%", MOST_SHARE / middle, *ends, 1.0))
    reports = statistics.median(report_s) * 1e3
    why = (
        f"{reports:.1f} ms are the rank's report, most of it the norms of the gradients by group, "
        "which the vote needs before the update; Trainer takes them in clipping, which is not "
        "counted. The rest is two exchanges and the step's event"
    )
    goals = {"Trainer, logging": 1.0, "Trainer, quiet": 0.0, "Accelerate": 0.0, "bare": 0.0}
    for peer, goal in goals.items():
        theirs = [round_[peer][0] * 1e3 for round_ in rounds]
        ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
        ends = (statistics.median(ratios), min(ratios), max(ratios))
        sides = (statistics.median(mine), statistics.median(theirs))
        rows.append(Row(f"host time of a step, {peer}", *sides, "ms", *ends, goal, why))
    return rows


def main() -> int:
    """Run the table, or one rank of it."""
    options = parser("Host time of the loop outside its engine's calls.")
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker:
        worker(args.worker, args.pairs)
        return 0
    found = measure(max(args.pairs, 9))
    losses = found["losses"]
    assert abs(losses["fit"] - losses["bare"]) < 1e-4, f"other losses: {losses}"
    packages = ("torch", "deepspeed", "transformers", "accelerate")
    whole = statistics.median(round_["fit"][1] for round_ in found["rounds"])
    notes = [f"a step has {whole * 1e3:.0f} ms of host time; {STEPS} steps a round"]
    return show(table(found["rounds"], found["report_s"]), packages, notes, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
