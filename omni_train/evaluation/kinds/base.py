"""What every kind of task gives: additive counts of one reply, and the figure of their sum.

Counts add up over replies, so a score over all of them, over a group of them and over a bootstrap's
resample is the same function of sums.

Letters: N replies, C counts of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from omni_train.evaluation.metrics import Normalizer

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply and what it should have been.

    Args:
        key: of the sample.
        references: texts that count as right; error rates and BLEU go by the first.
        prediction: the reply.
        options: of a closed question, all answers there are.
        group: part of the set that also gets a score of its own; may be empty.
    """

    key: str
    references: tuple[str, ...]
    prediction: str
    options: tuple[str, ...] = ()
    group: str = ""

    @property
    def reference(self) -> str:
        """The first right text."""
        return self.references[0]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of task.

    Args:
        counts: (reply, normaliser) -> its C counts.
        value: sums of counts [..., C] -> figures [...].
        likelihood: whether the most probable option is the reply, rather than what is generated.
    """

    counts: Callable[[Answer, Normalizer], list[float]]
    value: Callable[[Floats], Floats] = field(default=lambda sums: ratio(sums))
    likelihood: bool = False


def ratio(sums: Floats) -> Floats:
    """Return the first count over the second."""
    figures: Floats = sums[..., 0] / np.maximum(sums[..., 1], 1e-12)
    return figures


def right_of(right: bool) -> list[float]:
    """Return the counts of one question that is answered rightly or not."""
    return [float(right), 1.0]
