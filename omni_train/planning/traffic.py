"""What the data ask of the model: from the shards' indexes where there are some, else assumed.

    indexes --the run's own loader--> packs of the first window --> means, peaks, imbalance

No medium is opened. Without indexes the packs are taken as full, the documents as of 2,048 tokens,
and the media's share of a source follows from its name or its stage; the plan says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from omni_train.config.errors import DataError
from omni_train.data.config import DataConfig
from omni_train.data.loader import PlannedLoader
from omni_train.data.measure import (
    AUDIO_COST_PER_CONV_FRAME,
    TOKENS_WHERE_ATTENTION_EQUALS_MATMUL,
    VISION_COST_PER_PATCH,
)
from omni_train.data.plan import assign, lockstep_cost
from omni_train.data.types import ModelSpec, PackSpec

ASSUMED_FILL = 0.985
ASSUMED_DOCUMENT = 2048
# Share of a source's tokens that are (vision, sound), where only its name is known.
_ASSUMED_MEDIA = {
    "image": (0.8, 0.0),
    "video": (0.9, 0.0),
    "audio": (0.0, 0.8),
    "audio_video": (0.8, 0.1),
}
_STAGE_MEDIA = {"stage1_audio": "audio", "stage1_vision": "image"}
PATCHES_PER_TOKEN = 4
FRAMES_PER_TOKEN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """An average pack, the fullest ones, and the order of things.

    Args:
        measured: whether shards' indexes were read.
        tokens: of an average pack. fill: the same as a share of the budget.
        pairs: sum of the squared lengths of its documents.
        patches, frames: vision patches, audio frames after the convolutions, of an average pack.
        peak_patches, peak_frames: of the pack with most.
        packs_per_step: of one global step.
        imbalance: the slowest rank's work over the mean, in the lockstep of ZeRO-3.
        supervised: share of the tokens that the loss sees.
        shares: of the tokens, by modality.
        epoch_tokens: of all sources once; None where not known.
        num_shards: of all sources.
        notes: what was assumed.
    """

    measured: bool
    tokens: float
    fill: float
    pairs: float
    patches: float
    frames: float
    peak_patches: float
    peak_frames: float
    packs_per_step: float
    imbalance: float
    supervised: float
    shares: dict[str, float]
    epoch_tokens: int | None = None
    num_shards: int = 0
    notes: list[str] = field(default_factory=list)


def assume_traffic(recipe: str, config: DataConfig) -> Traffic:
    """Return what is assumed of sources whose indexes cannot be read."""
    weights = {name: source.weight for name, source in config.sources.items()}
    total = sum(weights.values())
    vision = sound = 0.0
    for name, weight in weights.items():
        media = _ASSUMED_MEDIA.get(name) or _ASSUMED_MEDIA.get(_STAGE_MEDIA.get(recipe, ""))
        shares = media or (0.0, 0.0)
        vision += shares[0] * weight / total
        sound += shares[1] * weight / total
    tokens = ASSUMED_FILL * config.pack_tokens
    length = min(ASSUMED_DOCUMENT, tokens)
    return Traffic(
        measured=False,
        tokens=tokens,
        fill=ASSUMED_FILL,
        pairs=tokens * length,
        patches=PATCHES_PER_TOKEN * vision * tokens,
        frames=FRAMES_PER_TOKEN * sound * tokens,
        peak_patches=PATCHES_PER_TOKEN * tokens if vision else 0.0,
        # Patches cost more memory; a pack that is full of them has no room for sound.
        peak_frames=FRAMES_PER_TOKEN * tokens * (not vision and bool(sound)),
        packs_per_step=config.global_batch_packs,
        imbalance=1.0,
        supervised=1.0,
        shares={"text": 1.0 - vision - sound, "vision": vision, "audio": sound},
        notes=[_assumptions(length)],
    )


def _assumptions(length: float) -> str:
    packs = f"packs {ASSUMED_FILL:.1%} full, documents of {length:,.0f} tokens"
    return f"no index was read; assumed: {packs}, media by the sources' names, no imbalance"


def measure_traffic(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    spec: ModelSpec,
    *,
    ranks: int,
    seed: int,
) -> Traffic:
    """Return what the run's own plan of its first window holds.

    Args:
        config, tokenizer, spec, seed: of the run.
        ranks: data-parallel ones.

    Raises:
        ConfigError, DataError: as the loader does.
    """
    loader = PlannedLoader(
        config,
        tokenizer=tokenizer,
        spec=spec,
        rank=0,
        world_size=ranks,
        seed=seed,
        ledger=lambda **_: None,
    )
    steps = loader.plan(0)
    packs = [pack for step in steps for pack in step]
    if not packs:
        raise DataError("no_samples", "no sample of the first window fits a pack")
    tokens = _mean(packs, "num_tokens")
    patches = np.array([pack.vision_cost for pack in packs]) / VISION_COST_PER_PATCH
    frames = np.array([pack.audio_cost for pack in packs]) / AUDIO_COST_PER_CONV_FRAME
    vision = float(patches.mean()) / PATCHES_PER_TOKEN / tokens
    sound = float(frames.mean()) / FRAMES_PER_TOKEN / tokens
    # llm_cost is T * (1 + T / constant), summed over the documents.
    pairs = (_mean(packs, "llm_cost") - tokens) * TOKENS_WHERE_ATTENTION_EQUALS_MATMUL
    return Traffic(
        measured=True,
        tokens=tokens,
        fill=tokens / config.pack_tokens,
        pairs=pairs,
        patches=float(patches.mean()),
        frames=float(frames.mean()),
        peak_patches=float(patches.max()),
        peak_frames=float(frames.max()),
        packs_per_step=len(packs) / len(steps),
        imbalance=_imbalance(steps, ranks),
        supervised=_supervised(loader, packs),
        shares={"text": 1.0 - vision - sound, "vision": vision, "audio": sound},
        epoch_tokens=sum(source.epoch_tokens for source in loader.sources),
        num_shards=sum(len(source.manifest.shards) for source in loader.sources),
    )


def _mean(packs: list[PackSpec], name: str) -> float:
    return float(np.mean([getattr(pack, name) for pack in packs]))


def _imbalance(steps: list[list[PackSpec]], ranks: int) -> float:
    """Lockstep cost of the window over what it would be if every rank had the same."""
    slowest = sum(lockstep_cost(assign(packs, ranks)) for packs in steps)
    packs = [pack for step in steps for pack in step]
    work = sum(pack.vision_cost + pack.audio_cost + pack.llm_cost for pack in packs)
    return max(1.0, slowest * ranks / work)


def _supervised(loader: PlannedLoader, packs: list[PackSpec], *, samples: int = 256) -> float:
    """Share of supervised tokens, from evenly spaced samples of the window."""
    refs = [ref for pack in packs for ref in pack.samples]
    some = refs[:: max(1, len(refs) // samples)]
    targets = tokens = 0
    for ref in some:
        source = loader.sources[ref.source]
        if ref.row < source.counts[ref.shard]:
            targets += source.row(ref.shard, ref.row).num_target_tokens
            tokens += int(source.costs(ref.shard).num_tokens[ref.row])
    return targets / tokens if tokens else 1.0
