"""One of the two ZeRO-3 ranks of test_zero3_modalities.py; started by torchrun.

    python -m torch.distributed.run --nproc_per_node 2 -m tests.numerics.zero3_worker RESULT

Part `all` runs every pair of modality subsets with everything trained, part `frozen` a few pairs
with all but the audio parts frozen. Each rank compares with a plain model fed both batches and
writes what it measured to RESULT.RANK as JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from omni_train.data.collate import collate
from omni_train.data.types import Batch, ModelSpec
from omni_train.engine.checkpoint import CheckpointWriter
from omni_train.engine.deepspeed import (
    DeepSpeedConfig,
    Engine,
    Precision,
    build_engine,
)
from omni_train.engine.distributed import World, init_distributed
from omni_train.engine.exit_codes import leave
from omni_train.engine.optim import OptimConfig
from omni_train.engine.run import RunConfig, start_run
from omni_train.models.build import build_for_training, build_thinker
from omni_train.models.groups import select_groups
from omni_train.models.thinker import ThinkerForTraining
from omni_train.objectives.next_token import next_token
from tests.numerics.samples import make_sample, small_config, small_tokenizer

KINDS = ("image", "video", "audio")
SUBSETS = [[k for k, on in zip(KINDS, bits, strict=True) if on]
           for bits in itertools.product((False, True), repeat=3)]  # fmt: skip
WORLD = 2
FROZEN = ("llm", "lm_head", "vision_encoder", "vision_merger")
THINKER = (*FROZEN, "audio_encoder", "audio_projection")


def make_batches(model: ThinkerForTraining, spec: ModelSpec) -> list[list[Batch]]:
    """One batch per rank and subset, all different."""
    return [
        [
            collate([make_sample(model.thinker, spec, kinds, seed=100 * rank + i).encoded], spec)
            for i, kinds in enumerate(SUBSETS)
        ]
        for rank in range(WORLD)
    ]


def reference(model: ThinkerForTraining, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch on the plain model."""
    loss = next_token(model, batch).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss), grads


def run_part(part: str, world: World, run_dir: Path) -> dict[str, Any]:
    """Run the pairs of one part and return the largest differences."""
    tokenizer = small_tokenizer()
    config, spec = small_config(tokenizer)
    in_stage = [name for name in THINKER if part == "all" or name not in FROZEN]
    optim = OptimConfig(lr=0.0)
    plain = build_thinker(config, tokenizer, seed=5, dtype=torch.float32)
    select_groups(plain, optim, trained=in_stage)
    batches = make_batches(plain, spec)
    wanted = [[reference(plain, batch) for batch in row] for row in batches]
    settings = DeepSpeedConfig(
        zero_stage=3, precision=Precision.fp32, gradient_clipping=0.0, param_persistence_threshold=0
    )
    model = build_for_training(config, tokenizer, settings, seed=5)
    groups = select_groups(model, optim, trained=in_stage)
    engine = build_engine(model, groups, optim, settings)
    assert all(p.numel() == 0 for p in model.parameters()), "a parameter is still whole"
    pairs = list(itertools.product(range(len(SUBSETS)), repeat=WORLD))
    if part == "frozen":
        pairs = [pair for pair in pairs if pair[0] != pair[1]][::6]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    summary: dict[str, Any] = {
        "pairs": len(pairs),
        "loss_error": 0.0,
        "grad_error": 0.0,
        "trained": list(trained),
        "largest_grad": max(
            float(grad.abs().max()) for row in wanted for _, grads in row for grad in grads.values()
        ),
    }
    for pair in pairs:
        loss = next_token(engine.model, batches[world.rank][pair[world.rank]]).loss
        engine.model.backward(loss)
        both = [wanted[rank][subset] for rank, subset in enumerate(pair)]
        error = abs(float(loss.detach()) - both[world.rank][0])
        summary["loss_error"] = max(summary["loss_error"], error)
        compare(trained, [grads for _, grads in both], pair, summary)
        # The learning rate is zero: this only ends the micro-step.
        engine.model.step()
    if part == "all":
        summary["reloaded"] = save_and_reload(engine, world, plain, run_dir)
    return summary


def save_and_reload(engine: Engine, world: World, plain: ThinkerForTraining, run_dir: Path) -> bool:
    """Save the two ranks' checkpoint and build a plain model of it: is it the same?"""
    with (
        start_run(RunConfig(dir=str(run_dir)), stage="test", settings=RunConfig(dir="x")) as run,
        CheckpointWriter(engine, run, keep=1) as writer,
    ):
        writer.save(loader_state={}, metrics={})
    if world.rank:
        return True
    tokenizer = small_tokenizer()
    config, _ = small_config(tokenizer)
    config.init_from = str(run_dir)
    reloaded = build_thinker(config, tokenizer, seed=6, dtype=torch.float32)
    assert not reloaded.report.initialised
    theirs = dict(reloaded.named_parameters())
    return all(torch.equal(param, theirs[name]) for name, param in plain.named_parameters())


def compare(
    trained: dict[str, torch.nn.Parameter],
    wanted: list[dict[str, torch.Tensor]],
    pair: tuple[int, ...],
    summary: dict[str, Any],
) -> None:
    """Note the largest difference between the gathered gradients and the sum of `wanted`."""
    from deepspeed.utils import safe_get_full_grad

    for name, param in trained.items():
        # DeepSpeed gives the mean over the ranks.
        got = safe_get_full_grad(param) * WORLD
        want = torch.stack([grads[name] for grads in wanted]).sum(0)
        difference = float((got - want).abs().max()) / max(1.0, float(want.abs().max()))
        # Not `>`, so that a NaN is noted too.
        if not difference <= summary["grad_error"]:
            summary["grad_error"], summary["worst"] = difference, [name, *pair]


def main(result: Path) -> None:
    """Run both parts."""
    world = init_distributed()
    torch.set_num_threads(1)
    measured = {part: run_part(part, world, result.parent / "run") for part in ("all", "frozen")}
    (result.parent / f"{result.name}.{world.rank}").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
