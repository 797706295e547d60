# SPDX-License-Identifier: Apache-2.0
"""The sender's end of the spool hands out every record once and in order, and accounts for what it cannot read."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import STREAM, ModelReceiver, assert_accounted, drain, new_spool, read_spool
from trackhub.errors import SpoolError
from trackhub.framing import encode_frame, scan_frames
from trackhub.records import Kind, Metrics, Record, Text
from trackhub.spool.acks import Ack, write_ack
from trackhub.spool.layout import SEGMENT_HEADER, segment_name
from trackhub.spool.reading import SpoolReader
from trackhub.spool.writing import SpoolWriter
from trackhub.writer.writer import Writer


def write(folder: Path, n: int, *, size: int = 20) -> SpoolWriter:
    spool = SpoolWriter(folder)
    for i in range(n):
        spool.append(Text("k", f"{i}".ljust(size, ".")), i, float(i))
    return spool


def test_a_reader_must_be_one_that_the_spool_names(tmp_path: Path) -> None:
    new_spool(tmp_path / "spool", "server")
    with pytest.raises(SpoolError, match="'client'"):
        SpoolReader(tmp_path / "spool", "client")
    with pytest.raises(SpoolError, match="not a spool"):
        SpoolReader(tmp_path, "server")


def test_an_empty_spool_has_no_batch(tmp_path: Path) -> None:
    reader = SpoolReader(new_spool(tmp_path), "server")
    assert reader.next_batch(10, 1000) is None
    assert reader.next_batch(10, 1000, final=True) is None
    assert reader.counts() == {}


def test_other_threads_learn_that_a_batch_is_settled_once_that_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for a sender's flush, and then asks a writer, which looks at the file, must not hear something else."""
    write(new_spool(tmp_path), 3)
    reader = SpoolReader(tmp_path, "server")
    ends, seen = reader.ends(), list[bool]()

    def store(folder: Path, stream: str, cursor: str, ack: Ack) -> None:
        seen.append(reader.is_past(ends))
        write_ack(folder, stream, cursor, ack)

    monkeypatch.setattr("trackhub.spool.reading.write_ack", store)
    batch = reader.next_batch(10, 1 << 20)
    assert batch is not None

    reader.settle(batch)

    assert (seen, reader.is_past(ends)) == ([False], True)


def test_a_batch_is_the_same_until_it_is_settled(tmp_path: Path) -> None:
    spool = write(new_spool(tmp_path), 10)
    reader = SpoolReader(tmp_path, "server")
    first = reader.next_batch(4, 1 << 20)
    spool.append(Text("k", "more"), 10, 10.0)
    assert reader.next_batch(4, 1 << 20) == first
    assert SpoolReader(tmp_path, "server").next_batch(4, 1 << 20) == first
    assert first is not None
    assert (first.first_seq, first.next_seq, first.records) == (0, 4, 4)
    reader.settle(first)
    second = reader.next_batch(4, 1 << 20)
    assert second is not None
    assert (second.first_seq, second.next_seq) == (4, 8)


def test_a_batch_is_no_larger_than_asked_for_except_for_one_record(tmp_path: Path) -> None:
    spool = SpoolWriter(new_spool(tmp_path))
    for size in (10, 10, 5000, 10, 900, 900):
        spool.append(Text("k", "x" * size), 0, 0.0)
    reader = SpoolReader(tmp_path, "server")
    counts = []
    while batch := reader.next_batch(100, 1000):
        assert batch.records == 1 or len(batch.frames) <= 1000
        counts.append(batch.records)
        reader.settle(batch)
    assert counts == [2, 1, 2, 1]


def test_streams_take_turns(tmp_path: Path) -> None:
    new_spool(tmp_path)
    spools = [write(tmp_path, 30) for _ in range(3)]
    reader = SpoolReader(tmp_path, "server")
    order = []
    while batch := reader.next_batch(10, 1 << 20):
        order.append(batch.stream)
        reader.settle(batch)
    assert len(order) == 9
    assert [len(set(order[i : i + 3])) for i in (0, 3, 6)] == [3, 3, 3]
    assert set(order) == {s.stream for s in spools}


def test_a_refused_batch_is_counted_by_reason_and_not_retries(tmp_path: Path) -> None:
    write(new_spool(tmp_path), 10)
    reader = SpoolReader(tmp_path, "server")
    batch = reader.next_batch(4, 1 << 20)
    assert batch is not None
    reader.settle(batch, {"malformed": batch.records})
    batch = reader.next_batch(4, 1 << 20)
    assert batch is not None
    assert batch.first_seq == 4
    reader.settle(batch)
    (count,) = SpoolReader(tmp_path, "server").counts().values()
    assert_accounted(count, 10)
    assert (count.refused, count.acked, count.spooled) == ({"malformed": 4}, 4, 2)


def test_a_frame_that_is_being_written_is_waited_for_but_not_at_the_end(tmp_path: Path) -> None:
    spool = write(new_spool(tmp_path), 3)
    path = tmp_path / segment_name(spool.stream, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    reader, receiver = SpoolReader(tmp_path, "server"), ModelReceiver()

    drain(reader, receiver, final=False)
    assert receiver.next_seq[spool.stream] == 2
    path.write_bytes(whole)
    drain(reader, receiver, final=False)
    assert receiver.next_seq[spool.stream] == 3
    path.write_bytes(whole + whole[8:20])  # torn for good
    drain(reader, receiver, final=True)
    (count,) = reader.counts().values()
    assert_accounted(count, 3)
    assert count.dropped == {}


def frame_of_kind(seq: int, kind: int) -> bytes:
    body = msgspec.msgpack.encode([seq, 1.0, None, None, [kind, {"new": 1}]])
    head = struct.pack("<IB", len(body), kind)
    return struct.pack("<I", zlib.crc32(head + body)) + head + body


def append_raw(folder: Path, data: bytes, *, stream: str = STREAM, segment: int = 0) -> None:
    path = folder / segment_name(stream, segment)
    with path.open("ab") as file:
        if not path.stat().st_size:
            file.write(SEGMENT_HEADER)
        file.write(data)


def test_a_kind_of_a_newer_trackhub_is_carried_wherever_it_stands(tmp_path: Path) -> None:
    """A trainer may run in an environment with a newer trackhub than the client."""
    new_spool(tmp_path)
    frames = [frame_of_kind(0, 42), encode_frame(Record(1, 1.0, 1, None, Metrics({"a": 1.0}))), frame_of_kind(2, 42)]
    append_raw(tmp_path, b"".join(frames))
    for size in (1, 2, 3):
        reader, carried = SpoolReader(tmp_path, "server"), b""
        (tmp_path / f"{STREAM}.server.ack").unlink(missing_ok=True)
        reader = SpoolReader(tmp_path, "server")
        while batch := reader.next_batch(size, 1 << 20):
            assert batch.explained == {}
            carried += batch.frames
            reader.settle(batch)
        assert carried == b"".join(frames)
        (count,) = reader.counts().values()
        assert (count.logged, count.acked) == (3, 3)


@pytest.mark.parametrize("kind", [Kind.GAP, Kind.IMAGE, Kind.METRICS])
def test_a_sound_frame_with_a_body_that_makes_no_sense_holds_nothing_up(tmp_path: Path, kind: int) -> None:
    new_spool(tmp_path)
    good = [encode_frame(Record(i, 1.0, i, None, Metrics({"a": 1.0}))) for i in (0, 2)]
    for bad in (frame_of_kind(1, kind), struct.pack("<IIB", zlib.crc32(struct.pack("<IB", 0, kind)), 0, kind)):
        for path in tmp_path.glob("*.ack"):
            path.unlink()
        (tmp_path / segment_name(STREAM, 0)).unlink(missing_ok=True)
        append_raw(tmp_path, good[0] + bad + good[1])
        reader = SpoolReader(tmp_path, "server")
        carried, gone = b"", Counter[str]()
        for _ in range(100):
            if (batch := reader.next_batch(10, 1 << 20, final=True)) is None:
                break
            carried += batch.frames
            gone.update(batch.explained)
            reader.settle(batch)
        else:
            pytest.fail("the reader does not come to an end")
        assert carried.startswith(good[0])
        assert carried.endswith(good[1])
        (count,) = reader.counts().values()
        assert_accounted(count, 3)


@pytest.mark.parametrize("payload", [Metrics({"k": 1.0}), Text("k", "v")], ids=["metrics", "text"])
@pytest.mark.parametrize("hole", range(7))
def test_a_hole_of_exactly_one_frame_is_seen(tmp_path: Path, payload: Metrics | Text, hole: int) -> None:
    """All bytes that are left are sound. Only the numbers of the records tell."""
    folder, n = new_spool(tmp_path), 7
    spool = SpoolWriter(folder)
    for i in range(n):
        spool.append(payload, i, float(i))
    frames = [encode_frame(r) for r in read_spool(folder)[spool.stream]]
    (segment,) = folder.glob("*.spool")
    segment.write_bytes(segment.read_bytes().replace(frames[hole], b""))

    reader, receiver = SpoolReader(folder, "server"), ModelReceiver()
    drain(reader, receiver, max_records=5)

    assert [r.seq for r in receiver.records[spool.stream]] == [i for i in range(n) if i != hole]
    (count,) = reader.counts().values()
    assert_accounted(count, n)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_damage_costs_what_it_hits_and_the_count_is_exact(tmp_path: Path, data: st.DataObject) -> None:
    folder = new_spool(tmp_path / os.urandom(6).hex(), max_bytes=8000)  # a segment holds about 15 records
    n = data.draw(st.integers(1, 60), "records")
    spool = SpoolWriter(folder)
    frames = []
    for i in range(n):
        spool.append(Text("k", f"{i}".ljust(data.draw(st.integers(3, 40)), ".")), i, float(i))
    whole = read_spool(folder)[spool.stream]
    frames = [encode_frame(r) for r in whole]
    segments = sorted(folder.glob("*.spool"))
    hit = data.draw(st.sampled_from(segments), "segment")
    content = bytearray(hit.read_bytes())
    damage = data.draw(st.sampled_from(["flip", "zero", "cut", "insert", "remove", "lose"]), "damage")
    at = data.draw(st.integers(8, len(content) - 1), "at")
    if damage == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7), "bit")
    elif damage == "zero":
        end = data.draw(st.integers(at, len(content)), "end")
        content[at:end] = bytes(end - at)
    elif damage == "cut":
        del content[at:]
    elif damage == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=50), "bytes")
    elif damage == "remove":
        del content[at : at + data.draw(st.integers(1, 100), "removed")]
    if damage == "lose":
        hit.unlink()
    else:
        hit.write_bytes(content)
    intact = []
    for path in sorted(folder.glob("*.spool")):
        left = path.read_bytes()
        intact += [r for r, f in zip(whole, frames, strict=True) if f in left]

    reader, receiver = SpoolReader(folder, "server"), ModelReceiver()
    (before,) = reader.counts().values()
    drain(reader, receiver, max_records=data.draw(st.integers(1, 20), "batch"))
    (after,) = reader.counts().values()

    assert receiver.records.get(spool.stream, []) == intact
    assert_accounted(after, n)
    assert_accounted(before, n)
    lost = n - len(intact)
    assert after.dropped == ({"damaged": lost} if lost else {})
    assert (after.acked, after.spooled) == (len(intact), 0)
    assert (before.acked, before.spooled) == (0, len(intact))


def test_damage_in_the_segment_that_is_being_written_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    """Only what looks like a frame that its writer has not finished yet is waited for."""
    spool = write(new_spool(tmp_path), 20)
    path = tmp_path / segment_name(spool.stream, 0)
    content = bytearray(path.read_bytes())
    content[200] ^= 0xFF
    path.write_bytes(content)
    reader, receiver = SpoolReader(tmp_path, "server"), ModelReceiver()
    drain(reader, receiver, final=False)
    assert len(receiver.records[spool.stream]) == 19
    assert receiver.next_seq[spool.stream] == 20


def test_counting_while_training_logs_sees_no_damage(tmp_path: Path) -> None:
    spool = SpoolWriter(new_spool(tmp_path, max_bytes=1 << 30))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            spool.append(Metrics({"a": 1.0}), 0, 1.0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        reader = SpoolReader(tmp_path, "server")
        for _ in range(30):
            for count in reader.counts().values():
                assert_accounted(count, count.logged)
                assert count.dropped == {}
            if batch := reader.next_batch(1000, 1 << 20):
                reader.settle(batch)
    finally:
        stop.set()
        thread.join()


def test_the_bytes_of_a_blob_are_deleted_with_its_record_also_if_they_were_given_up(tmp_path: Path) -> None:
    new_spool(tmp_path)
    with Writer(tmp_path) as writer:
        for _ in range(3):
            writer.log_artifact(__file__)
    reader, receiver = SpoolReader(tmp_path, "server"), ModelReceiver()
    batch = reader.next_batch(10, 1 << 20)
    assert batch is not None
    names = [blob.name for blob in batch.blobs]
    assert len(names) == 3
    reader.give_up_blob(names[1])
    drain(reader, receiver)

    assert [r.seq for r in receiver.records[batch.stream]] == [0, 2]
    assert receiver.gaps[batch.stream] == {"damaged": 1}
    assert list(tmp_path.glob("*.blob")) == []
    (count,) = reader.counts().values()
    assert_accounted(count, 3)


def test_a_blob_stays_until_every_reader_is_past_its_record(tmp_path: Path) -> None:
    new_spool(tmp_path, "server", "client")
    with Writer(tmp_path) as writer:
        writer.log_artifact(__file__)
    server, client = SpoolReader(tmp_path, "server"), SpoolReader(tmp_path, "client")
    batch = server.next_batch(10, 1 << 20)
    assert batch is not None
    server.give_up_blob(batch.blobs[0].name)
    drain(server, ModelReceiver())
    assert len(list(tmp_path.glob("*.blob"))) == 1
    drain(client, ModelReceiver())
    assert list(tmp_path.glob("*.blob")) == []


def test_large_damage_is_skipped(tmp_path: Path) -> None:
    new_spool(tmp_path)
    append_raw(tmp_path, encode_frame(Record(0, 1.0, 0, None, Text("a", "b"))))
    append_raw(tmp_path, bytes(3 << 20))
    append_raw(tmp_path, encode_frame(Record(5, 1.0, 0, None, Text("a", "b"))))
    reader, receiver = SpoolReader(tmp_path, "server"), ModelReceiver()
    drain(reader, receiver)
    assert [r.seq for r in receiver.records[STREAM]] == [0, 5]
    (count,) = reader.counts().values()
    assert_accounted(count, 6)
    assert count.dropped == {"damaged": 4}


def test_a_lost_cursor_begins_anew_and_the_receiver_recognises_what_it_has(tmp_path: Path) -> None:
    spool = write(new_spool(tmp_path, max_bytes=8000), 50)
    reader, receiver = SpoolReader(tmp_path, "server"), ModelReceiver()
    for _ in range(3):
        batch = reader.next_batch(10, 1 << 20)
        assert batch is not None
        receiver.accept(batch)
        reader.settle(batch)
    (tmp_path / f"{spool.stream}.server.ack").write_bytes(b"nonsense")

    reader = SpoolReader(tmp_path, "server")
    drain(reader, receiver)

    assert [r.seq for r in receiver.records[spool.stream]] == list(range(50))
    assert receiver.gaps[spool.stream] == {}
    (count,) = reader.counts().values()
    assert_accounted(count, 50)


def test_a_cursor_that_cannot_be_stored_still_counts_in_this_process(tmp_path: Path) -> None:
    spool = write(new_spool(tmp_path), 10)
    reader = SpoolReader(tmp_path, "server")
    batch = reader.next_batch(4, 1 << 20)
    assert batch is not None
    (tmp_path / f"{spool.stream}.server.ack").mkdir()
    with pytest.raises(OSError, match="directory"):
        reader.settle(batch)
    batch = reader.next_batch(4, 1 << 20)
    assert batch is not None
    assert batch.first_seq == 4


def test_the_frames_of_a_batch_are_those_of_the_spool(tmp_path: Path) -> None:
    spool = write(new_spool(tmp_path), 5)
    batch = SpoolReader(tmp_path, "server").next_batch(10, 1 << 20)
    assert batch is not None
    assert batch.frames == (tmp_path / segment_name(spool.stream, 0)).read_bytes()[8:]
    assert len(list(scan_frames(batch.frames))) == 5
