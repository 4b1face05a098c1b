"""How often a run will be interrupted, and how often it should save.

Young: sqrt(2 C M) seconds between saves, C what a save takes, M the mean time between failures of
the whole machine. Daly adds terms that matter where C is not small beside M (J. T. Daly, 2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Reliability:
    """What to expect of a run.

    Args:
        mtbf_hours: of the whole machine.
        interruptions: expected in the run's time.
        young_s, daly_s: best seconds between saves by either formula.
        lost_hours: work done again, restarts and saves, at Daly's interval.
    """

    mtbf_hours: float
    interruptions: float
    young_s: float
    daly_s: float
    lost_hours: float


def expect(
    *,
    hours: float,
    devices: int,
    mtbf_device_hours: float,
    save_s: float,
    restart_s: float,
) -> Reliability:
    """Return what a run of so many hours has to expect.

    Args:
        hours: of the run without interruption.
        devices: of which each fails once in `mtbf_device_hours` on average.
        save_s: seconds that a save stops the training.
        restart_s: seconds from a failure to the first new step.
    """
    mtbf_s = 3600.0 * mtbf_device_hours / devices
    young = math.sqrt(2.0 * save_s * mtbf_s)
    ratio = save_s / (2.0 * mtbf_s)
    daly = young * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - save_s if ratio < 1 else mtbf_s
    interruptions = 3600.0 * hours / mtbf_s
    saves = 3600.0 * hours / max(daly, 1e-9) * save_s
    lost = interruptions * (daly / 2.0 + restart_s) + saves
    return Reliability(
        mtbf_hours=mtbf_s / 3600.0,
        interruptions=interruptions,
        young_s=young,
        daly_s=daly,
        lost_hours=lost / 3600.0,
    )
