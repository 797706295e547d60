# SPDX-License-Identifier: Apache-2.0
"""From a log call to the backend over a channel that loses, doubles, refuses and falls silent: all, once, in order."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.unit.helpers import WAIT_S, assert_balanced, json_lines, new_spool, total
from tests.unit.rigs import FAST, SITE, Way, assert_all_arrived, log
from trackhub.delivery import exchange, wire
from trackhub.delivery.channel import ChannelError
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.retry import Backoff
from trackhub.delivery.sender import Sender
from trackhub.errors import SpoolError
from trackhub.run import RunStatus, Side
from trackhub.writer.writer import Writer


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "Backoff", lambda **_: Backoff(0.001, 0.02))


@pytest.fixture
def way(tmp_path: Path) -> Iterator[Way]:
    way = Way(tmp_path)
    yield way
    for sender in way.senders:
        sender.close(0.0)
    if not way.finished:
        way.finish(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_a_link_that_loses_requests_and_replies_and_doubles_both_loses_no_record(way: Way, seed: int) -> None:
    dice = random.Random(seed)

    def lose(request: wire.Request) -> None:
        if dice.random() < 0.3:
            raise ChannelError("lost on the way there")

    def lose_reply(request: wire.Request) -> None:
        if dice.random() < 0.1:
            way.receiver.handle(SITE, wire.encode(request))
        if dice.random() < 0.3:
            raise ChannelError("lost on the way back")

    way.before, way.after = lose, lose_reply
    sender = way.sender()
    threads = [threading.Thread(target=log, args=(way.spool, 700, key)) for key in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = sender.close(WAIT_S)
    report = way.finish()

    assert_all_arrived(way, counts, report, {"a": 700, "b": 700, "c": 700})
    assert report.sites[SITE].duplicates > 0
    assert report.sites[SITE].final


def test_a_batch_that_is_refused_is_counted_by_its_reason_and_the_next_goes_on(way: Way) -> None:
    def channel(data: bytes, timeout_s: float) -> bytes:
        request = wire.decode_request(data)
        if isinstance(request, wire.Batch) and request.first_seq == 50:
            return wire.encode(wire.Refused("not_wanted", "for the test"))
        return way.channel(data, timeout_s)

    log(way.spool, 150)
    counts = way.sender(channel).close(WAIT_S)
    way.finish()
    assert (counts.logged, counts.acked, counts.refused) == (150, 100, {"not_wanted": 50})
    assert total(counts) == 150
    assert [line["seq"] for line in way.stored()] == [*range(50), *range(100, 150)]


def test_a_receiver_that_refuses_the_site_altogether_gets_nothing_and_the_records_stay(way: Way) -> None:
    def channel(data: bytes, timeout_s: float) -> bytes:
        assert isinstance(wire.decode_request(data), wire.Hello)
        return wire.encode(wire.Refused("version", "too old"))

    log(way.spool, 10)
    sender = way.sender(channel)
    start = time.monotonic()
    sender.flush(0.3)
    assert not sender.flush(WAIT_S)
    counts = sender.close(0.5)
    assert time.monotonic() - start < 5
    assert (counts.logged, counts.spooled, counts.acked) == (10, 10, 0)


def test_a_silent_receiver_is_waited_for_once_until_it_answers_again(way: Way) -> None:
    silent = threading.Event()
    silent.set()

    def before(request: wire.Request) -> None:
        if silent.is_set():
            raise ChannelError("nobody there")

    way.before = before
    sender = way.sender()
    log(way.spool, 10)
    start = time.monotonic()
    assert not sender.flush(0.2)
    assert time.monotonic() - start >= 0.2
    start = time.monotonic()
    assert not any(sender.flush(WAIT_S) for _ in range(100))
    assert time.monotonic() - start < 1
    silent.clear()
    arrived = threading.Event()
    way.after = lambda request: arrived.set() if isinstance(request, wire.Batch) else None
    assert arrived.wait(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while not sender.flush(WAIT_S):
        assert time.monotonic() < deadline
    counts = sender.close(WAIT_S)
    assert_all_arrived(way, counts, way.finish(), {"a": 10})


def test_flush_returns_when_the_receiver_has_what_was_logged_before_it(way: Way) -> None:
    sender = way.sender()
    with Writer(way.spool) as writer:
        for i in range(20):
            writer.log({"a": i}, i)
            assert sender.flush(WAIT_S)
            assert way.receiver._journal is not None
            assert way.receiver._journal.report().sites[SITE].journaled == i + 1
            assert writer.flush(0.0)


def test_flush_does_not_wait_for_what_is_logged_after_it(way: Way) -> None:
    """As while another process of the site, or a thread with system metrics, logs as fast as it can."""
    stop, started, n = threading.Event(), threading.Event(), [0]

    def work() -> None:
        with Writer(way.spool) as writer:
            while not stop.wait(0.02):
                for _ in range(100):
                    writer.log({"a": n[0]}, n[0])
                    n[0] += 1
                started.set()

    def slow(request: wire.Request) -> None:
        stop.wait(0.03)  # for 50 records, so that the sender never catches up

    way.before = slow
    thread = threading.Thread(target=work)
    thread.start()
    try:
        sender = way.sender()
        assert started.wait(WAIT_S)
        for _ in range(3):
            before = n[0]
            assert sender.flush(WAIT_S)
            assert way.receiver._journal is not None
            assert way.receiver._journal.report().sites[SITE].journaled >= before
    finally:
        stop.set()
        thread.join()
    counts = sender.close(WAIT_S)
    assert_all_arrived(way, counts, way.finish(), {"a": n[0]})


def test_a_busy_receiver_is_asked_again(way: Way) -> None:
    busy = [5]

    def channel(data: bytes, timeout_s: float) -> bytes:
        if busy[0] and isinstance(wire.decode_request(data), wire.Batch):
            busy[0] -= 1
            return wire.encode(wire.Busy("the disk is full"))
        return way.channel(data, timeout_s)

    log(way.spool, 10)
    counts = way.sender(channel).close(WAIT_S)
    assert busy == [0]
    assert_all_arrived(way, counts, way.finish(), {"a": 10})


@pytest.mark.parametrize("reply", [b"", b"nonsense", b"\xc1", wire.encode(wire.Hello())])
def test_a_reply_that_makes_no_sense_is_as_none(way: Way, reply: bytes) -> None:
    odd = [3]

    def channel(data: bytes, timeout_s: float) -> bytes:
        if odd[0]:
            odd[0] -= 1
            return reply
        return way.channel(data, timeout_s)

    log(way.spool, 10)
    counts = way.sender(channel).close(WAIT_S)
    assert_all_arrived(way, counts, way.finish(), {"a": 10})


@pytest.mark.parametrize("error", [RuntimeError("cell is gone"), OSError("socket"), ValueError("x")], ids=repr)
def test_a_link_that_raises_anything_else_is_as_one_that_lost_the_request(way: Way, error: Exception) -> None:
    left = [3]

    def before(request: wire.Request) -> None:
        if left[0]:
            left[0] -= 1
            raise error

    way.before = before
    log(way.spool, 10)
    counts = way.sender().close(WAIT_S)
    assert_all_arrived(way, counts, way.finish(), {"a": 10})


def test_a_receiver_that_is_started_anew_on_its_journal_goes_on(way: Way) -> None:
    sender = way.sender()
    with Writer(way.spool) as writer:
        for i in range(400):
            writer.log({"a": i}, i)
            if i in (100, 200, 300):
                way.receiver.finish(RunStatus.ABORTED, deadline_s=5)  # in the middle of whatever the sender is at
                way.receiver = way.new_receiver()
    counts = sender.close(WAIT_S)
    assert_all_arrived(way, counts, way.finish(), {"a": 400})


def test_a_sender_that_is_started_anew_goes_on(way: Way) -> None:
    log(way.spool, 500)
    arrived = threading.Event()

    def after(request: wire.Request) -> None:
        if isinstance(request, wire.Batch) and request.first_seq >= 200:
            arrived.set()
            raise ChannelError("the reply is lost, and then the client dies")

    way.after = after
    first = way.sender()
    assert arrived.wait(WAIT_S)
    counts = first.close(0.1)
    assert counts.spooled > 0
    assert total(counts) == counts.logged == 500
    way.after = lambda request: None
    counts = way.sender().close(WAIT_S)
    report = way.finish()
    assert_all_arrived(way, counts, report, {"a": 500})
    assert report.sites[SITE].duplicates > 0


def test_close_ends_in_time_whatever_the_link_does(way: Way) -> None:
    def channel(data: bytes, timeout_s: float) -> bytes:
        threading.Event().wait(timeout_s)
        raise ChannelError("no answer")

    log(way.spool, 10)
    sender = way.sender(channel)
    start = time.monotonic()
    counts = sender.close(0.3)
    assert time.monotonic() - start < 8
    assert (counts.logged, counts.spooled) == (10, 10)


def test_close_ends_in_time_with_a_slow_link_that_answers_everything(way: Way) -> None:
    sent = 0

    def channel(data: bytes, timeout_s: float) -> bytes:
        nonlocal sent
        sent += 1
        threading.Event().wait(0.1)
        return way.channel(data, timeout_s)

    log(way.spool, 50 * 200)
    sender = way.sender(channel, start=False)
    sender.start()

    counts = sender.close(0.3)

    assert sent < 100
    assert counts.logged == counts.acked + counts.spooled == 10_000
    assert counts.spooled > 0


def test_a_sender_that_was_never_started_counts_what_is_there(way: Way) -> None:
    log(way.spool, 10)
    sender = way.sender(start=False)
    assert not sender.flush(WAIT_S)
    assert sender.close(WAIT_S).spooled == 10


def test_the_round_is_stamped_by_writers_from_the_moment_it_is_set(way: Way) -> None:
    sender = way.sender()
    with Writer(way.spool) as writer:
        for value in (None, 0, 3, None):
            sender.set_round(value)
            writer.log({"a": 0.0})
    sender.close(WAIT_S)
    way.finish()
    assert [line["round"] for line in way.stored()] == [None, 0, 3, None]


def test_signs_of_life_carry_the_count_while_nothing_is_logged(way: Way) -> None:
    seen = threading.Event()

    def after(request: wire.Request) -> None:
        if isinstance(request, wire.KeepAlive) and request.counts.acked == 5:
            assert request.counts.is_balanced()
            seen.set()

    way.after = after
    way.sender()
    log(way.spool, 5)
    assert seen.wait(WAIT_S)


def test_a_failed_site_says_so(way: Way) -> None:
    log(way.spool, 1)
    way.sender().close(WAIT_S, failed=True)
    final = [r for r in way.requests if isinstance(r, wire.Final)]
    assert [message.failed for message in final] == [True]
    assert final[0].counts.acked == 1


def test_a_folder_that_is_no_spool_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpoolError):
        Sender(tmp_path, lambda data, timeout_s: data)


def test_a_spool_that_is_taken_away_ends_no_job(way: Way) -> None:
    log(way.spool, 5)
    sender = way.sender()
    assert sender.flush(WAIT_S)
    way.spool.rename(way.spool.with_name("elsewhere"))
    start = time.monotonic()
    sender.close(0.5)
    assert time.monotonic() - start < 8


def test_two_receivers_of_one_site_each_get_everything(tmp_path: Path) -> None:
    spool = new_spool(tmp_path / "spool", "server", "client")
    receivers, senders = {}, {}
    for name in ("server", "client"):
        folder = tmp_path / name
        receivers[name] = Receiver(folder, job="j", side=Side(name), backends={"jsonl": {}}, limits=FAST)
        receivers[name].start()

        def channel(data: bytes, timeout_s: float, receiver: Receiver = receivers[name]) -> bytes:
            return receiver.handle(SITE, data)

        senders[name] = Sender(spool, channel, cursor=name, limits=FAST)
        senders[name].start()
    log(spool, 300)
    for name, sender in senders.items():
        counts = sender.close(WAIT_S)
        report = receivers[name].finish(RunStatus.FINISHED)
        assert (counts.logged, counts.acked) == (300, 300)
        assert_balanced(report, {SITE: 300}, {("jsonl", SITE): 300})
        lines = json_lines(tmp_path / name / "jsonl" / "j" / f"{SITE}.jsonl")
        assert [line["seq"] for line in lines] == list(range(300))


def test_every_record_of_a_trainer_that_is_killed_is_delivered(way: Way) -> None:
    code = """
        import os, sys
        from trackhub.writer.writer import Writer
        writer = Writer(sys.argv[1])
        i = 0
        while True:
            writer.log({"a": i}, i)
            os.write(1, b"%d\\n" % i)
            i += 1
    """
    sender = way.sender()
    command = [sys.executable, "-c", textwrap.dedent(code), str(way.spool)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        lines = [trainer.stdout.readline() for _ in range(2000)]
        trainer.kill()
        lines += trainer.stdout.readlines()
    returned = sum(line.endswith(b"\n") for line in lines)
    counts = sender.close(WAIT_S)
    report = way.finish()
    assert returned <= counts.logged <= returned + 1
    assert_all_arrived(way, counts, report, {"a": counts.logged})


def test_records_of_a_busy_trainer_travel_together_and_a_flush_does_not_wait(way: Way) -> None:
    with Writer(way.spool) as writer:
        sender = lingering(way, writer)
        for step in range(1, 11):
            writer.log({"loss": 0.0}, step)

        assert sender.flush(WAIT_S)

    assert [batch.records for batch in batches(way)] == [1, 10]


def test_enough_records_for_a_message_do_not_wait_for_more(way: Way) -> None:
    many = acked(way, 1000)
    with Writer(way.spool) as writer:
        lingering(way, writer)
        for step in range(1, 2001):
            writer.log({"loss": 0.0}, step)

        assert many.wait(WAIT_S)


def test_a_pass_sends_what_was_there_when_it_began_and_no_more(way: Way) -> None:
    """A trainer that logs as fast as messages travel must not be followed record by record."""
    way.limits = msgspec.structs.replace(FAST, linger_s=60)
    with Writer(way.spool) as writer:

        def log_meanwhile(request: wire.Request) -> None:
            if isinstance(request, wire.Batch):
                writer.log({"loss": 0.0}, len(way.requests))

        way.before = log_meanwhile
        writer.log({"loss": 0.0}, 0)
        first, sender = acked(way, 1), way.sender()
        assert first.wait(WAIT_S)
        assert sender.flush(WAIT_S)
        way.before = lambda request: None

    assert 2 <= len(batches(way)) <= 3


def lingering(way: Way, writer: Writer) -> Sender:
    """Return a sender that has just sent the writer's first record, and would send the next in a minute."""
    way.limits = msgspec.structs.replace(FAST, linger_s=60, batch_records=5000)
    sender, first = way.sender(), acked(way, 1)
    writer.log({"loss": 0.0}, 0)
    assert first.wait(WAIT_S)
    return sender


def batches(way: Way) -> list[wire.Batch]:
    return [request for request in way.requests if isinstance(request, wire.Batch)]


def acked(way: Way, seq: int) -> threading.Event:
    """Return an event that comes when the receiver has answered a batch that reaches so far."""
    event, after = threading.Event(), way.after

    def look(request: wire.Request) -> None:
        after(request)
        if isinstance(request, wire.Batch) and request.next_seq >= seq:
            event.set()

    way.after = look
    return event
