# SPDX-License-Identifier: Apache-2.0
"""The parts of the spool's two ends, each alone: room, segments, drops, damage, batches and counts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.unit.readers_and_bad_backends import STREAM, metric
from trackhub.framing import decode_body, encode_frame, scan_frames
from trackhub.records import Artifact, Blob, Gap, Payload, Record
from trackhub.spool.acks import Ack
from trackhub.spool.batch import Place, SpoolBatch, assemble
from trackhub.spool.counts import count_stream
from trackhub.spool.drops import Drops, DropWarnings
from trackhub.spool.layout import SEGMENT_HEADER, ledger_file
from trackhub.spool.room import Room, new_part
from trackhub.spool.segment_writer import SegmentFile
from trackhub.spool.skip_damage import DamageLog, find_sound_frame
from trackhub.spool.write_on_full_disk import reason_of
from trackhub.spool.writer_ledger import Ledger, read_ledger

PLACE = Place(seq=0, segment=3, offset=100)
USAGE_BYTES = 32  # of the file in which a spool keeps its last measurement


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_folder_within_its_limit_has_room_for_what_is_left(tmp_path: Path) -> None:
    room = Room(tmp_path, 1000 + USAGE_BYTES, 100, Clock())
    (tmp_path / "file").write_bytes(b"x" * 900)
    assert room.fits(0, 100)
    assert not room.fits(0, 101)


def test_the_file_of_the_measurement_is_within_the_limit_as_well(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 900)

    assert not Room(tmp_path, 1000, 100, Clock()).fits(0, 100)  # which would fit if nobody had measured
    assert (tmp_path / "usage").stat().st_size == USAGE_BYTES


def test_room_that_a_writer_has_reserved_is_taken_until_it_ends(tmp_path: Path) -> None:
    room = Room(tmp_path, 1000 + USAGE_BYTES, 100, Clock())
    (tmp_path / f"{STREAM}-000000.spool").write_bytes(b"x" * 10)
    ledger = Ledger(ledger_file(tmp_path, STREAM))
    taken = ledger_file(tmp_path, STREAM).stat().st_size
    ledger.reserve(500)
    assert room.fits(0, 1000 - 500 - taken)
    assert not room.fits(0, 1001 - 500 - taken)
    del ledger  # never closed, as in a process that was killed
    assert room.fits(0, 1000 - 10 - taken)


def test_a_file_that_is_being_written_has_its_room_from_the_beginning(tmp_path: Path) -> None:
    room = Room(tmp_path, 1000 + USAGE_BYTES, 100, Clock())
    part = new_part(tmp_path, STREAM, 600)
    part.write_bytes(b"x" * 10)
    assert room.fits(0, 400)
    assert not room.fits(0, 401)
    part.write_bytes(b"x" * 700)  # it has become larger than its writer had thought
    assert not room.fits(0, 301)


def test_a_full_folder_is_measured_twice_a_second_at_most(tmp_path: Path) -> None:
    clock = Clock()
    room = Room(tmp_path, 1000 + USAGE_BYTES, 100, clock)
    assert room.may_ask_for(10)
    room.note_full(10)
    assert not room.may_ask_for(10)
    assert room.may_ask_for(9)  # a smaller record may still fit
    clock.now += 0.5
    assert room.may_ask_for(10)


def test_a_stream_reserves_as_much_as_it_has_written(tmp_path: Path) -> None:
    segment = SegmentFile(tmp_path, STREAM, 1 << 20)
    assert segment.must_be_followed(1)
    segment.open_next()
    assert segment.ends(50) == (8 + (8 << 10), 58)
    segment.offset = 300 << 10
    assert segment.ends(50) == (600 << 10, (300 << 10) + 50)
    segment.offset = (1 << 20) - 60
    assert segment.ends(50) == (1 << 20, (1 << 20) - 10)
    assert segment.must_be_followed(61)
    segment.close()


def test_a_single_record_may_be_larger_than_a_segment(tmp_path: Path) -> None:
    segment = SegmentFile(tmp_path, STREAM, 100)
    segment.open_next()
    assert not segment.must_be_followed(500)
    assert segment.ends(500) == (508, 508)
    segment.close()


def test_a_segment_file_starts_with_the_first_record_and_goes_on_in_the_next_file(tmp_path: Path) -> None:
    segment = SegmentFile(tmp_path, STREAM, 50)
    assert (segment.fd, segment.limit, list(tmp_path.iterdir())) == (-1, 0, [])
    for number in range(2):
        segment.open_next()
        assert segment.offset == len(SEGMENT_HEADER)
        assert (tmp_path / f"{STREAM}-{number:06d}.spool").read_bytes() == SEGMENT_HEADER
    segment.close()
    segment.close()
    assert segment.fd == -1


def test_a_segment_that_an_interrupted_attempt_left_behind_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / f"{STREAM}-000000.spool").touch()
    segment = SegmentFile(tmp_path, STREAM, 50)
    segment.open_next()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{STREAM}-{i:06d}.spool" for i in range(2)]
    segment.close()


def test_the_current_segment_stays_in_use_if_the_next_one_cannot_be_made(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    segment = SegmentFile(folder, STREAM, 50)
    segment.open_next()
    fd = segment.fd
    (folder / f"{STREAM}-000000.spool").unlink()
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
        segment.open_next()
    assert (segment.fd, os.write(fd, b"x")) == (fd, 1)
    segment.close()


def test_a_torn_frame_is_cut_off(tmp_path: Path) -> None:
    segment = SegmentFile(tmp_path, STREAM, 50)
    segment.open_next()
    os.write(segment.fd, b"half a")
    assert segment.has_grown_by(6)
    segment.cut_torn_frame()
    assert segment.has_grown_by(0)
    segment.close()
    segment.cut_torn_frame()  # it cannot be done now, so the next frame goes to a new segment
    assert segment.offset == segment.limit


def test_drops_in_a_row_for_one_reason_are_one_gap(tmp_path: Path) -> None:
    drops = Drops(tmp_path / "ledger", Clock(), DropWarnings())
    for seq, reason in enumerate(["spool_full", "spool_full", "disk_full", "spool_full"]):
        drops.add(seq, reason, "detail")
    assert drops.gaps == [(0, Gap(2, "spool_full")), (2, Gap(1, "disk_full")), (3, Gap(1, "spool_full"))]
    records = [decode_body(drops.gap_frames(5.0, 7)[f.body : f.end]) for f in scan_frames(drops.gap_frames(5.0, 7))]
    assert records[1] == Record(2, 5.0, None, 7, Gap(1, "disk_full"))
    assert read_ledger(tmp_path / "ledger")[:2] == (4, {"spool_full": 3, "disk_full": 1})
    assert drops.total == 4
    drops.close()


def test_a_warning_about_drops_is_prepared_once_a_minute(tmp_path: Path) -> None:
    clock = Clock()
    drops = Drops(tmp_path / "ledger", clock, DropWarnings())
    drops.add(0, "disk_full", "first")
    assert drops.warning == ("disk_full", "first", 1)
    drops.warning = None
    clock.now += 59.9
    drops.add(1, "disk_full", "second")
    assert drops.warning is None
    clock.now += 0.1
    drops.add(2, "spool_full", "third")
    assert drops.warning == ("spool_full", "third", 3)
    drops.close()


def test_drops_are_counted_where_no_ledger_can_be_made(tmp_path: Path) -> None:
    drops = Drops(tmp_path / "missing" / "ledger", Clock(), DropWarnings())
    drops.add(0, "disk_full", "detail")
    assert (drops.total, drops.ledger, drops.gaps) == (1, None, [(0, Gap(1, "disk_full"))])


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (errno.EIO, "io_error")]
)
def test_the_reason_of_a_drop_comes_from_the_error(number: int, reason: str) -> None:
    assert reason_of(OSError(number, "message")) == reason


def frames(*payloads: Payload | None, first: int = 0) -> bytes:
    """Return a frame for each payload, numbered from ``first``; None is a metric."""
    records = [
        metric(seq) if payload is None else Record(seq, 1.0, None, None, payload)
        for seq, payload in enumerate(payloads, first)
    ]
    return b"".join(map(encode_frame, records))


def test_a_sound_frame_is_found_where_it_should_be_and_behind_damage() -> None:
    data = frames(None, None)
    junk = b"\x00\xffjunk" * 9
    assert find_sound_frame(data, 0, closed=False) == 0
    assert find_sound_frame(junk + data, 0, closed=False) == len(junk)
    assert find_sound_frame(junk, 0, closed=True) is None
    assert find_sound_frame(b"", 0, closed=True) is None


def test_a_frame_of_an_earlier_record_is_no_way_on() -> None:
    data = frames(None, None)
    assert find_sound_frame(data, 1, closed=True) == len(frames(None))
    assert find_sound_frame(data, 2, closed=True) is None


def test_an_incomplete_frame_is_waited_for_unless_its_writer_is_gone() -> None:
    data = frames(None)[:-1] + frames(None, first=1)
    torn = frames(None)[:-1]
    assert find_sound_frame(torn, 0, closed=False) is None
    assert find_sound_frame(data, 0, closed=True) == len(torn)


def test_each_damaged_place_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = DamageLog()
    segment = tmp_path / "segment"
    segment.touch()
    for _ in range(2):
        log.unreadable(segment, 5, 9)
        log.missing_segment(segment)  # it is there
        log.missing_tail(tmp_path, STREAM, 3, 10)
    segment.unlink()
    for _ in range(2):
        log.missing_segment(segment)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "bytes 5 to 9" in messages[0]
    assert "last 3 of the 10 records" in messages[1]
    assert str(segment) in messages[2]


A = "a" * 32 + "-1"
"""The name of a blob."""


def artifact(blob: str) -> Artifact:
    return Artifact("model", Blob(blob, 1, "0" * 64, "type"), "file")


def made(data: bytes, *, seq: int = 0, max_records: int = 100, max_bytes: int = 1 << 20, lost: str = "") -> SpoolBatch:
    return assemble("stream", PLACE._replace(seq=seq), data, 0, max_records, max_bytes, {lost})


def test_a_batch_takes_frames_of_all_kinds_and_knows_their_blobs() -> None:
    data = frames(None, artifact(A), None, Gap(2, "spool_full"), first=4)
    batch = made(data, seq=4)
    assert (batch.first_seq, batch.next_seq, batch.records, batch.frames) == (4, 9, 3, data)
    assert [blob.name for blob in batch.blobs] == [A]
    assert batch.explained == {"spool_full": 2}
    assert batch.next_place == Place(9, PLACE.segment, PLACE.offset + len(data))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_batch_is_no_larger_than_asked_for_but_has_a_frame(most: int) -> None:
    data = frames(None, None, None)
    assert made(data, max_records=most).records == most
    size = len(frames(None))
    assert made(data, max_bytes=most * size).records == most
    assert made(data, max_bytes=1).records == 1


def test_missing_records_before_the_first_frame_become_a_gap() -> None:
    batch = made(frames(None, first=7), seq=5)
    gap = encode_frame(Record(5, metric(7).time, None, None, Gap(2, "damaged")))
    assert batch.frames == gap + frames(None, first=7)
    assert (batch.first_seq, batch.next_seq, batch.records, batch.explained) == (5, 8, 1, {"damaged": 2})


def test_a_batch_ends_before_damage() -> None:
    data = bytearray(frames(None, None))
    data[-1] ^= 1
    batch = made(bytes(data))
    assert (batch.records, batch.next_seq, batch.frames) == (1, 1, frames(None))


def test_a_record_whose_blob_is_lost_ends_a_batch_and_is_replaced_in_the_next() -> None:
    data = frames(None, artifact(A), None)
    first = made(data, lost=A)
    assert (first.records, first.frames, first.lost_blobs) == (1, frames(None), ())

    rest = data[len(first.frames) :]
    second = made(rest, seq=1, lost=A)
    assert second.frames == encode_frame(Record(1, 1.0, None, None, Gap(1, "damaged")))
    assert (second.records, second.next_seq, second.explained) == (0, 2, {"damaged": 1})
    assert [blob.name for blob in second.lost_blobs] == [A]
    assert second.offset - PLACE.offset == len(frames(artifact(A), first=1))


def test_a_count_adds_up_from_the_ledger_the_gaps_and_what_was_acknowledged() -> None:
    ack = Ack(acked=5, refused={"malformed": 1})
    explained = {"spool_full": 2, "withheld": 3, "damaged": 1}
    count = count_stream(ack, logged=20, dropped={"spool_full": 4, "disk_full": 1}, spooled=2, explained=explained)
    assert count.dropped == {"spool_full": 4, "disk_full": 1, "damaged": 4}
    assert (count.logged, count.withheld, count.acked, count.refused, count.spooled) == (20, 3, 5, {"malformed": 1}, 2)
    total = sum(count.dropped.values()) + count.withheld + count.acked + count.spooled + sum(count.refused.values())
    assert total == count.logged


def test_a_count_of_a_sound_stream_has_no_damage() -> None:
    count = count_stream(Ack(acked=5), logged=8, dropped={}, spooled=2, explained={"spool_full": 1})
    assert count.dropped == {"spool_full": 1}


def test_a_measurement_is_left_to_other_writers_while_half_of_the_spool_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Room] = []
    measure = Room._measure

    def noted(self: Room) -> int:
        measured.append(self)
        return measure(self)

    monkeypatch.setattr(Room, "_measure", noted)

    for _ in range(100):
        assert Room(tmp_path, 1 << 30, 1 << 20, Clock()).fits(64 << 10)
    assert len(measured) == 1
    assert Room(tmp_path, 1 << 30, 1 << 20, Clock()).fits(64 << 20)  # too much to take without a look
    assert len(measured) == 2
    (tmp_path / "usage").write_bytes(b"x" * 32)
    assert Room(tmp_path, 1 << 30, 1 << 20, Clock()).fits(1)
    assert len(measured) == 3


def test_a_measurement_counts_no_longer_when_half_of_the_spool_is_used(tmp_path: Path) -> None:
    room = Room(tmp_path, 1 << 20, 1 << 17, Clock())
    (tmp_path / "file").write_bytes(bytes(600 << 10))
    assert room.fits(10)
    (tmp_path / "other").write_bytes(bytes(600 << 10))
    assert not room.fits(10)
