"""Translation: BLEU as sacrebleu computes it, of cased text, 0 to 100.

sacrebleu's tokens are those of 13a; with normalizer=chinese its Chinese ones. No text is folded.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from sacrebleu.metrics import BLEU

from omni_train.evaluation.kinds.base import Answer, Floats, Kind
from omni_train.evaluation.metrics import Normalizer

_ORDER = 4


@cache
def _bleu(normalizer: Normalizer) -> BLEU:
    return BLEU(tokenize="zh" if normalizer is Normalizer.chinese else "13a")


def _counts(answer: Answer, normalizer: Normalizer) -> list[float]:
    # Counts of one text alone add up to those of the set.
    found = _bleu(normalizer).corpus_score([answer.prediction], [[r] for r in answer.references])
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def _value(sums: Floats) -> Floats:
    rows = sums.reshape(-1, sums.shape[-1]).astype(int)
    scores = [
        BLEU.compute_bleu(
            row[:_ORDER].tolist(),
            row[_ORDER : 2 * _ORDER].tolist(),
            int(row[-2]),
            int(row[-1]),
            smooth_method="exp",
        ).score
        for row in rows
    ]
    return np.array(scores).reshape(sums.shape[:-1])


TRANSLATION = Kind(_counts, _value)
