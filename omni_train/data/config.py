"""Settings of the online data path: sources and their mixture, packing, workers, tolerance."""

from __future__ import annotations

from dataclasses import dataclass, field

from omni_train.config.errors import ConfigError, check_at_least
from omni_train.data.filters import FilterConfig
from omni_train.data.stores import FetchConfig
from omni_train.data.types import ProcessingConfig

DEFAULT_PREFETCH_BYTES = 1 << 29


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One set of shards.

    Args:
        path: directory with `manifest.json`, shards and their indexes.
        weight: share of the tokens, relative to the other sources' weights.
        max_epochs: how often a sample may be seen; then the source ends and the others take over
            its share. None repeats it for as long as the run lasts.
    """

    path: str
    weight: float = 1.0
    max_epochs: int | None = None

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(
                key="data.sources.*.weight",
                value=self.weight,
                rule="a weight is a positive share of the tokens",
                remedy="remove the source to leave it out",
            )
        if self.max_epochs is not None and self.max_epochs < 1:
            raise ConfigError(
                key="data.sources.*.max_epochs",
                value=self.max_epochs,
                rule="a source is seen at least once",
                remedy="remove the source to leave it out",
            )


@dataclass(kw_only=True, slots=True)
class CurriculumStep:
    """Weights from a step on.

    Args:
        from_step: global step; they hold from the first window that begins there or later.
        weights: by source; a source that is not named rests.
    """

    from_step: int
    weights: dict[str, float]


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is read and how it is packed.

    Args:
        sources: sets of shards by name; the name is what the ledger and the metrics show.
        curriculum: weights that replace the sources' own from a step on.
        budget_tokens: planned tokens of all sources after which the stage ends; None for no limit.
        pack_tokens: token budget of one packed sequence.
        global_batch_packs: packs in one optimiser step, over all ranks and micro-steps.
        window_samples: samples planned at a time; memory and packing quality grow with it.
        shuffle_shards: shards whose samples are shuffled together.
        num_workers: worker processes per rank; 0 encodes in the training process.
        prefetch_bytes: what the workers of a rank prepare ahead, finished and under way; one pack
            is always allowed.
        worker_memory_bytes: most that a worker may allocate, with some 0.35 GB for its libraries; a
            sample that needs more is left out. None for no cap.
        max_bad_share: largest share of a source's samples that may be unusable.
        max_bad_in_a_row: unusable samples in a row that stop the run.
        processing: how media become tokens.
        filters: which samples are used, by what the index knows of them.
        fetch: how remote shards are read.
    """

    sources: dict[str, SourceConfig]
    curriculum: list[CurriculumStep] = field(default_factory=list)
    budget_tokens: int | None = None
    pack_tokens: int = 8192
    global_batch_packs: int = 8
    window_samples: int = 4096
    shuffle_shards: int = 16
    num_workers: int = 2
    prefetch_bytes: int = DEFAULT_PREFETCH_BYTES
    worker_memory_bytes: int | None = None
    max_bad_share: float = 0.01
    max_bad_in_a_row: int = 16
    processing: ProcessingConfig = field(default_factory=ProcessingConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)

    def __post_init__(self) -> None:
        check_at_least(
            self, "data", pack_tokens=1, global_batch_packs=1, window_samples=1, shuffle_shards=1
        )
        if not self.sources:
            raise ConfigError(
                key="data.sources",
                value={},
                rule="at least one set of shards is needed",
                remedy="add data.sources.NAME.path=DIRECTORY",
            )
        if self.budget_tokens is not None and self.budget_tokens < 1:
            raise ConfigError(
                key="data.budget_tokens",
                value=self.budget_tokens,
                rule="must be at least 1",
                remedy="raise it, or leave it out for no limit",
            )
        _check_workers(self)
        for entry in self.curriculum:
            _check_curriculum(entry, self.sources)


def _check_workers(config: DataConfig) -> None:
    for name, value, least in (
        ("num_workers", config.num_workers, 0),
        ("prefetch_bytes", config.prefetch_bytes, 1),
        ("worker_memory_bytes", config.worker_memory_bytes, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(
                key=f"data.{name}",
                value=value,
                rule=f"must be at least {least}",
                remedy="raise it, or leave it out for the default",
            )
    for name, value, default in (
        ("prefetch_bytes", config.prefetch_bytes, DEFAULT_PREFETCH_BYTES),
        ("worker_memory_bytes", config.worker_memory_bytes, None),
    ):
        if not config.num_workers and value != default:
            raise ConfigError(
                key=f"data.{name}",
                value=value,
                rule="has no effect with data.num_workers=0",
                remedy="leave it out, or use a worker",
            )


def _check_curriculum(entry: CurriculumStep, sources: dict[str, SourceConfig]) -> None:
    unknown = sorted(entry.weights.keys() - sources.keys())
    if unknown:
        raise ConfigError(
            key="data.curriculum",
            value=unknown,
            rule=f"names sources that data.sources lacks; it has {sorted(sources)}",
            remedy="correct the name, or add the source",
        )
    if entry.from_step < 0 or min(entry.weights.values(), default=0.0) < 0:
        raise ConfigError(
            key="data.curriculum",
            value=f"from_step {entry.from_step}, weights {entry.weights}",
            rule="steps and weights are not negative",
            remedy="use 0 to let a source rest",
        )
    if sum(entry.weights.values()) <= 0:
        raise ConfigError(
            key="data.curriculum",
            value=entry.weights,
            rule="some source needs a weight above 0",
            remedy="give one, or remove the entry",
        )
