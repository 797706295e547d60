# SPDX-License-Identifier: Apache-2.0
"""Short cuts on the hot paths give what the long way gives (docs/adr/0004)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import new_spool, spool_of
from trackhub.delivery.lane.fit_records_to_backend import Adaptation
from trackhub.framing import (
    CorruptFrameError,
    decode_body,
    encode_frame,
    metrics_bodies,
    pass_metrics,
    scan_frames,
)
from trackhub.records import Gap, Kind, Metrics, Payload, Record, Text
from trackhub.spi import Capabilities, KeyRule
from trackhub.spool import stream_reader
from trackhub.spool.batch import SpoolBatch
from trackhub.spool.reading import SpoolReader
from trackhub.writer.writer import Writer


def frames(kinds: str) -> bytes:
    """Return a frame for each letter: m metrics, t text, g gap."""
    payloads: dict[str, Payload] = {"m": Metrics({"loss": 0.5}), "t": Text("note", "x"), "g": Gap(1, "spool_full")}
    return b"".join(encode_frame(Record(seq, 1.0, seq, None, payloads[kind])) for seq, kind in enumerate(kinds))


def by_scanning(data: bytes, max_frames: int, max_end: int) -> tuple[int, int, int]:
    count, start, end = 0, 0, 0
    try:
        for frame in scan_frames(data):
            if frame.kind != Kind.METRICS or count == max_frames or frame.end > max_end:
                break
            count, start, end = count + 1, frame.start, frame.end
    except CorruptFrameError:
        pass
    return count, start, end


@given(st.text("mtg", max_size=12), st.integers(0, 14), st.integers(0, 600), st.integers(0, 600), st.integers(0, 599))
def test_passing_metrics_stops_where_a_scan_finds_something_else(
    kinds: str, max_frames: int, max_end: int, cut: int, damage: int
) -> None:
    data = bytearray(frames(kinds)[:cut])
    if damage < len(data):
        data[damage] ^= 0xFF

    assert pass_metrics(bytes(data), 0, max_frames, max_end) == by_scanning(bytes(data), max_frames, max_end)


@given(
    st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=12),
    st.integers(1, 14),
    st.integers(0, 600),
    st.integers(0, 599),
)
def test_bodies_of_metrics_are_those_that_a_scan_finds(keys: list[str], most: int, cut: int, damage: int) -> None:
    """Runs of one size are read in another way than the first frame of a size, and as soundly."""
    whole = [encode_frame(Record(seq, 1.0, seq, None, Metrics({key: 0.5}))) for seq, key in enumerate(keys)]
    data = bytearray((b"".join(whole) + frames("t"))[:cut])
    if damage < len(data):
        data[damage] ^= 0xFF

    bodies, end = metrics_bodies(bytes(data), 0, most)

    count, _, last = by_scanning(bytes(data), most, len(data))
    assert (len(bodies), end) == (count, last)
    assert b"".join(frame[:9] + body for frame, body in zip(whole, bodies, strict=False)) == data[:end]


@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(["loss", "a b%", "_x0041_", "k" * 40]), st.floats(), min_size=1),
            st.none() | st.integers(0, 9),
        ),
        max_size=12,
    ),
    st.builds(Capabilities, nonfinite=..., late_steps=..., optional_step=...),
    st.sampled_from([("", None), (r"\w", None), (r"\w %", 20)]),
)
def test_metrics_that_need_no_look_are_shaped_as_if_they_had_one(
    logged: list[tuple[dict[str, float], int | None]], can: Capabilities, names: tuple[str, int | None]
) -> None:
    capabilities = msgspec.structs.replace(can, key_rule=KeyRule(chars=names[0], max_chars=names[1]))
    short, long = Adaptation(capabilities), Adaptation(capabilities)

    for seq, (values, step) in enumerate(logged):
        record = Record(seq, 1.0 + seq, step, 3, Metrics(values))
        entry, altered = short.adapt("stream", record, seq)
        assert (entry, list(altered)) == long._adapt("stream", record, seq)

    assert short.memory() == long.memory()


def batches(folder: Path) -> list[SpoolBatch]:
    reader = SpoolReader(folder, "server")
    found = []
    while batch := reader.next_batch(700, 1 << 20, final=True):
        found.append(batch)
        reader.settle(batch)
    return found


def test_batches_are_the_same_however_little_is_read_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[SpoolBatch]] = []
    for few in (1, 5_000, 1 << 17, 1 << 22):
        folder = new_spool(tmp_path / str(few))
        with Writer(folder) as writer:
            for step in range(2_000):
                writer.log({"loss": float(step)}, step)
            writer.log_text("large", "x" * 300_000)
            for step in range(1_500):
                writer.log({"loss": float(step)}, step)
        monkeypatch.setattr(stream_reader, "_FEW_BYTES", few)
        read.append(batches(folder))

    sizes = [[(batch.first_seq, batch.next_seq, batch.records) for batch in found] for found in read]
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3]
    assert sum(records for _, _, records in sizes[0]) == 3_501


def test_a_dict_that_is_changed_after_the_call_was_logged_as_it_was(tmp_path: Path) -> None:
    folder = new_spool(tmp_path)
    values = {"loss": 1.0}
    with Writer(folder) as writer:
        for step in range(3):
            writer.log(values, step)
            values["loss"] += 1.0

    assert logged(folder) == [{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}]


def test_a_call_from_within_another_call_keeps_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_spool(tmp_path)
    with Writer(folder) as writer:
        writer.log({"loss": 0.0}, 0)
        get, inner = spool_of(writer)._round.get, {"loss": 2.0}

        def interrupt() -> int | None:
            monkeypatch.setattr(spool_of(writer)._round, "get", get)
            writer.log(inner, 2)  # as a signal handler's call would
            inner["loss"] = 99.0
            return None

        monkeypatch.setattr(spool_of(writer)._round, "get", interrupt)
        writer.log({"loss": 1.0}, 1)

    assert logged(folder) == [{"loss": 0.0}, {"loss": 1.0}, {"loss": 2.0}]


def logged(folder: Path) -> list[dict[str, float]]:
    found = []
    for batch in batches(folder):
        for frame in scan_frames(batch.frames):
            payload = decode_body(batch.frames[frame.body : frame.end]).payload
            assert isinstance(payload, Metrics)
            found.append(payload.values)
    return found
