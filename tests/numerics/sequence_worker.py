"""One of the ZeRO-3 ranks of test_sequence_parallel.py that share packs; started by torchrun.

    python -m torch.distributed.run --nproc_per_node N -m tests.numerics.sequence_worker RESULT

Every rank compares loss and gradients of its group with those of a plain model on whole packs, and
writes what it measured to RESULT.RANK as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from omni_train.data.collate import collate
from omni_train.data.sequence import split
from omni_train.data.types import Batch
from omni_train.engine.deepspeed import DeepSpeedConfig, Precision, build_engine
from omni_train.engine.distributed import World, init_distributed, sum_over_ranks
from omni_train.engine.exit_codes import leave
from omni_train.engine.optim import OptimConfig
from omni_train.engine.recompute import POLICIES, Checkpointing, checkpoint_layers
from omni_train.models.build import build_for_training, build_thinker
from omni_train.models.groups import select_groups
from omni_train.models.thinker import ThinkerForTraining
from omni_train.objectives.next_token import next_token
from tests.numerics.samples import make_sample, small_config, small_tokenizer

THINKER = (
    *("llm", "lm_head", "vision_encoder", "vision_merger"),
    *("audio_encoder", "audio_projection"),
)
PACKS: dict[str, list[list[str]]] = {
    "text": [[], [], []],
    "image": [["image", "image", "image"]],
    "packed images": [["image"], ["image", "image"]],
    "audio": [["audio", "audio"], ["audio"]],
    "av": [["av"], ["av"]],
    "video and text": [["video"], []],
    "all": [["av"], ["image", "audio"], [], ["video", "audio"]],
    "one clip": [["av"]],
    "no sample": [],
}


def make_packs(model: ThinkerForTraining) -> dict[str, Batch]:
    """Whole packs by name, the same on every rank."""
    spec = model.spec
    packs = {}
    for number, (name, kinds) in enumerate(PACKS.items()):
        made = [
            make_sample(model.thinker, spec, kind, seed=100 * number + i)
            for i, kind in enumerate(kinds)
        ]
        packs[name] = collate([sample.encoded for sample in made], spec)
    return packs


def crosses(batch: Batch, size: int) -> bool:
    """Whether an embedding span has tokens on both sides of a cut between ranks."""
    media = torch.zeros(-(-batch.num_tokens // size) * size, dtype=torch.bool)
    media[batch.vision_index] = True
    media[batch.audio_index] = True
    local = media.numel() // size
    return any(bool(media[cut - 1] & media[cut]) for cut in range(local, media.numel(), local))


def reference(model: ThinkerForTraining, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradients of a whole pack on the plain model."""
    loss = next_token(model, batch).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss.detach()), grads


def total(value: float) -> float:
    """Sum over the ranks."""
    sums = torch.tensor([value], dtype=torch.double)
    torch.distributed.all_reduce(sums)
    return float(sums)


def measure(world: World) -> dict[str, Any]:
    """Compare every pack and return the largest relative differences."""
    from deepspeed.utils import safe_get_full_grad

    tokenizer = small_tokenizer()
    config, _ = small_config(tokenizer)
    # Four heads, two of them with keys and values: as many as four ranks need.
    config = replace(config, tiny=replace(config.tiny, text_width=128))
    optim = OptimConfig(lr=0.0)
    plain = build_thinker(config, tokenizer, seed=5, dtype=torch.float32)
    select_groups(plain, optim, trained=THINKER)
    settings = DeepSpeedConfig(
        zero_stage=3,
        precision=Precision.fp32,
        gradient_clipping=0.0,
        param_persistence_threshold=0,
        sequence_parallel=world.size,
    )
    model = build_for_training(config, tokenizer, settings, seed=5)
    engine = build_engine(model, select_groups(model, optim, trained=THINKER), optim, settings)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    report: dict[str, Any] = {}
    packs = make_packs(plain)
    runs = [(name, pack, Checkpointing.none) for name, pack in packs.items()]
    runs += [(policy.name, packs["all"], policy) for policy in POLICIES[1:]]
    for name, pack, policy in runs:
        want, grads = reference(plain, pack)
        mine = split(pack, model.spec)
        checkpoint_layers(model, policy, offload=policy is Checkpointing.full)
        loss = next_token(engine.model, mine).loss
        engine.model.backward(loss)
        got = total(float(loss.detach()))
        errors = {}
        for key, param in trained.items():
            # DeepSpeed gives the mean over the ranks.
            ours, theirs = safe_get_full_grad(param) * world.size, grads[key]
            scale = max(float(theirs.abs().max()), 1e-3)
            errors[key] = float((ours - theirs).abs().max()) / scale
        worst = max(errors, key=errors.__getitem__)
        report[name] = {
            "loss_error": abs(got - want) / max(abs(want), 1.0),
            "grad_error": errors[worst],
            "worst": worst,
            "largest_grad": max(float(grad.abs().max()) for grad in grads.values()),
            "targets": [sum_over_ranks([mine.num_target_tokens])[0], pack.num_target_tokens],
            "tokens": mine.num_tokens,
            "media": [int(mine.vision_index.numel()), int(mine.audio_index.numel())],
            "crosses": crosses(pack, world.size),
        }
        # The learning rate is zero: this only ends the micro-step.
        engine.model.step()
    return report


def main(result: Path) -> None:
    """Measure and write."""
    world = init_distributed()
    torch.set_num_threads(1)
    (result.parent / f"{result.name}.{world.rank}").write_text(json.dumps(measure(world)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
