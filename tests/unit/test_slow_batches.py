# SPDX-License-Identifier: Apache-2.0
"""A batch that is too large for a slow channel is sent in parts: smaller after a timeout, larger again later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.slow_channel import SlowChannel
from tests.unit.readers_and_bad_backends import WAIT_S, assert_balanced
from tests.unit.rigs import SITE, SenderRig
from trackhub.delivery import wire
from trackhub.delivery.batch_size_and_timeout import BatchPace
from trackhub.delivery.channel import ChannelError
from trackhub.limits import Limits
from trackhub.writer.writer import Writer

LIMITS = Limits(
    poll_s=0.005, linger_s=0, keepalive_s=0.1, flush_s=0.01, request_s=0.25, silence_s=3, sites_s=WAIT_S, files_s=0.2
)
TEXT = 10_000


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[SenderRig]:
    rig = SenderRig(tmp_path, LIMITS)
    yield rig
    for sender in rig.senders:
        sender.close(0.0)
    if not rig.finished:
        rig.finish(1.0)


@pytest.fixture
def make_channel(rig: SenderRig) -> Iterator[Callable[[float], SlowChannel]]:
    """Make channels with a given rate in bytes per second."""
    channels: list[SlowChannel] = []

    def make(bytes_per_s: float) -> SlowChannel:
        channels.append(SlowChannel(lambda data: rig.channel(data, 0.0), bytes_per_s))
        return channels[-1]

    yield make
    for channel in channels:
        channel.is_cut = True
    for sender in rig.senders:
        sender.close(0.0)
    for channel in channels:
        channel.close()


def batches(rig: SenderRig) -> list[wire.Batch]:
    return [request for request in rig.requests if isinstance(request, wire.Batch)]


def test_large_texts_arrive_over_a_link_that_is_too_slow_for_their_batch(
    rig: SenderRig, make_channel: Callable[[float], SlowChannel]
) -> None:
    with Writer(rig.spool) as writer:
        for i in range(20):
            writer.log_text("note", f"{i} " * (TEXT // 2), i)

    counts = rig.sender(make_channel(300_000)).close(WAIT_S)
    report = rig.finish()

    assert (counts.logged, counts.acked, counts.spooled) == (20, 20, 0)
    assert_balanced(report, {SITE: 20}, {("jsonl", SITE): 20})
    assert [line["step"] for line in rig.stored()] == list(range(20))
    assert len(batches(rig)[0].frames) > 300_000 * LIMITS.request_s  # nothing but smaller batches could arrive


def test_a_single_text_that_takes_longer_than_a_request_arrives(
    rig: SenderRig, make_channel: Callable[[float], SlowChannel]
) -> None:
    with Writer(rig.spool) as writer:
        writer.log_text("note", "x" * 100_000, 0)
        writer.log({"a": 1.0}, 1)

    counts = rig.sender(make_channel(200_000)).close(WAIT_S)
    rig.finish()

    assert (counts.logged, counts.acked, counts.spooled) == (2, 2, 0)
    assert [line["step"] for line in rig.stored()] == [0, 1]


def test_after_a_receiver_was_silent_batches_are_as_large_as_before(rig: SenderRig) -> None:
    with Writer(rig.spool) as writer:
        for i in range(3000):
            writer.log({"a": float(i)}, i)
    silent = [4]

    def channel(data: bytes, timeout_s: float) -> bytes:
        if silent[0] and isinstance(wire.decode_request(data), wire.Batch):
            silent[0] -= 1
            rig.requests.append(wire.decode_request(data))
            never.wait(timeout_s)
            raise ChannelError("no reply")
        return rig.channel(data, timeout_s)

    never = threading.Event()
    counts = rig.sender(channel).close(WAIT_S)
    rig.finish()

    sizes = [batch.records for batch in batches(rig)]
    assert counts.acked == 3000
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] > sizes[4]
    assert max(sizes[5:]) == sizes[0] == 1000


def test_a_batch_becomes_smaller_down_to_one_record_and_larger_again() -> None:
    pace = BatchPace(1 << 20, 4.0, 30.0)
    for _ in range(30):
        pace.timed_out(pace.max_bytes, is_single=False)
    assert (pace.max_bytes, pace.wait_s) == (1, 4.0)
    for _ in range(30):
        pace.arrived(pace.max_bytes, 0.1)
    assert pace.max_bytes == 1 << 20


def test_slow_replies_that_come_in_time_do_not_make_batches_smaller() -> None:
    pace = BatchPace(1 << 20, 4.0, 30.0)
    pace.timed_out(1 << 20, is_single=False)
    for _ in range(30):
        pace.arrived(1 << 19, 3.9)
    assert pace.max_bytes == 1 << 19
    pace.arrived(1 << 19, 1.5)
    assert pace.max_bytes == (1 << 19) + (1 << 17)


@pytest.mark.parametrize(("size", "longest_s"), [(100, 4.0), (1 << 17, 8.0), (1 << 20, 30.0)])
def test_only_a_large_record_is_waited_for_longer(size: int, longest_s: float) -> None:
    pace = BatchPace(1 << 20, 4.0, 30.0)
    for _ in range(10):
        pace.timed_out(size, is_single=True)
    assert pace.wait_s == longest_s
    pace.arrived(size, 5.0)
    assert pace.wait_s == 4.0
