# SPDX-License-Identifier: Apache-2.0
"""The random faults find bugs that are planted in the product: only so their silence says something."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.planted_bugs import install
from tests.faults.random_faults import RandomFaults

_PLANTED = {
    "confirm before write": (19, 39, 11, 21, 1, 31, 9, 41, 29, 49),  # the third backend is at_least_once
    "forget streams at restart": (1, 3, 2, 0),
    "free a segment one record early": (20, 40, 2, 10, 30, 0, 5, 8, 12),
}
"""Each bug, and the seeds that look for it, one after another until one of them finds it. The moments are not the same
each time, so that no seed finds its bug each time."""


def found(faults: RandomFaults, bug: str, fault_count: int) -> str:
    """Break a job that has a bug. Return what is wrong with it; an empty text if everything seems right."""
    install(bug, faults.job.folder / "plugins")
    faults.job.has_planted_bug = True
    try:
        faults.run(fault_count)
    except AssertionError as e:
        faults.job.close()
        print(f"{bug}, seed {faults.seed}: {e}")
        return f"seed {faults.seed}: {e}"
    return ""


def test_three_faults_find_a_receiver_that_acknowledges_too_early(job_faults: Callable[[int], RandomFaults]) -> None:
    assert found(job_faults(0), "acknowledge before commit", 3)


@pytest.mark.long
@pytest.mark.parametrize("bug", _PLANTED)
def test_random_faults_find_a_planted_bug(job_faults: Callable[[int], RandomFaults], bug: str) -> None:
    assert any(found(job_faults(seed), bug, 16) for seed in _PLANTED[bug])
