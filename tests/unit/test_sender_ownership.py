# SPDX-License-Identifier: Apache-2.0
"""A sender owns its end of the spool, says what it cannot know, and ends in time whatever it finds there."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import WAIT_S, small_disk
from tests.unit.rigs import FAST, SITE, SenderRig, log
from trackhub.delivery import sender as sender_module
from trackhub.delivery import wire
from trackhub.delivery.channel import ChannelError
from trackhub.delivery.sender import Sender
from trackhub.spool import round_file
from trackhub.spool.batch import SpoolBatch
from trackhub.spool.layout import SpoolInfo, create_spool, read_spool_info
from trackhub.spool.reading import SpoolReader
from trackhub.spool.stream_reader import SegmentReader
from trackhub.writer.writer import Writer


def test_a_sender_that_hangs_in_a_request_is_left_behind_and_its_counts_say_so(
    rig: SenderRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread alone uses the reader. Another one that counted meanwhile would see half a change."""
    hang = threading.Event()
    used_by: set[int] = set()
    count = SpoolReader.counts

    def noted(self: SpoolReader, **how: Any) -> Any:
        used_by.add(threading.get_ident())
        return count(self, **how)

    monkeypatch.setattr(SpoolReader, "counts", noted)

    def channel(data: bytes, timeout_s: float) -> bytes:
        if isinstance(wire.decode_request(data), wire.Batch):
            hang.wait(WAIT_S)
        return rig.channel(data, timeout_s)

    log(rig.spool, 10)
    sender = rig.sender(channel)
    assert not sender.flush(0.1)
    start = time.monotonic()
    counts = sender.close(0.1)
    assert time.monotonic() - start < WAIT_S / 2
    hang.set()
    sender._thread.join(WAIT_S)
    assert not counts.complete
    assert threading.get_ident() not in used_by


def test_a_full_spool_is_counted_in_the_time_that_is_left(rig: SenderRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not read by then is counted by the ledgers."""
    monkeypatch.setattr(sender_module, "_COUNT_S", 0.1)
    read = SegmentReader.next_batch
    slow = threading.Event()

    def read_slowly(self: SegmentReader, *args: Any) -> SpoolBatch | None:
        if slow.is_set():
            time.sleep(0.05)  # as long as 100,000 records take
        return read(self, args[0], args[1], 10, args[3])

    monkeypatch.setattr(SegmentReader, "next_batch", read_slowly)
    log(rig.spool, 5_000)

    def silent(request: wire.Request) -> None:
        raise ChannelError("the receiver is silent")

    rig.before = silent
    sender = rig.sender()
    slow.set()
    start = time.monotonic()
    counts = sender.close(0.2)
    assert time.monotonic() - start < 4  # to read them all would take 25 s
    assert (counts.logged, counts.spooled, counts.complete) == (5_000, 5_000, True)


def test_a_second_sender_waits_for_the_first_and_then_goes_on(rig: SenderRig, caplog: pytest.LogCaptureFixture) -> None:
    first, second = rig.sender(), None
    log(rig.spool, 10)
    assert first.flush(WAIT_S)
    try:
        second = rig.sender()
        assert not second.flush(0.3)
        assert "another process sends the spool" in caplog.text
    finally:
        first.close(WAIT_S)
    assert second is not None
    log(rig.spool, 5)
    counts = second.close(WAIT_S)
    assert (counts.logged, counts.acked) == (15, 15)


def test_a_sender_that_never_gets_its_spool_ends_without_a_final_message(rig: SenderRig) -> None:
    first = rig.sender()
    log(rig.spool, 10)
    assert first.flush(WAIT_S)
    before = len(rig.requests)
    counts = rig.sender().close(0.3)
    assert counts.logged == 10
    assert not [request for request in rig.requests[before:] if isinstance(request, wire.Final)]
    assert read_spool_info(rig.spool).open  # the first one still sends it


def test_a_flush_is_false_while_the_folder_cannot_be_read_and_costs_no_wait(rig: SenderRig) -> None:
    sender = rig.sender()
    log(rig.spool, 10)
    assert sender.flush(WAIT_S)
    rig.spool.rename(rig.spool.with_name("elsewhere"))
    start = time.monotonic()
    assert not any(sender.flush(WAIT_S) for _ in range(5))
    assert time.monotonic() - start < WAIT_S / 2
    assert not sender.close(0.2).complete


def test_a_spool_that_could_not_be_created_is_made_by_its_sender_as_soon_as_it_can(
    rig: SenderRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder that is to hold it can be written again after a while."""
    monkeypatch.setattr(round_file, "_LOOK_EVERY_S", 0.0)
    place = tmp_path / "place"
    with small_disk(place, 256 << 10) as disk:
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(1 << 20))
        assert not create_spool(disk / "spool", SpoolInfo(SITE, "j", ("server",)))
        sender = Sender(disk / "spool", rig.channel, limits=FAST)
        sender.start()
        sender.set_round(3)
        writer = Writer(disk / "spool")
        writer.log({"a": 0.0})
        assert not sender.flush(WAIT_S)
        filler.unlink()
        deadline = time.monotonic() + WAIT_S
        while not (disk / "spool" / "spool.json").exists() or writer.flush(0.0) is False:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while not sender.flush(WAIT_S):
            assert time.monotonic() < deadline
        writer.log({"a": 1.0})
        writer.close()
        counts = sender.close(WAIT_S)
    assert counts.complete
    assert counts.logged == 2 == counts.acked + sum(counts.dropped.values())
    rig.finish()
    assert rig.stored()[-1]["round"] == 3
