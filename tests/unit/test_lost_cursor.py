# SPDX-License-Identifier: Apache-2.0
"""A sender whose cursor file is lost asks its receiver. Delivered records are neither lost nor sent again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import json_lines, new_spool
from tests.unit.rigs import FAST, SITE, SenderRig
from trackhub.delivery import sender as sender_module
from trackhub.delivery import wire
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import Counted
from trackhub.delivery.sender import Sender
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.spool.reading import SpoolReader
from trackhub.writer.writer import Writer

SMALL = 40_000
"""Bytes of a spool whose segments hold about a hundred records, so that acknowledged ones are deleted."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[SenderRig]:
    rig = SenderRig(tmp_path)
    rig.spool = new_spool(tmp_path / "site" / "small", max_bytes=SMALL)
    yield rig
    for sender in rig.senders:
        sender.close(0.0)
    if not rig.finished:
        rig.finish(1.0)


def deliver(rig: SenderRig, writer: Writer, first: int, n: int) -> None:
    """Log steps, and have a sender deliver them that then stops like a killed one: without a final message."""
    sender = rig.sender()
    for i in range(first, first + n):
        writer.log({"a": i}, i)
        if i % 50 == 0:
            assert sender.flush(20)  # so that the small spool never gets full
    assert sender.flush(20)
    stop(sender)


def stop(sender: Sender) -> None:
    sender._exchange.close_by(0.0)
    sender._thread.join(20)
    assert not sender._thread.is_alive()


def lose_cursor(spool: Path, how: str) -> None:
    files = [*spool.glob("*.ack"), *spool.glob("*.retired")]
    assert files
    for file in files:
        if how == "deleted":
            file.unlink()
        else:
            file.write_bytes(b"\0" * 20 if how == "damaged" else b"")


def steps(rig: SenderRig) -> list[int]:
    return [line["step"] for line in rig.stored()]


@pytest.mark.parametrize("how", ["deleted", "damaged", "empty"])
def test_a_lost_cursor_file_turns_no_delivered_record_into_a_lost_one(rig: SenderRig, how: str) -> None:
    with Writer(rig.spool) as writer:
        deliver(rig, writer, 0, 400)
        assert not (rig.spool / f"{writer._spool.stream}-000000.spool").exists()  # type: ignore[union-attr]
        lose_cursor(rig.spool, how)
        for i in range(400, 450):
            writer.log({"a": i}, i)
    rig.requests.clear()

    counts = rig.sender().close(20)
    report = rig.finish()

    assert (counts.logged, counts.acked, counts.spooled) == (450, 450, 0)
    assert (counts.dropped, counts.refused, counts.complete) == ({}, {}, True)
    assert steps(rig) == list(range(450))
    assert report.sites[SITE].counted is Counted.FINAL
    assert report.balanced
    assert report.sites[SITE].duplicates == 0
    assert sum(request.records for request in rig.requests if isinstance(request, wire.Batch)) == 50


def test_a_lost_cursor_file_costs_nothing_after_all_was_delivered(rig: SenderRig) -> None:
    with Writer(rig.spool) as writer:
        deliver(rig, writer, 0, 300)
    lose_cursor(rig.spool, "deleted")

    counts = rig.sender().close(20)
    report = rig.finish()

    assert (counts.logged, counts.acked, counts.dropped) == (300, 300, {})
    assert report.balanced
    assert report.lost() == 0


def test_the_cursors_of_many_streams_are_asked_for_in_parts(rig: SenderRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "MAX_STREAMS", 2)
    for i in range(5):
        with Writer(rig.spool) as writer:
            deliver(rig, writer, 10 * i, 10)
    lose_cursor(rig.spool, "deleted")
    rig.requests.clear()

    counts = rig.sender().close(20)

    asked = [request.streams for request in rig.requests if isinstance(request, wire.Hello)]
    assert [len(streams) for streams in asked] == [0, 2, 2, 1]
    assert (counts.logged, counts.acked, counts.dropped) == (50, 50, {})
    assert not [request for request in rig.requests if isinstance(request, wire.Batch)]


def test_what_a_receiver_of_another_job_has_is_not_taken_for_this_jobs(rig: SenderRig, tmp_path: Path) -> None:
    """A channel that leads to the wrong receiver must not make a site skip records."""
    with Writer(rig.spool) as writer:
        deliver(rig, writer, 0, 300)
    lose_cursor(rig.spool, "deleted")
    other = Receiver(tmp_path / "other", job=JobInfo("job-2"), side=Side.SERVER, backends={"jsonl": {}}, limits=FAST)
    other.start()

    counts = rig.sender(lambda data, timeout_s: other.handle(SITE, data)).close(20)
    report = other.finish(RunStatus.FINISHED, deadline_s=20)

    assert not counts.complete
    assert not report.balanced
    found = json_lines(tmp_path / "other" / "jsonl" / "job-2" / f"{SITE}.jsonl")
    assert [line["step"] for line in found] == list(range(300))[-len(found) :]


def test_a_stream_that_cannot_be_placed_holds_up_no_other(rig: SenderRig, monkeypatch: pytest.MonkeyPatch) -> None:
    with Writer(rig.spool) as first:
        deliver(rig, first, 0, 20)
    with Writer(rig.spool) as second:
        deliver(rig, second, 20, 20)
        lose_cursor(rig.spool, "deleted")
        second.log({"a": 40}, 40)
    assert first._spool is not None
    blocked = next(rig.spool.glob(f"{first._spool.stream}-*.spool"))
    block_reads(monkeypatch, blocked)

    counts = rig.sender().close(20)
    report = rig.finish()

    assert steps(rig) == list(range(41))
    assert (counts.logged, counts.acked, counts.unreadable, counts.dropped) == (41, 41, 0, {})
    assert report.balanced


def block_reads(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Have each open of this file fail, as for a file of another user. Root may read everything."""
    plain = os.open

    def refuse(file: Any, *arguments: Any, **options: Any) -> int:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(file, *arguments, **options)

    monkeypatch.setattr("trackhub.spool.stream_reader.os.open", refuse)


def test_the_counts_of_a_reader_that_cannot_ask_say_that_they_are_not_complete(rig: SenderRig) -> None:
    with Writer(rig.spool) as writer:
        deliver(rig, writer, 0, 300)
    lose_cursor(rig.spool, "deleted")

    (count,) = SpoolReader(rig.spool, "server").counts().values()

    assert not count.is_complete
