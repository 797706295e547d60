# SPDX-License-Identifier: Apache-2.0
"""A large backlog is delivered with flat memory: half of it is in a dead receiver's journal, half in the spool."""

from __future__ import annotations

import faulthandler
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import MakeJob
from tests.faults.independent_readers import count_confirmed, count_received
from tests.faults.process import Proc, wait_for

FEW, MANY = 100_000, 1_000_000
FLAT = 1.3
"""The most that the peak of memory may grow by for ten times the records."""
PATIENCE_S = 1800.0


def peak_kib(proc: Proc) -> int:
    """Return the most memory that a process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{proc.process.pid}/status").read_text())
    assert found is not None
    return int(found[1])


def steps(path: Path) -> Iterator[int]:
    with path.open() as lines:
        for line in lines:
            record = json.loads(line)
            if record["kind"] != "end":
                yield record["step"]


def deliver(make_job: MakeJob, calls: int) -> tuple[int, int]:
    """Deliver a backlog of so many records. Return the peaks of the receiver and of the sender that delivered it."""
    limits = {"batch_records": 1000, "batch_bytes": 1 << 20, "sites_s": PATIENCE_S, "deadline_s": PATIENCE_S}
    job = make_job({}, **limits)
    trainer = job.trainer(calls=calls, pause_s=0)
    assert trainer.wait(PATIENCE_S) == 0, trainer.log
    receiver, sender = job.receiver(), job.sender()
    wait_for(
        lambda: job.journal.exists() and count_received(job.journal) >= calls // 2, "half of the backlog", PATIENCE_S
    )
    receiver.kill()
    sender.kill()

    job.backends = {"jsonl": {}, "tensorboard": {}}
    receiver, sender = job.receiver(), job.sender()
    assert sender.ask(f"flush {PATIENCE_S:g}", PATIENCE_S) is True
    stored = job.folder / "server" / "jsonl" / "job-1" / "site-1.jsonl"
    settled = {"jsonl": calls, "tensorboard": calls}
    wait_for(lambda: count_confirmed(job.journal) == settled, "the delivery", PATIENCE_S)
    peaks = peak_kib(receiver), peak_kib(sender)
    job.end(sender, receiver)

    assert all(step == i for step, i in zip(steps(stored), range(calls), strict=True))
    return peaks


@pytest.mark.long
def test_a_million_records_after_a_restart_take_no_more_memory_than_a_few(make_job: MakeJob) -> None:
    faulthandler.cancel_dump_traceback_later()  # pytest's limit for one test is too short for this one
    few = deliver(make_job, FEW)
    many = deliver(make_job, MANY)

    print(f"peak of the receiver: {few[0]} KiB and {many[0]} KiB; of the sender: {few[1]} KiB and {many[1]} KiB")
    for less, more in zip(few, many, strict=True):
        assert more < FLAT * less
