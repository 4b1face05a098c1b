"""Written answers about pictures: ANLS of DocVQA, and the soft accuracy of VQA and TextVQA.

ANLS (Biten et al., arXiv 1905.13648): one minus the edit distance over the longer text's length,
the best over the references; nothing at a distance of a half or more. Soft accuracy (Antol et al.,
arXiv 1505.00468): the share of three people who say the same, at most 1, averaged over leaving each
person out; the references are all people's answers, with repeats.
"""

from __future__ import annotations

import jiwer

from omni_train.evaluation.kinds.base import Answer, Kind
from omni_train.evaluation.metrics import Normalizer, normalize

_MAX_DISTANCE = 0.5
_AGREEING = 3


def _anls(answer: Answer, normalizer: Normalizer) -> list[float]:
    # Case counts for nothing, whatever else the normaliser keeps.
    said, *right = (
        normalize(text, normalizer).lower() for text in (answer.prediction, *answer.references)
    )
    return [max(_likeness(one, said) for one in right), 1.0]


def _likeness(right: str, said: str) -> float:
    if not right or not said:
        return float(right == said)
    edits = jiwer.process_characters(right, said)
    count = edits.substitutions + edits.deletions + edits.insertions
    distance = count / max(len(right), len(said))
    return 1 - distance if distance < _MAX_DISTANCE else 0.0


def _soft(answer: Answer, normalizer: Normalizer) -> list[float]:
    said = normalize(answer.prediction, normalizer)
    same = [normalize(r, normalizer) == said for r in answer.references]
    if len(same) == 1:
        return [float(same[0]), 1.0]
    shares = [min((sum(same) - one) / _AGREEING, 1.0) for one in same]
    return [sum(shares) / len(shares), 1.0]


ANLS = Kind(_anls)
SOFT = Kind(_soft)
