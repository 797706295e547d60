# SPDX-License-Identifier: Apache-2.0
"""A site that fills the receiver's disk leaves the last part of it to the others. Needs root, for a small disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.hostile_site import HOSTILE, Job
from tests.unit.helpers import STREAM, small_disk
from trackhub.delivery import disk_room, wire
from trackhub.job_and_run_info import RunStatus

MB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(disk_room, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(disk_room, "_RESERVE_SHARE", 0.25)
    with small_disk(tmp_path / "disk", 40 * MB) as path:
        yield path


def fill(job: Job) -> int:
    """Send pieces of one blob until one is turned away. Return how many bytes were taken."""
    sent = 0
    for _ in range(200):
        reply = job.ask(wire.Chunk(f"{STREAM}-0", 1 << 40, "0" * 64, sent, bytes(MB)))
        if not isinstance(reply, wire.Accepted):
            assert isinstance(reply, wire.Busy)
            return sent
        sent = reply.next
    raise AssertionError("the disk has no end")


def test_a_site_that_fills_the_disk_leaves_room_for_the_records_of_others(disk: Path) -> None:
    job = Job(disk / "run")
    job.log_honestly()

    taken = fill(job)

    assert 20 * MB < taken < 32 * MB
    for _ in range(50):
        job.log_honestly(100)
    report = job.finish()
    assert HOSTILE not in report.sites or report.sites[HOSTILE].journaled == 0


def test_a_site_that_is_alone_may_use_all_of_the_disk(disk: Path) -> None:
    job = Job(disk / "run")
    assert fill(job) > 35 * MB
    job.receiver.finish(RunStatus.FINISHED, deadline_s=2)
