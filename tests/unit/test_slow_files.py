# SPDX-License-Identifier: Apache-2.0
"""A large file on a slow channel holds up no metrics, goes on where it was, and is waited for while it progresses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.slow_channel import SlowChannel
from tests.unit.readers_and_bad_backends import WAIT_S, assert_balanced
from tests.unit.rigs import SITE, SenderRig
from trackhub.delivery import wire
from trackhub.delivery.channel import ChannelError
from trackhub.delivery.file_sender import Pace
from trackhub.delivery.job_sites import JobSites
from trackhub.delivery.replay_journal_or_spool import replay_spool
from trackhub.limits import Limits
from trackhub.writer.writer import Writer

SIZE = 900_000
LIMITS = Limits(
    poll_s=0.005, linger_s=0, keepalive_s=0.1, flush_s=0.01, request_s=0.5, silence_s=3, files_s=WAIT_S, sites_s=0.2
)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[SenderRig]:
    rig = SenderRig(tmp_path, LIMITS)
    yield rig
    for sender in rig.senders:
        sender.close(0.0)
    if not rig.finished:
        rig.finish(1.0)


@pytest.fixture
def channel(rig: SenderRig) -> Iterator[SlowChannel]:
    """A channel over which the file takes 3 s, and a timeout of 0.5 s."""
    channel = SlowChannel(lambda data: rig.channel(data, 0.0), 300_000)
    yield channel
    channel.is_cut = True
    for sender in rig.senders:
        sender.close(0.0)
    channel.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(os.urandom(SIZE))
    return path


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def confirmed(rig: SenderRig) -> int:
    assert rig.receiver._journal is not None
    report = rig.receiver._journal.report(["jsonl"])
    assert report.adds_up
    run = report.lanes["jsonl"].get(SITE)
    return run.confirmed if run else 0


def chunks(rig: SenderRig) -> list[wire.Chunk]:
    return [request for request in rig.requests if isinstance(request, wire.Chunk)]


def stored_file(rig: SenderRig) -> bytes:
    (line,) = (line for line in rig.stored() if "file" in line)
    path: Path = rig.folder / "receiver" / "jsonl" / "job-1" / line["file"]
    return path.read_bytes()


def metrics(rig: SenderRig) -> list[Any]:
    return [line["values"]["a"] for line in rig.stored() if "values" in line]


def test_metrics_are_confirmed_while_a_file_is_on_its_way(rig: SenderRig, channel: SlowChannel, model: Path) -> None:
    writer = Writer(rig.spool)
    for i in range(5):
        writer.log({"a": i}, i)
    writer.log_artifact(model)
    for i in range(5, 10):
        writer.log({"a": i}, i)
    sender = rig.sender(channel)
    wait_until(lambda: confirmed(rig) == 10)
    wait_until(lambda: bool(chunks(rig)))
    writer.log({"a": 10}, 10)
    assert sender.flush(WAIT_S)
    wait_until(lambda: sender.counts().acked == 11)
    during = sender.counts()
    whole = chunks(rig)[-1].offset + len(chunks(rig)[-1].data) == SIZE
    writer.close()
    counts = sender.close(0.1)
    report = rig.finish()

    assert not whole
    assert (during.logged, during.acked, during.spooled) == (12, 11, 1)
    assert (counts.logged, counts.acked, counts.spooled) == (12, 12, 0)
    assert_balanced(report, {SITE: 12}, {("jsonl", SITE): 12})
    assert metrics(rig) == list(range(11))
    assert stored_file(rig) == model.read_bytes()


def test_the_receiver_waits_for_a_site_whose_file_progresses(rig: SenderRig, channel: SlowChannel, model: Path) -> None:
    with Writer(rig.spool) as writer:
        writer.log_artifact(model)
    sender = rig.sender(channel)
    wait_until(lambda: len(chunks(rig)) > 1)
    ending = threading.Thread(target=sender.close, args=(0.1,))
    ending.start()
    missing = rig.receiver.wait_for_sites([SITE])
    ending.join()
    report = rig.finish()

    assert missing == set()
    assert_balanced(report, {SITE: 1}, {("jsonl", SITE): 1})


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_file_goes_on_where_it_was_after_a_restart(
    rig: SenderRig, channel: SlowChannel, model: Path, who: str
) -> None:
    with Writer(rig.spool) as writer:
        writer.log_artifact(model)
    sender = rig.sender(channel)
    wait_until(lambda: sum(len(chunk.data) for chunk in chunks(rig)) > SIZE // 2)
    if who == "sender":
        channel.is_cut = True
        sender.close(0.0)
        channel.is_cut = False
        sender = rig.sender(channel)
    else:
        rig.receiver._blobs.delete_unused = lambda: None  # type: ignore[method-assign]  # it is killed
        rig.receiver.finish(rig.receiver.sites.status(SITE, "finished", was_killed=False), deadline_s=0.0)  # type: ignore[arg-type]
        rig.receiver = rig.new_receiver()
    counts = sender.close(WAIT_S)
    rig.finish()

    sent = sum(len(chunk.data) for chunk in chunks(rig))
    assert (counts.acked, counts.spooled) == (1, 0)
    assert stored_file(rig) == model.read_bytes()
    assert sent < SIZE * 1.5


def test_a_file_that_never_arrives_is_counted_and_a_replay_delivers_it(
    rig: SenderRig, channel: SlowChannel, model: Path
) -> None:
    with Writer(rig.spool) as writer:
        writer.log_artifact(model)
        writer.log({"a": 0}, 0)
    sender = rig.sender(channel)
    wait_until(lambda: len(chunks(rig)) > 1)
    channel.is_cut = True
    started = time.monotonic()
    counts = sender.close(0.2)
    took_s = time.monotonic() - started
    first = rig.finish()
    rest = rig.sender(start=False).counts()
    journal = rig.receiver.folder / "trackhub.db"
    report = replay_spool(rig.spool, cursor="server", journal=journal)

    assert (counts.logged, counts.acked, counts.spooled) == (2, 1, 1)
    assert took_s < 5
    assert first.sites[SITE].journaled == 1
    assert first.lanes["jsonl"][SITE].confirmed == 1
    assert rest.spooled == 0
    assert report is not None
    assert report.is_complete()
    assert report.lanes["jsonl"][SITE].confirmed == 2
    assert stored_file(rig) == model.read_bytes()


def test_many_small_files_and_metrics_arrive_in_the_order_of_their_kind(rig: SenderRig, tmp_path: Path) -> None:
    with Writer(rig.spool) as writer:
        for i in range(100):
            (tmp_path / "x").write_bytes(b"%d" % i)
            writer.log_artifact(tmp_path / "x", f"x{i}")
            writer.log({"a": i}, i)
        lost = [3]

        def after(request: wire.Request) -> None:
            if isinstance(request, wire.Chunk | wire.Batch) and lost[0]:
                lost[0] -= 1
                raise ChannelError("the reply is lost")

        rig.after = after
    counts = rig.sender().close(WAIT_S)
    rig.finish()

    batches = sum(isinstance(request, wire.Batch) for request in rig.requests)
    assert (counts.acked, counts.spooled) == (200, 0)
    assert metrics(rig) == list(range(100))
    assert [line["key"] for line in rig.stored() if "file" in line] == [f"x{i}" for i in range(100)]
    assert batches < 30


def test_the_size_of_a_piece_follows_the_rate_of_the_link() -> None:
    pace = Pace(1 << 20, 3.5)
    sizes = [pace.piece_bytes]
    for _ in range(20):
        pace.arrived(pace.piece_bytes, pace.piece_bytes / 300_000)
        sizes.append(pace.piece_bytes)
    assert sizes[0] == 64 << 10
    assert sizes[-1] == pytest.approx(300_000, rel=0.01)
    for _ in range(20):
        pace.arrived(pace.piece_bytes, 1e-3)
    assert pace.piece_bytes == 1 << 20
    for _ in range(20):
        pace.timed_out()
    assert pace.piece_bytes == 16 << 10


def test_a_site_whose_file_has_stopped_is_not_waited_for_any_longer() -> None:
    sites = JobSites(0.3)
    sites.note_heard("a")
    sites.note_progress("a")
    heard = threading.Event()

    def chatter() -> None:
        while not heard.wait(0.05):
            sites.note_heard("a")

    thread = threading.Thread(target=chatter)
    thread.start()
    started = time.monotonic()
    missing = sites.wait(["a"], 0.05, 60.0)
    took_s = time.monotonic() - started
    heard.set()
    thread.join()

    assert missing == {"a"}
    assert 0.2 < took_s < 5
