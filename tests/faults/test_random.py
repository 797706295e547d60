# SPDX-License-Identifier: Apache-2.0
"""Random faults against a whole job. ``make faults`` runs 50 seeds.

One seed again: ``make faults ARGS='-k random --fault-seed 17'``.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.random_faults import RandomFaults


def test_random_faults_lose_nothing_without_a_count(
    job_faults: Callable[[int], RandomFaults], fault_seed: int, fault_count: int
) -> None:
    faults = job_faults(fault_seed)
    print(f"random faults: seed {fault_seed}, {fault_count} faults; again: --fault-seed {fault_seed}")

    faults.run(fault_count)

    if (state := faults.job.wandb_state() if "base_url" in faults.job.backends.get("wandb", {}) else None) is not None:
        assert state["violations"] == []
