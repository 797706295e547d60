# SPDX-License-Identifier: Apache-2.0
"""Random faults against a whole job. ``make faults`` runs 50 seeds.

One seed again: ``make faults ARGS='-k random --fault-seed 17'``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.conftest import Disk, MakeJob
from tests.faults.random_faults import SITES, RandomFaults

KINDS = (
    "resumable", "at_least_once", "wandb offline", "rebuild", "wandb online",
    "idempotent", "buffered", "resumable", "rebuild", "at_least_once",
)  # fmt: skip
"""The backend beside ``jsonl`` and ``tensorboard``, by the last digit of the seed."""
SPOOL_BYTES = 4 << 20
"""Small enough for several segments in each stream."""


@pytest.fixture
def job_faults(make_job: MakeJob, request: pytest.FixtureRequest) -> Callable[[int], RandomFaults]:
    """Make a job with the backends of a seed, and the driver that breaks it."""

    def make(seed: int) -> RandomFaults:
        kind, _, mode = KINDS[seed % len(KINDS)].partition(" ")
        job = make_job({}, files=not mode, gate_s=4, deadline_s=6)
        job.spool_bytes = SPOOL_BYTES
        job.backends = {"jsonl": {}, "tensorboard": {}, kind: {}}
        if mode:
            online = job.wandb_server()  # offline as well, for the login that is not used
            job.backends["wandb"] = online if mode == "online" else {"mode": "offline"}
        else:
            job.backends[kind] = {"down_while": str(job.folder / "down")}
        disks: dict[str, Any] = {}
        if os.geteuid() == 0:
            make_disk: Callable[[Any, int], Disk] = request.getfixturevalue("make_disk")
            disks = {site: make_disk(job.spool(site).parent, 16384) for site in SITES}
            disks["server"] = make_disk(job.journal.parent, 65536)
        return RandomFaults(job, seed, disks)

    return make


def test_random_faults_lose_nothing_without_a_count(
    job_faults: Callable[[int], RandomFaults], fault_seed: int, fault_count: int
) -> None:
    faults = job_faults(fault_seed)
    print(f"random faults: seed {fault_seed}, {fault_count} faults; again: --fault-seed {fault_seed}")

    faults.run(fault_count)

    if (state := faults.job.wandb_state() if "base_url" in faults.job.backends.get("wandb", {}) else None) is not None:
        assert state["violations"] == []
