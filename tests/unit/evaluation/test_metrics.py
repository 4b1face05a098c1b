"""Scores: known error counts, and the traps of the library behind them."""

from __future__ import annotations

import pytest

from omni_train.config.errors import DataError
from omni_train.evaluation.metrics import Normalizer, exact_match, normalize, word_error_rate

BASIC = Normalizer.basic


def test_word_error_rate_counts_over_all_texts() -> None:
    references = ["apple banana", "garden"]
    assert word_error_rate(references, ["Apple, banana!", "garden"], BASIC) == 0.0
    assert word_error_rate(references, ["apple", "window"], BASIC) == pytest.approx(2 / 3)


def test_empty_reference_is_refused() -> None:
    with pytest.raises(DataError, match="empty_reference"):
        word_error_rate(["..."], ["apple"], BASIC)


def test_exact_match_folds_case_and_punctuation() -> None:
    assert exact_match(["a red circle", "a blue square"], ["A red circle.", "a"], BASIC) == 0.5


def test_normalizers_differ_on_numbers() -> None:
    assert normalize("seven thousand", BASIC) == "seven thousand"
    assert normalize("seven thousand", Normalizer.english) == "7000"
