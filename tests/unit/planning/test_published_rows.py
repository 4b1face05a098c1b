"""The estimate against published measurements, fitted on some and held to the others.

The bar: 10 % of the memory and 15 % of the time. What a framework holds beside weights and
activations, and how well its kernels are fused, is not published and differs by a factor of ten in
memory; one measured step of a system tells it. So there are two tables: with nothing but the
constants, errors as they are, row by row, beyond the bar where they are; and with the first row of
each system as its one measured step, where every other row must keep the bar, both ways round.
"""

from __future__ import annotations

import dataclasses

import pytest

from omni_train.planning.constants import Constants, Row, load_constants, load_rows
from omni_train.planning.fitting import apply, calibrate, fit, predicted_gb, predicted_rate

MEMORY_BAR, TIME_BAR = 0.10, 0.15
FITTED = ("matmul_efficiency", "attention_efficiency", "network_efficiency")
ROWS = {row.name: row for row in load_rows()}
# Error in per cent of tokens/s and of memory with the constants alone; None where not published.
UNCALIBRATED = {
    "veomni 8k, 128 devices": (0.3, -1.2),
    "veomni 16k, 128 devices": (-2.2, 1.3),
    "veomni 32k, 128 devices": (-3.6, -0.7),
    "veomni 64k, 128 devices": (-3.6, 2.0),
    "veomni 128k, 128 devices": (-0.6, -1.5),
    "veomni 8k, 128 devices, SP 4": (-2.7, None),
    "veomni 16k, 128 devices, SP 4": (4.9, None),
    "veomni 32k, 128 devices, SP 4": (4.4, None),
    "veomni 64k, 128 devices, SP 4": (2.1, None),
    "veomni 128k, 128 devices, SP 4": (1.6, None),
    "torchtitan_qwen 8k, 128 devices": (4.8, 48.3),
    "torchtitan_qwen 16k, 128 devices": (5.8, 28.3),
    "torchtitan_qwen 32k, 128 devices": (5.1, 16.0),
    "torchtitan_eager 16k, 8 devices": (33.3, 5.5),
    "torchtitan_eager 16k, 128 devices": (33.7, 6.3),
    "torchtitan_compiled 16k, 8 devices": (15.2, 12.9),
    "torchtitan_compiled 16k, 128 devices": (15.1, 14.7),
    "ms_swift 8k, 8 devices": (-5.8, 20.7),
    "ms_swift 8k, 8 devices, ZeRO 2": (-7.5, 13.3),
}


def rate_error(row: Row, constants: Constants, *, slowdown: float = 1.0) -> float:
    return predicted_rate(row, constants, slowdown=slowdown) / row.tokens_per_s - 1.0


def memory_error(row: Row, constants: Constants) -> float | None:
    return None if row.memory_gb is None else predicted_gb(row, constants) / row.memory_gb - 1.0


def split(name: str) -> list[Row]:
    return [row for row in ROWS.values() if row.split == name]


def test_the_file_holds_what_its_fit_rows_give() -> None:
    written = load_constants()
    again = fit(split("fit"), written)
    for name in FITTED:
        assert getattr(again, name) == pytest.approx(getattr(written, name), rel=2e-3), name
    assert again.work_bytes_per_width == pytest.approx(written.work_bytes_per_width, rel=2e-3)
    assert again.rest_bytes == pytest.approx(written.rest_bytes, rel=2e-3)


def test_the_fit_does_not_depend_on_where_it_starts() -> None:
    start = dataclasses.replace(
        load_constants(), matmul_efficiency=0.5, attention_efficiency=0.5, network_efficiency=0.4
    )
    again = fit(split("fit"), start)
    for name in FITTED:
        assert getattr(again, name) == pytest.approx(getattr(load_constants(), name), rel=0.02)


@pytest.mark.parametrize("name", ROWS)
def test_errors_without_any_step_of_the_system(name: str) -> None:
    """Row by row as they are: a change of the formulas for better or worse shows here."""
    speed, memory = UNCALIBRATED[name]
    assert 100 * rate_error(ROWS[name], load_constants()) == pytest.approx(speed, abs=0.2)
    found = memory_error(ROWS[name], load_constants())
    assert (None if found is None else 100 * found) == (
        None if memory is None else pytest.approx(memory, abs=0.2)
    )


@pytest.mark.parametrize(("fitted_on", "held_out"), [("fit", "hold_out"), ("hold_out", "fit")])
def test_one_measured_step_of_a_system_predicts_its_others(fitted_on: str, held_out: str) -> None:
    constants = fit(split(fitted_on), load_constants())
    first: dict[str, Row] = {}
    checked = 0
    for row in split(held_out):
        if first.setdefault(row.system, row) is row:
            continue
        known = calibrate(first[row.system], constants)
        speed = rate_error(row, constants, slowdown=known.slowdown)
        memory = memory_error(row, apply(known, constants))
        assert abs(1.0 / (1.0 + speed) - 1.0) <= TIME_BAR, f"{row.name}: {speed:+.1%}"
        assert memory is None or abs(memory) <= MEMORY_BAR, f"{row.name}: {memory:+.1%}"
        checked += 1
    assert checked == {"hold_out": 5, "fit": 9}[held_out]


def test_fit_rows_keep_the_bar_by_far() -> None:
    for row in split("fit"):
        assert abs(rate_error(row, load_constants())) < 0.06, row.name
        assert abs(memory_error(row, load_constants()) or 0.0) < 0.03, row.name
