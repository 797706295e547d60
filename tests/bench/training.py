# SPDX-License-Identifier: Apache-2.0
"""What a training step takes while tracking goes wrong, against the same job without tracking."""

from __future__ import annotations

import statistics
from pathlib import Path

from tests.bench.figures import Arm, Experiment, Figure, Run
from tests.faults.training import BACKEND_FAULTS, HEALTHY, NONE, ROUNDS, SINK_FAULTS, Fault, all_at_once, steps_s, train

__all__ = ["experiments"]

_SITES = 2
_STEPS = 500  # of each site in each round; a step takes some 4 ms


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments: all faults of backends at once, and each fault of the receiver by itself."""
    faults = {
        "no fault": HEALTHY,
        f"{len(BACKEND_FAULTS)} faulty backends at once": all_at_once(BACKEND_FAULTS),
        **{f"a receiver: {fault.name}": fault for fault in SINK_FAULTS},
    }
    arms = {"none": _arm(NONE), **{name: _arm(fault) for name, fault in faults.items()}}
    figures = [
        Figure(
            f"a training step, {name}: {value}",
            "no tracking",
            f"{value}_ms",
            name,
            "none",
            "ms",
            "times less",
            0.95,
            "lanes, and the servers of faulty backends, run on the cores that also train",
        )
        for name in faults
        for value in ("median", "mean")
    ]
    return [Experiment("training under faults", arms, figures, repeat=1 if quick else 5)]


def _arm(fault: Fault) -> Arm:
    def run(folder: Path) -> Run:
        result = train(folder, fault, _STEPS)
        steps = steps_s(result)
        if result.rc != 0 or len(steps) != _SITES * ROUNDS * _STEPS:
            raise RuntimeError(f"the job failed; its log ends: {result.log[-500:]}")
        return Run({"median_ms": statistics.median(steps) * 1e3, "mean_ms": statistics.fmean(steps) * 1e3})

    return run
