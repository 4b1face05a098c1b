"""Settings of the online data path: sources, packing, workers, tolerance."""

from __future__ import annotations

from dataclasses import dataclass, field

from omni_train.config.errors import ConfigError
from omni_train.data.types import ProcessingConfig


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One set of shards.

    Args:
        path: directory with `manifest.json`, shards and their indexes.
        weight: share of the tokens, relative to the other sources' weights.
    """

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(
                key="data.sources.*.weight",
                value=self.weight,
                rule="a weight is a positive share of the tokens",
                remedy="remove the source to leave it out",
            )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is read and how it is packed.

    Args:
        sources: sets of shards by name; the name is what the ledger and the metrics show.
        pack_tokens: token budget of one packed sequence.
        global_batch_packs: packs in one optimiser step, over all ranks and micro-steps.
        window_samples: samples planned at a time; memory and packing quality grow with it.
        shuffle_shards: shards whose samples are shuffled together.
        num_workers: worker processes per rank; 0 encodes in the training process.
        prefetch_packs: packs that each worker prepares ahead.
        max_bad_share: largest share of a source's samples that may be unusable.
        max_bad_in_a_row: unusable samples in a row that stop the run.
        processing: how media become tokens.
    """

    sources: dict[str, SourceConfig]
    pack_tokens: int = 8192
    global_batch_packs: int = 8
    window_samples: int = 4096
    shuffle_shards: int = 16
    num_workers: int = 2
    prefetch_packs: int = 2
    max_bad_share: float = 0.01
    max_bad_in_a_row: int = 16
    processing: ProcessingConfig = field(default_factory=ProcessingConfig)

    def __post_init__(self) -> None:
        for name in ("pack_tokens", "global_batch_packs", "window_samples", "shuffle_shards"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    key=f"data.{name}",
                    value=getattr(self, name),
                    rule="must be at least 1",
                    remedy="raise it",
                )
        if not self.sources:
            raise ConfigError(
                key="data.sources",
                value={},
                rule="at least one set of shards is needed",
                remedy="add data.sources.NAME.path=DIRECTORY",
            )
