# SPDX-License-Identifier: Apache-2.0
"""A sender delivers each record once and in order, over a channel that loses, doubles, refuses and falls silent."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import msgspec
import pytest

from tests.unit.readers_and_bad_backends import WAIT_S, assert_balanced, json_lines, new_spool, total
from tests.unit.rigs import FAST, SITE, SenderRig, assert_all_arrived, log
from trackhub.delivery import wire
from trackhub.delivery.channel import ChannelError
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.sender import Sender
from trackhub.errors import SpoolError
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.runnable_commands import command_for
from trackhub.writer.writer import Writer


@pytest.mark.parametrize("seed", range(3))
def test_no_record_is_lost_on_a_channel_that_loses_and_doubles_messages(rig: SenderRig, seed: int) -> None:
    dice = random.Random(seed)

    def lose(request: wire.Request) -> None:
        if dice.random() < 0.3:
            raise ChannelError("the request is lost")

    def lose_reply(request: wire.Request) -> None:
        if dice.random() < 0.1:
            rig.receiver.handle(SITE, wire.encode(request))
        if dice.random() < 0.3:
            raise ChannelError("the reply is lost")

    rig.before, rig.after = lose, lose_reply
    sender = rig.sender()
    threads = [threading.Thread(target=log, args=(rig.spool, 700, key)) for key in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = sender.close(WAIT_S)
    report = rig.finish()

    assert_all_arrived(rig, counts, report, {"a": 700, "b": 700, "c": 700})
    assert report.sites[SITE].duplicates > 0
    assert report.sites[SITE].final


def test_requests_that_had_to_be_sent_again_are_counted(rig: SenderRig) -> None:
    lost = iter([True, True, False])  # of each request: the first two attempts
    attempts: list[bytes] = []

    def channel(data: bytes, timeout_s: float) -> bytes:
        if not isinstance(wire.decode_request(data), wire.Batch):
            return rig.channel(data, timeout_s)
        attempts.append(data)
        if next(lost, False):
            raise ChannelError("lost") if len(attempts) == 1 else TimeoutError
        return rig.channel(data, timeout_s)

    log(rig.spool, 10)
    counts = rig.sender(channel).close(WAIT_S)
    report = rig.finish()

    assert len(attempts) == 3
    assert counts.retries == 2
    assert report.sites[SITE].at_site == counts


def test_a_refused_batch_is_counted_by_reason_and_the_next_one_is_sent(rig: SenderRig) -> None:
    def channel(data: bytes, timeout_s: float) -> bytes:
        request = wire.decode_request(data)
        if isinstance(request, wire.Batch) and request.first_seq == 50:
            return wire.encode(wire.Refused("not_wanted", "for the test"))
        return rig.channel(data, timeout_s)

    log(rig.spool, 150)
    counts = rig.sender(channel).close(WAIT_S)
    rig.finish()
    assert (counts.logged, counts.acked, counts.refused) == (150, 100, {"not_wanted": 50})
    assert total(counts) == 150
    assert [line["seq"] for line in rig.stored()] == [*range(50), *range(100, 150)]


def test_the_records_stay_in_the_spool_when_the_receiver_refuses_the_site(rig: SenderRig) -> None:
    def channel(data: bytes, timeout_s: float) -> bytes:
        assert isinstance(wire.decode_request(data), wire.Hello)
        return wire.encode(wire.Refused("version", "too old"))

    log(rig.spool, 10)
    sender = rig.sender(channel)
    start = time.monotonic()
    sender.flush(0.3)
    assert not sender.flush(WAIT_S)
    counts = sender.close(0.5)
    assert time.monotonic() - start < 5
    assert (counts.logged, counts.spooled, counts.acked) == (10, 10, 0)


def test_what_a_receiver_says_reaches_no_terminal_as_a_command(
    rig: SenderRig, caplog: pytest.LogCaptureFixture
) -> None:
    def channel(data: bytes, timeout_s: float) -> bytes:
        return wire.encode(wire.Refused("version", "too\x1b[2J old\nfake line"))

    log(rig.spool, 10)
    rig.sender(channel).close(0.5)

    assert "too\\x1b[2J old\\nfake line" in caplog.text
    assert "\x1b" not in caplog.text


def test_flush_waits_for_a_silent_receiver_once_until_it_replies_again(rig: SenderRig) -> None:
    silent = threading.Event()
    silent.set()

    def before(request: wire.Request) -> None:
        if silent.is_set():
            raise ChannelError("the receiver is silent")

    rig.before = before
    sender = rig.sender()
    log(rig.spool, 10)
    start = time.monotonic()
    assert not sender.flush(0.2)
    assert time.monotonic() - start >= 0.2
    start = time.monotonic()
    assert not any(sender.flush(WAIT_S) for _ in range(100))
    assert time.monotonic() - start < 1
    silent.clear()
    arrived = threading.Event()
    rig.after = lambda request: arrived.set() if isinstance(request, wire.Batch) else None
    assert arrived.wait(WAIT_S)
    deadline = time.monotonic() + WAIT_S
    while not sender.flush(WAIT_S):
        assert time.monotonic() < deadline
    counts = sender.close(WAIT_S)
    assert_all_arrived(rig, counts, rig.finish(), {"a": 10})


def test_flush_returns_when_the_receiver_has_what_was_logged_before_it(rig: SenderRig) -> None:
    sender = rig.sender()
    with Writer(rig.spool) as writer:
        for i in range(20):
            writer.log({"a": i}, i)
            assert sender.flush(WAIT_S)
            assert rig.receiver._journal is not None
            assert rig.receiver._journal.report().sites[SITE].journaled == i + 1
            assert writer.flush(0.0)


def test_flush_does_not_wait_for_what_is_logged_after_it(rig: SenderRig) -> None:
    """Another process of the site may log all the time, for example system metrics."""
    stop, started, n = threading.Event(), threading.Event(), [0]

    def work() -> None:
        with Writer(rig.spool) as writer:
            while not stop.wait(0.02):
                for _ in range(100):
                    writer.log({"a": n[0]}, n[0])
                    n[0] += 1
                started.set()

    def slow(request: wire.Request) -> None:
        stop.wait(0.03)  # per batch of 50 records, so that the sender never catches up

    rig.before = slow
    thread = threading.Thread(target=work)
    thread.start()
    try:
        sender = rig.sender()
        assert started.wait(WAIT_S)
        for _ in range(3):
            before = n[0]
            assert sender.flush(WAIT_S)
            assert rig.receiver._journal is not None
            assert rig.receiver._journal.report().sites[SITE].journaled >= before
    finally:
        stop.set()
        thread.join()
    counts = sender.close(WAIT_S)
    assert_all_arrived(rig, counts, rig.finish(), {"a": n[0]})


def test_a_request_is_repeated_while_the_receiver_is_busy(rig: SenderRig) -> None:
    busy = [5]

    def channel(data: bytes, timeout_s: float) -> bytes:
        if busy[0] and isinstance(wire.decode_request(data), wire.Batch):
            busy[0] -= 1
            return wire.encode(wire.Busy("the disk is full"))
        return rig.channel(data, timeout_s)

    log(rig.spool, 10)
    counts = rig.sender(channel).close(WAIT_S)
    assert busy == [0]
    assert_all_arrived(rig, counts, rig.finish(), {"a": 10})


@pytest.mark.parametrize("reply", [b"", b"nonsense", b"\xc1", wire.encode(wire.Hello())])
def test_a_request_is_repeated_after_a_reply_that_cannot_be_decoded(rig: SenderRig, reply: bytes) -> None:
    odd = [3]

    def channel(data: bytes, timeout_s: float) -> bytes:
        if odd[0]:
            odd[0] -= 1
            return reply
        return rig.channel(data, timeout_s)

    log(rig.spool, 10)
    counts = rig.sender(channel).close(WAIT_S)
    assert_all_arrived(rig, counts, rig.finish(), {"a": 10})


@pytest.mark.parametrize("error", [RuntimeError("cell is gone"), OSError("socket"), ValueError("x")], ids=repr)
def test_a_request_is_repeated_whatever_error_the_channel_raises(rig: SenderRig, error: Exception) -> None:
    left = [3]

    def before(request: wire.Request) -> None:
        if left[0]:
            left[0] -= 1
            raise error

    rig.before = before
    log(rig.spool, 10)
    counts = rig.sender().close(WAIT_S)
    assert_all_arrived(rig, counts, rig.finish(), {"a": 10})


def test_a_receiver_that_is_restarted_on_its_journal_goes_on(rig: SenderRig) -> None:
    sender = rig.sender()
    with Writer(rig.spool) as writer:
        for i in range(400):
            writer.log({"a": i}, i)
            if i in (100, 200, 300):
                rig.receiver.finish(RunStatus.ABORTED, deadline_s=5)  # while the sender is sending
                rig.receiver = rig.new_receiver()
    counts = sender.close(WAIT_S)
    assert_all_arrived(rig, counts, rig.finish(), {"a": 400})


def test_a_sender_that_is_restarted_on_its_spool_goes_on(rig: SenderRig) -> None:
    log(rig.spool, 500)
    arrived = threading.Event()

    def after(request: wire.Request) -> None:
        if isinstance(request, wire.Batch) and request.first_seq >= 200:
            arrived.set()
            raise ChannelError("the reply is lost, and then the sender is closed")

    rig.after = after
    first = rig.sender()
    assert arrived.wait(WAIT_S)
    counts = first.close(0.1)
    assert counts.spooled > 0
    assert total(counts) == counts.logged == 500
    rig.after = lambda request: None
    counts = rig.sender().close(WAIT_S)
    report = rig.finish()
    assert_all_arrived(rig, counts, report, {"a": 500})
    assert report.sites[SITE].duplicates > 0


def test_close_ends_in_time_on_a_channel_that_never_replies(rig: SenderRig) -> None:
    def channel(data: bytes, timeout_s: float) -> bytes:
        threading.Event().wait(timeout_s)
        raise ChannelError("no answer")

    log(rig.spool, 10)
    sender = rig.sender(channel)
    start = time.monotonic()
    counts = sender.close(0.3)
    assert time.monotonic() - start < 8
    assert (counts.logged, counts.spooled) == (10, 10)


def test_close_ends_in_time_on_a_slow_channel_that_brings_every_reply(rig: SenderRig) -> None:
    sent = 0

    def channel(data: bytes, timeout_s: float) -> bytes:
        nonlocal sent
        sent += 1
        threading.Event().wait(0.1)
        return rig.channel(data, timeout_s)

    log(rig.spool, 50 * 200)
    sender = rig.sender(channel, start=False)
    sender.start()

    counts = sender.close(0.3)

    assert sent < 100
    assert counts.logged == counts.acked + counts.spooled == 10_000
    assert counts.spooled > 0


def test_a_sender_that_was_never_started_counts_what_is_in_the_spool(rig: SenderRig) -> None:
    log(rig.spool, 10)
    sender = rig.sender(start=False)
    assert not sender.flush(WAIT_S)
    assert sender.close(WAIT_S).spooled == 10


def test_writers_put_the_round_on_records_from_the_moment_it_is_set(rig: SenderRig) -> None:
    sender = rig.sender()
    with Writer(rig.spool) as writer:
        for value in (None, 0, 3, None):
            sender.set_round(value)
            writer.log({"a": 0.0})
    sender.close(WAIT_S)
    rig.finish()
    assert [line["round"] for line in rig.stored()] == [None, 0, 3, None]


def test_keep_alives_carry_the_counts_while_nothing_is_logged(rig: SenderRig) -> None:
    seen = threading.Event()

    def after(request: wire.Request) -> None:
        if isinstance(request, wire.KeepAlive) and request.counts.acked == 5:
            assert request.counts.is_balanced()
            seen.set()

    rig.after = after
    rig.sender()
    log(rig.spool, 5)
    assert seen.wait(WAIT_S)


def test_the_final_message_says_that_the_training_failed(rig: SenderRig) -> None:
    log(rig.spool, 1)
    rig.sender().close(WAIT_S, failed=True)
    final = [r for r in rig.requests if isinstance(r, wire.Final)]
    assert [message.failed for message in final] == [True]
    assert final[0].counts.acked == 1


def test_a_folder_that_is_no_spool_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpoolError):
        Sender(tmp_path, lambda data, timeout_s: data)


def test_a_sender_whose_spool_folder_disappears_closes_without_an_error(rig: SenderRig) -> None:
    log(rig.spool, 5)
    sender = rig.sender()
    assert sender.flush(WAIT_S)
    rig.spool.rename(rig.spool.with_name("elsewhere"))
    start = time.monotonic()
    sender.close(0.5)
    assert time.monotonic() - start < 8


def test_two_receivers_of_one_site_each_get_everything(tmp_path: Path) -> None:
    spool = new_spool(tmp_path / "spool", "server", "client")
    receivers, senders = {}, {}
    for name in ("server", "client"):
        folder = tmp_path / name
        receivers[name] = Receiver(folder, job=JobInfo("j"), side=Side(name), backends={"jsonl": {}}, limits=FAST)
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


def test_every_record_of_a_killed_trainer_is_delivered(rig: SenderRig) -> None:
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
    sender = rig.sender()
    command = [sys.executable, "-c", textwrap.dedent(code), str(rig.spool)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        lines = [trainer.stdout.readline() for _ in range(2000)]
        trainer.kill()
        lines += trainer.stdout.readlines()
    returned = sum(line.endswith(b"\n") for line in lines)
    counts = sender.close(WAIT_S)
    report = rig.finish()
    assert returned <= counts.logged <= returned + 1
    assert_all_arrived(rig, counts, report, {"a": counts.logged})


def test_records_are_batched_for_linger_s_and_a_flush_sends_at_once(rig: SenderRig) -> None:
    with Writer(rig.spool) as writer:
        sender = lingering(rig, writer)
        for step in range(1, 11):
            writer.log({"loss": 0.0}, step)

        assert sender.flush(WAIT_S)

    assert [batch.records for batch in batches(rig)] == [1, 10]


def test_enough_bytes_for_a_batch_are_sent_before_linger_s_is_over(rig: SenderRig) -> None:
    many = acked(rig, 1000)
    with Writer(rig.spool) as writer:
        lingering(rig, writer)
        for step in range(1, 2001):
            writer.log({"loss": 0.0}, step)

        assert many.wait(WAIT_S)


def test_a_pass_sends_only_what_was_in_the_spool_when_it_began(rig: SenderRig) -> None:
    """A trainer that logs as fast as requests travel must not cost one request per record."""
    rig.limits = msgspec.structs.replace(FAST, linger_s=60)
    with Writer(rig.spool) as writer:

        def log_meanwhile(request: wire.Request) -> None:
            if isinstance(request, wire.Batch):
                writer.log({"loss": 0.0}, len(rig.requests))

        rig.before = log_meanwhile
        writer.log({"loss": 0.0}, 0)
        first, sender = acked(rig, 1), rig.sender()
        assert first.wait(WAIT_S)
        assert sender.flush(WAIT_S)
        rig.before = lambda request: None

    assert 2 <= len(batches(rig)) <= 3


def lingering(rig: SenderRig, writer: Writer) -> Sender:
    """Return a sender that has just sent the writer's first record, and waits a minute before it sends the next."""
    rig.limits = msgspec.structs.replace(FAST, linger_s=60, batch_records=5000)
    sender, first = rig.sender(), acked(rig, 1)
    writer.log({"loss": 0.0}, 0)
    assert first.wait(WAIT_S)
    return sender


def batches(rig: SenderRig) -> list[wire.Batch]:
    return [request for request in rig.requests if isinstance(request, wire.Batch)]


def acked(rig: SenderRig, seq: int) -> threading.Event:
    """Return an event that is set when the receiver has replied to a batch that reaches this ``seq``."""
    event, after = threading.Event(), rig.after

    def look(request: wire.Request) -> None:
        after(request)
        if isinstance(request, wire.Batch) and request.next_seq >= seq:
            event.set()

    rig.after = look
    return event


def test_a_flush_blames_no_receiver_for_a_defect_that_ends_the_sender(
    rig: SenderRig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def defect(_: bool) -> None:
        while not sender._passes.waiting:
            threading.Event().wait(0.001)
        raise RuntimeError("a defect")

    log(rig.spool, 10)
    sender = rig.sender(start=False)
    monkeypatch.setattr(sender, "_drain", defect)
    sender.start()

    assert not sender.flush(WAIT_S)

    assert f"`{command_for('trackhub replay', rig.spool)}`" in caplog.text
    assert "did not acknowledge" not in caplog.text
