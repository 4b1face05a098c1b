"""Fits the constants to measured steps: to published rows, and to a run of one's own.

The three efficiencies and the working-set coefficient are common to all systems. What differs from
one to the next without being published (how much memory a framework holds, how well its kernels
are fused) takes one measured step: `calibrate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omni_train.planning.constants import Constants, Row
from omni_train.planning.memory import estimate_memory
from omni_train.planning.speed import estimate_step

_EFFICIENCIES = ("matmul_efficiency", "attention_efficiency", "network_efficiency")
# Rows of one kind cannot tell the three apart; so far they may then leave where they started.
_PRIOR_WEIGHT = 0.1
_ROUNDS = 50
_FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one measured step of a system says beyond the constants.

    Args:
        slowdown: its seconds over the estimate.
        rest_bytes: memory beyond the formulas; None where none was measured.
    """

    slowdown: float
    rest_bytes: float | None


def predicted_rate(row: Row, constants: Constants, *, slowdown: float = 1.0) -> float:
    """Return tokens per second and device."""
    step = estimate_step(row.setup, row.hardware, constants, slowdown=slowdown)
    return row.setup.tokens_per_device * row.setup.micro_steps / step.total


def predicted_gb(row: Row, constants: Constants) -> float:
    """Return the peak memory of a device in 1e9 bytes."""
    return estimate_memory(row.setup, constants).total / 1e9


def fit(rows: Sequence[Row], start: Constants) -> Constants:
    """Return `start` with the fitted values replaced: least squares of relative errors."""
    fitted = _fit_speed(rows, start)
    return _fit_memory([row for row in rows if row.memory_gb is not None], fitted)


def calibrate(row: Row, constants: Constants) -> Calibration:
    """Return what one row of a system tells of it."""
    rest = None
    if row.memory_gb is not None:
        rest = constants.rest_bytes + 1e9 * (row.memory_gb - predicted_gb(row, constants))
    return Calibration(predicted_rate(row, constants) / row.tokens_per_s, rest)


def apply(calibration: Calibration, constants: Constants) -> Constants:
    """Return the constants with the calibrated rest; the slowdown is given to `estimate_step`."""
    if calibration.rest_bytes is None:
        return constants
    return dataclasses.replace(constants, rest_bytes=calibration.rest_bytes)


def _fit_speed(rows: Sequence[Row], start: Constants) -> Constants:
    """Gauss-Newton on the logarithms, held near `start` by a weak prior."""
    origin = np.log([getattr(start, name) for name in _EFFICIENCIES])

    def constants_at(point: _FloatArray) -> Constants:
        values = dict(zip(_EFFICIENCIES, np.exp(point).tolist(), strict=True))
        return dataclasses.replace(start, **values)

    def errors(point: _FloatArray) -> _FloatArray:
        constants = constants_at(point)
        misses = [np.log(predicted_rate(row, constants) / row.tokens_per_s) for row in rows]
        return np.array([*misses, *(_PRIOR_WEIGHT * (point - origin))])

    return constants_at(_minimise(errors, origin))


def _minimise(errors: Callable[[_FloatArray], _FloatArray], start: _FloatArray) -> _FloatArray:
    point, small = start.copy(), 1e-4
    for _ in range(_ROUNDS):
        here = errors(point)
        columns = [(errors(point + small * axis) - here) / small for axis in np.eye(len(point))]
        point = point + np.clip(np.linalg.lstsq(np.array(columns).T, -here)[0], -0.3, 0.3)
    return point


def _fit_memory(rows: Sequence[Row], start: Constants) -> Constants:
    """Linear least squares of relative errors: one coefficient, and one rest for each system."""
    systems = sorted({row.system for row in rows})
    bare = dataclasses.replace(start, work_bytes_per_width=0.0, rest_bytes=0.0)
    left, right = [], []
    for row in rows:
        assert row.memory_gb is not None, row.name
        size = 1e9 * row.memory_gb
        tokens_by_width = row.setup.tokens_per_device * row.setup.decoders[0].shape.width
        own = [float(row.system == system) for system in systems]
        left.append([tokens_by_width / size, *(value * 1e9 / size for value in own)])
        right.append(1.0 - 1e9 * predicted_gb(row, bare) / size)
    solution = np.linalg.lstsq(np.array(left), np.array(right))[0].tolist()
    # Of several systems the greediest is the safe assumption.
    rest = 1e9 * max(solution[1:])
    return dataclasses.replace(start, work_bytes_per_width=solution[0], rest_bytes=rest)
