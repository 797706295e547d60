# SPDX-License-Identifier: Apache-2.0
"""A site that fills the receiver's disk leaves the last part of it to the others. Needs root, for a small disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.hostile_site import HONEST, HOSTILE, Job, batch, frame, record
from tests.unit.readers_and_bad_backends import STREAM, small_disk
from trackhub.delivery import blob_store, share_last_disk_room, wire
from trackhub.job_and_run_info import RunStatus
from trackhub.records import Kind

MB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(share_last_disk_room, "_RESERVE_SHARE", 0.25)
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


def test_a_site_that_stores_first_leaves_room_for_one_that_is_expected(disk: Path) -> None:
    job = Job(disk / "run")
    job.receiver.sites.expect([HONEST])

    taken = fill(job)

    assert 20 * MB < taken < 32 * MB
    for _ in range(50):
        job.log_honestly(100)
    job.finish()


def test_a_site_that_has_ended_keeps_no_room_for_itself(disk: Path) -> None:
    job = Job(disk / "run")
    job.receiver.sites.expect([HONEST])
    job.ask(wire.Final(wire.SiteCounts()), HONEST)

    assert fill(job) > 35 * MB
    job.receiver.finish(RunStatus.FINISHED, deadline_s=2)


def send_tiny_blobs(job: Job, most: int) -> tuple[int, wire.Reply]:
    """Send blobs of one byte that no record refers to, until one is turned away."""
    digest = hashlib.sha256(b"x").hexdigest()
    for number in range(most):
        reply = job.ask(wire.Chunk(f"{STREAM}-{number}", 1, digest, 0, b"x"))
        if not isinstance(reply, wire.Accepted):
            return number, reply
    return most, wire.Accepted()


def test_a_site_that_makes_many_files_leaves_inodes_for_the_others(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 200 * MB, inodes=1000) as disk:
        job = Job(disk / "run")
        job.log_honestly()

        taken, reply = send_tiny_blobs(job, 2000)

        assert isinstance(reply, wire.Busy)
        assert 900 < taken < 960  # the last 5 % are for the others
        digest = hashlib.sha256(b"x").hexdigest()
        assert job.ask(wire.Chunk(f"{STREAM}-0", 1, digest, 0, b"x"), HONEST) == wire.Accepted(1)
        job.log_honestly()
        job.finish()
        assert list(disk.glob("run/trackhub/blobs/*/*")) == []


def test_files_that_no_record_refers_to_are_limited_and_gone_after_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_store, "_MAX_UNNAMED", 10)
    job = Job(tmp_path / "run")
    job.log_honestly()

    taken, reply = send_tiny_blobs(job, 100)

    assert taken == 10
    assert isinstance(reply, wire.Busy)
    assert "no record refers to" in reply.detail
    assert job.ask(batch([artifact(0)])) == wire.Accepted()  # then there is room for one more
    assert send_tiny_blobs(job, 100)[0] == 11  # those that are there already are accepted again
    job.finish()
    assert [path.name for path in tmp_path.glob("run/trackhub/blobs/*/*")] == [f"{STREAM}-0"]


def artifact(seq: int) -> bytes:
    """Return the frame of an artifact of one byte."""
    reference = [f"{STREAM}-{seq}", 1, hashlib.sha256(b"x").hexdigest(), "text/plain"]
    return frame(Kind.ARTIFACT, record(seq, Kind.ARTIFACT, "file", reference, "file.txt", "file"))


def test_a_site_that_is_alone_may_use_all_of_the_disk(disk: Path) -> None:
    job = Job(disk / "run")
    assert fill(job) > 35 * MB
    job.receiver.finish(RunStatus.FINISHED, deadline_s=2)
