"""One of two ZeRO-3 ranks that train on one pack of 32,768 tokens; started by test_long_context.py.

    python -m torch.distributed.run --nproc_per_node 2 -m tests.numerics.long_worker RUN_DIR

The first document is text of 16,324 tokens; images, sounds and clips follow, and a clip with sound
lies across the cut between the ranks. The loop is `fit`. Rank 0 writes RUN_DIR/plain.json: the
loss of the same weights on the whole pack in a plain model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from omni_train.data.collate import collate
from omni_train.data.sequence import split
from omni_train.data.types import IGNORE_INDEX, Batch, EncodedSample, ModelSpec
from omni_train.engine.deepspeed import DeepSpeedConfig, Precision, build_engine
from omni_train.engine.distributed import init_distributed
from omni_train.engine.exit_codes import leave
from omni_train.engine.fit import FitConfig, fit
from omni_train.engine.optim import OptimConfig
from omni_train.engine.recompute import Checkpointing
from omni_train.engine.run import RunConfig, start_run
from omni_train.engine.types import StepItem
from omni_train.models.build import build_for_training, build_thinker
from omni_train.models.groups import THINKER_GROUPS, select_groups
from omni_train.models.thinker import ThinkerForTraining
from omni_train.objectives.next_token import next_token
from tests.numerics.samples import make_sample, small_config, small_tokenizer
from tests.numerics.sequence_worker import crosses

TOKENS = 32_768
LONG_DOCUMENT = 16_324
STEPS = 3
KINDS = (["av"], ["image", "audio"], ["video", "audio"], [])


def text(spec: ModelSpec, length: int) -> EncodedSample:
    """A document of words that come again and again, all of them supervised."""
    ids = 7 + 13 * (torch.arange(length) % 17)
    return EncodedSample(
        key=f"text{length}",
        input_ids=ids,
        labels=torch.where(torch.arange(length) < 1, IGNORE_INDEX, ids),
        position_ids=torch.arange(length).expand(3, -1),
        patches=torch.zeros(0, 3 * spec.temporal_patch_size * spec.patch_size**2).byte(),
        grid_thw=torch.zeros(0, 3, dtype=torch.long),
        mel=torch.zeros(spec.num_mel_bins, 0),
        mel_lengths=torch.zeros(0, dtype=torch.long),
    )


def long_pack(model: ThinkerForTraining) -> Batch:
    """A whole pack of exactly `TOKENS` tokens."""
    spec = model.spec
    made = [make_sample(model.thinker, spec, k, seed=i).encoded for i, k in enumerate(KINDS)]
    samples, used = [text(spec, LONG_DOCUMENT)], LONG_DOCUMENT
    while used + max(sample.num_tokens for sample in made) < TOKENS:
        samples.append(made[len(samples) % len(made) - 1])
        used += samples[-1].num_tokens
    samples.append(text(spec, TOKENS - used))
    pack = collate(samples, spec)
    assert pack.num_tokens == TOKENS, pack.num_tokens
    assert crosses(pack, 2), "no media across the cut"
    return pack


class OnePack:
    """A loader that gives the same pack at every step."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.position = batch, 0

    def steps(self) -> Iterator[StepItem]:
        while True:
            self.position += 1
            yield StepItem([self.batch], epoch=0, window=0, step=self.position - 1)

    def state(self) -> dict[str, int | str]:
        return {"epoch": 0, "window": 0, "step": self.position}

    def load_state(self, state: dict[str, int | str]) -> None:
        self.position = int(state["step"])

    def count_bad(self, bad: Sequence[tuple[str, str, str, str]], *, num_samples: int) -> None:
        assert not bad


def main(run_dir: Path) -> None:
    """Train, and compare the first loss."""
    world = init_distributed()
    torch.set_num_threads(1)
    tokenizer = small_tokenizer()
    config, _ = small_config(tokenizer)
    plain = build_thinker(config, tokenizer, seed=5, dtype=torch.float32)
    pack = long_pack(plain)
    if world.rank == 0:
        with torch.no_grad():
            loss = float(next_token(plain, pack).loss) / pack.num_target_tokens
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "plain.json").write_text(json.dumps({"loss": loss}))
    optim = OptimConfig(lr=3e-3)
    settings = DeepSpeedConfig(
        zero_stage=3,
        precision=Precision.fp32,
        sequence_parallel=2,
        activation_checkpointing=Checkpointing.full,
    )
    with start_run(RunConfig(dir=str(run_dir)), stage="long", settings=settings) as run:
        model = build_for_training(config, tokenizer, settings, seed=5)
        engine = build_engine(
            model,
            select_groups(model, optim, trained=THINKER_GROUPS),
            optim,
            settings,
            pack_tokens=TOKENS,
        )
        loader = OnePack(split(pack, model.spec))
        fit(engine, loader, next_token, FitConfig(max_steps=STEPS), run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
