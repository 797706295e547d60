# SPDX-License-Identifier: Apache-2.0
"""A site that fills the receiver's disk leaves the last part of it to the others. Needs root, for a small disk."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.hostile_site import HONEST, HOSTILE, Job, batch, frame, record
from tests.unit.readers_and_bad_backends import STREAM, WAIT_S, small_disk
from trackhub.delivery import blob_store, share_last_disk_room, wire
from trackhub.delivery.lane.lane import Lane
from trackhub.delivery.report import DeliveryReport
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


def artifact(seq: int, data: bytes = b"x") -> bytes:
    """Return the frame of an artifact."""
    reference = [f"{STREAM}-{seq}", len(data), hashlib.sha256(data).hexdigest(), "text/plain"]
    return frame(Kind.ARTIFACT, record(seq, Kind.ARTIFACT, "file", reference, "file.txt", "file"))


def test_a_site_that_is_alone_may_use_all_of_the_disk(disk: Path) -> None:
    job = Job(disk / "run")
    assert fill(job) > 35 * MB
    job.receiver.finish(RunStatus.FINISHED, deadline_s=2)


@pytest.fixture
def flooded(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold all lanes until this event is set, as backends do that are away during a flood."""
    event, preflight = threading.Event(), Lane._preflight

    def wait_first(lane: Lane) -> None:
        assert event.wait(WAIT_S)
        preflight(lane)

    monkeypatch.setattr(Lane, "_preflight", wait_first)
    return event


def flood_with_files(job: Job, file_bytes: int) -> int:
    """Send files and their records until one is turned away. Return how many were taken."""
    for seq in range(2000):
        reply = send_file(job, seq, file_bytes)
        if not isinstance(reply, wire.Accepted):
            assert isinstance(reply, wire.Busy)
            return seq
    raise AssertionError("the disk has no end")


def send_file(job: Job, seq: int, file_bytes: int) -> wire.Reply:
    data = seq.to_bytes(8, "big") + os.urandom(file_bytes - 8)
    reply = job.ask(wire.Chunk(f"{STREAM}-{seq}", file_bytes, hashlib.sha256(data).hexdigest(), 0, data))
    return job.ask(batch([artifact(seq, data)], first=seq)) if isinstance(reply, wire.Accepted) else reply


@contextmanager
def least_free(disk: Path) -> Iterator[list[int]]:
    """Give a list that afterwards has the fewest free bytes and the fewest free inodes of this disk."""
    least = [1 << 62, 1 << 62]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            free = os.statvfs(disk)
            least[:] = min(least[0], free.f_bavail * free.f_frsize), min(least[1], free.f_favail)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield least
    finally:
        stop.set()
        thread.join()


def check_that_only_the_flood_waits(report: DeliveryReport) -> None:
    for runs in report.lanes.values():
        run = runs[HOSTILE]
        assert run.pending > 0, run
        assert run.rejected == {}
        assert run.possible_duplicates == 0  # the backend was not called
        assert "the backends' disk is nearly full" in (run.last_error or "")


@pytest.mark.parametrize(
    ("backends", "disk_mb", "deadline_s"),
    [
        pytest.param({"jsonl": {}, "tensorboard": {}}, 40, 8, id="quick"),
        pytest.param(
            {"jsonl": {}, "mlflow": {}, "tensorboard": {}, "wandb": {"mode": "offline"}}, 120, 60,
            id="all", marks=pytest.mark.long,
        ),
    ],
)  # fmt: skip
def test_the_lanes_stop_copying_a_flood_of_files_while_others_have_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flooded: threading.Event, backends: dict[str, dict[str, Any]],
    disk_mb: int, deadline_s: float,
) -> None:  # fmt: skip
    """Of a smaller disk, too little is left for the stores of four backends."""
    monkeypatch.setattr(share_last_disk_room, "_RESERVE_SHARE", 0.25)
    with small_disk(tmp_path / "disk", disk_mb * MB) as disk:
        job = Job(disk / "run", backends, flush_s=0.2, preflight_s=0.1)
        job.log_honestly()
        assert flood_with_files(job, MB // 8) > 150

        with least_free(disk) as least:
            flooded.set()
            for _ in range(20):
                job.log_honestly(100)
            report = job.finish(deadline_s)

        assert least[0] > 1 * MB
        check_that_only_the_flood_waits(report)


def test_the_lanes_leave_inodes_to_others_beside_a_flood_of_files(tmp_path: Path, flooded: threading.Event) -> None:
    with small_disk(tmp_path / "disk", 200 * MB, inodes=2000) as disk:
        job = Job(disk / "run", preflight_s=0.1)
        job.log_honestly()
        assert 1800 < flood_with_files(job, 8) < 1900

        with least_free(disk) as least:
            flooded.set()
            report = job.finish(5)

        assert least[1] >= 40
        check_that_only_the_flood_waits(report)


def test_the_lanes_copy_the_files_of_a_single_site_until_the_disk_is_full(disk: Path, flooded: threading.Event) -> None:
    job = Job(disk / "run", preflight_s=0.1)
    for seq in range(17):
        assert send_file(job, seq, MB) == wire.Accepted()
    flooded.set()

    report = job.receiver.finish(RunStatus.FINISHED, deadline_s=WAIT_S)

    assert report.lanes["jsonl"][HOSTILE].confirmed == 17
