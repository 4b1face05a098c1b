"""Replies to figures: the table of metrics, groups, and bootstrap intervals.

The interval is of the figure over other samples of the same kind (the samples are resampled, not
the decoding); its seed is fixed, so the same replies give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_train.config.errors import DataError
from omni_train.evaluation.kinds.answers import ANSWERED, EXACT, RELAXED, TEMPO
from omni_train.evaluation.kinds.base import Answer, Kind
from omni_train.evaluation.kinds.choice import CHOICE, LIKELIHOOD
from omni_train.evaluation.kinds.grounding import GROUNDING
from omni_train.evaluation.kinds.labels import LABELS
from omni_train.evaluation.kinds.transcripts import CHARACTERS, WORDS
from omni_train.evaluation.kinds.translation import TRANSLATION
from omni_train.evaluation.kinds.vqa import ANLS, SOFT
from omni_train.evaluation.metrics import Metric, Normalizer

KINDS: dict[Metric, Kind] = {
    Metric.wer: WORDS,
    Metric.cer: CHARACTERS,
    Metric.bleu: TRANSLATION,
    Metric.exact_match: EXACT,
    Metric.relaxed_match: RELAXED,
    Metric.tempo: TEMPO,
    Metric.anls: ANLS,
    Metric.vqa: SOFT,
    Metric.choice: CHOICE,
    Metric.choice_likelihood: LIKELIHOOD,
    Metric.label: LABELS,
    Metric.grounding: GROUNDING,
    Metric.answered: ANSWERED,
}
_BOOTSTRAPS, _BOOTSTRAP_SEED = 1000, 0


@dataclass(frozen=True, slots=True)
class Score:
    """A figure.

    Args:
        value: of all replies together.
        low, high: its 95 % interval by the percentile bootstrap over samples.
        num_samples: replies.
    """

    value: float
    low: float
    high: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class Scored:
    """All figures of a task: of the whole set, of each of its groups, and each reply's own."""

    whole: Score
    groups: dict[str, Score]
    each: list[float]


def score(answers: Sequence[Answer], metric: Metric, normalizer: Normalizer) -> Scored:
    """Score a task's replies.

    Raises:
        DataError: `no_samples`; `empty_reference`, `bad_reference` or `no_options` with the key of
            a sample that cannot be scored.
    """
    if not answers:
        raise DataError("no_samples", "there is no reply to score")
    kind = KINDS[metric]
    counts = np.array([kind.counts(answer, normalizer) for answer in answers], dtype=np.float64)
    names = [answer.group for answer in answers]
    groups = {
        name: _score(kind, counts[[other == name for other in names]])
        for name in sorted(set(names) - {""})
    }
    return Scored(_score(kind, counts), groups, kind.value(counts).tolist())


def _score(kind: Kind, counts: np.ndarray) -> Score:
    number = len(counts)
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=_BOOTSTRAPS)
    low, high = np.percentile(kind.value(drawn @ counts), [2.5, 97.5])
    return Score(float(kind.value(counts.sum(0))), float(low), float(high), number)


def format_scores(scores: dict[str, tuple[Metric, Scored]]) -> str:
    """Return a table of tasks and their groups."""
    lines = [f"{'task':<28} {'metric':<18} {'value':>8}  {'95 % interval':<18} {'n':>6}"]
    for task, (metric, scored) in scores.items():
        rows = {task: scored.whole} | {f"  {name}": one for name, one in scored.groups.items()}
        for name, one in rows.items():
            interval = f"{one.low:.4f} .. {one.high:.4f}"
            lines.append(
                f"{name:<28} {metric.name:<18} {one.value:>8.4f}  {interval:<18} "
                f"{one.num_samples:>6}"
            )
    return "\n".join(lines)
