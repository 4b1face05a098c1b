"""Normalisers: what they fold and how they differ."""

from __future__ import annotations

from omni_train.evaluation.metrics import Normalizer, normalize


def test_normalizers_differ_on_numbers() -> None:
    assert normalize("seven thousand", Normalizer.basic) == "seven thousand"
    assert normalize("seven thousand", Normalizer.english) == "7000"
