"""One of the two ZeRO-3 ranks of test_talker_zero3.py; started by torchrun.

    python -m torch.distributed.run --nproc_per_node 2 -m tests.numerics.talker_zero3_worker RESULT

Thinker and Talker are sharded under one engine, frozen and joint; the ranks hold different media,
and in some steps one of them has no speech or nothing at all. Each rank compares with a plain model
fed both batches and writes what it measured to RESULT.RANK as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from omni_train.data.collate import collate
from omni_train.engine.deepspeed import DeepSpeedConfig, Precision, build_engine
from omni_train.engine.distributed import World, init_distributed
from omni_train.engine.exit_codes import leave
from omni_train.engine.optim import OptimConfig
from omni_train.models.build import build_omni_for_training, build_talker, build_thinker
from omni_train.models.config import ModelConfig
from omni_train.models.groups import THINKER_GROUPS, select_groups
from omni_train.models.talker import OmniForTraining
from omni_train.models.talker_layout import SpeechBatch, TalkerLayout, lay_out, pack_speech
from omni_train.objectives.codec_next_token import codec_next_token
from tests.numerics.samples import make_sample, small_tokenizer
from tests.numerics.talker_models import SIZES, random_codes, spoken, with_reply
from tests.numerics.zero3_worker import compare

WORLD = 2
TALKER = ("talker", "talker_projection", "codec_head", "text_rows")
# (media, number of codes) of each rank's only dialogue; None where a rank has none.
STEPS: list[list[tuple[list[str], int] | None]] = [
    [(["audio"], 9), (["image"], 5)],
    [([], 4), None],
    [(["image", "audio"], 0), ([], 6)],
    [None, (["audio"], 3)],
]


def make_batch(
    model: OmniForTraining, case: tuple[list[str], int] | None, seed: int
) -> SpeechBatch:
    """A pack of one dialogue; without codes nothing in it is spoken."""
    if case is None:
        empty = pack_speech([], [], model.talker.spec)
        return SpeechBatch(talker=empty, thinker=collate([], model.spec))
    kinds, count = case
    prompt = make_sample(model.thinker, model.spec, kinds, seed=seed, prompt=True).encoded
    document = with_reply(prompt, [seed, seed + 1, seed + 2, seed + 3])
    layout: TalkerLayout | None = None
    if count:
        codes = random_codes(model.talker.spec, count, seed)
        layout = lay_out(spoken(prompt, document, codes), model.talker.spec)
    return SpeechBatch(
        talker=pack_speech([layout], [document.num_tokens], model.talker.spec),
        thinker=collate([document], model.spec),
    )


def reference(model: OmniForTraining, batch: SpeechBatch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch on the plain model; zeros where nothing came."""
    loss = codec_next_token(model, batch).loss
    loss.backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad()
    return float(loss.detach()), grads


def run_part(world: World, *, joint: bool) -> dict[str, Any]:
    """Run all steps and return the largest differences."""
    tokenizer = small_tokenizer()
    config = ModelConfig(tokenizer="in memory", tiny=SIZES)
    trained = (*TALKER, *(sorted(THINKER_GROUPS - {"lm_head"}) if joint else ()))
    optim = OptimConfig(lr=0.0)
    plain = OmniForTraining(
        build_thinker(config, tokenizer, seed=5, dtype=torch.float32),
        build_talker(config, tokenizer, seed=5, dtype=torch.float32, fresh=True),
        joint=joint,
    )
    select_groups(plain, optim, trained=trained)
    batches = [
        [make_batch(plain, case, 10 * number + rank) for rank, case in enumerate(step)]
        for number, step in enumerate(STEPS)
    ]
    wanted = [[reference(plain, batch) for batch in step] for step in batches]
    settings = DeepSpeedConfig(
        zero_stage=3, precision=Precision.fp32, gradient_clipping=0.0, param_persistence_threshold=0
    )
    model = build_omni_for_training(
        config, tokenizer, settings, seed=5, joint=joint, fresh_talker=True
    )
    engine = build_engine(model, select_groups(model, optim, trained=trained), optim, settings)
    assert all(p.numel() == 0 for p in model.parameters()), "a parameter is still whole"
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    summary: dict[str, Any] = {"loss_error": 0.0, "grad_error": 0.0, "trained": list(params)}
    summary["largest_grad"] = max(
        float(grad.abs().max()) for step in wanted for _, grads in step for grad in grads.values()
    )
    for number, step in enumerate(batches):
        loss = codec_next_token(engine.model, step[world.rank]).loss
        engine.model.backward(loss)
        error = abs(float(loss.detach()) - wanted[number][world.rank][0])
        summary["loss_error"] = max(summary["loss_error"], error)
        compare(params, [grads for _, grads in wanted[number]], (number,), summary)
        # The learning rate is zero: this only ends the micro-step.
        engine.model.step()
    return summary


def main(result: Path) -> None:
    """Run both parts."""
    world = init_distributed()
    torch.set_num_threads(1)
    measured = {str(joint): run_part(world, joint=joint) for joint in (False, True)}
    (result.parent / f"{result.name}.{world.rank}").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
