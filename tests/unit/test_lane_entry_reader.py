# SPDX-License-Identifier: Apache-2.0
"""The entry reader alone: whole rows, in order, enough for one write; and what becomes of records that are no entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.readers_and_bad_backends import MemoryBackend, metric
from tests.unit.rigs import SITE, Bench
from trackhub.delivery.lane.cursor import Cursor
from trackhub.delivery.lane.entry_reader import EntryReader
from trackhub.errors import JournalError
from trackhub.records import Kind, Metrics, Record, Text
from trackhub.spi import Redelivery


def reader_on(bench: Bench, **can: Any) -> tuple[EntryReader, Cursor]:
    cursor = Cursor(bench.journal, "memory", 1, SITE, Redelivery.IDEMPOTENT)
    capabilities = msgspec.structs.replace(MemoryBackend.capabilities, **can)
    return EntryReader(bench.journal, cursor, capabilities, Path()), cursor


def positions(reader: EntryReader) -> list[int] | None:
    entries = reader.read()
    return None if entries is None else [e.position for e in entries]


def test_whole_rows_are_read_as_few_as_fill_one_write(bench: Bench) -> None:
    bench.log(4, rows=4)
    reader, _ = reader_on(bench, max_batch=6)

    assert (positions(reader), reader.upto) == ([0, 1, 2, 3, 4, 5, 6, 7], 2)
    assert reader.has_more()
    assert (positions(reader), reader.upto) == ([8, 9, 10, 11, 12, 13, 14, 15], 4)
    assert not reader.has_more()
    assert (positions(reader), reader.upto) == (None, 4)


def test_rows_that_come_later_are_read_after_the_others(bench: Bench) -> None:
    bench.log(2)
    reader, _ = reader_on(bench)
    before = (positions(reader), reader.has_more())

    bench.log(2)

    assert before == ([0, 1], False)
    assert (reader.has_more(), positions(reader)) == (True, [2, 3])


def test_a_reader_starts_after_the_confirmed_row_with_what_was_remembered(bench: Bench) -> None:
    """The memory holds the last step of each key: a later one that is lower is rejected."""
    bench.add([metric(0, step=9)])
    bench.add([metric(1, step=3)])
    first, cursor = reader_on(bench, late_steps=False, max_batch=1)
    first.read()
    cursor.written = first.upto
    cursor.confirm(first.memory())

    second, counts = reader_on(bench, late_steps=False)
    found = positions(second)
    counts.confirm(b"")

    assert (found, counts.progress.rejected) == ([], {"late_step": 1})


def test_starting_over_reads_everything_again_with_nothing_remembered(bench: Bench) -> None:
    """With the memory of the second row, the first one would be late."""
    bench.add([metric(0, step=3)])
    bench.add([metric(1, step=9)])
    first, cursor = reader_on(bench, late_steps=False)
    first.read()
    cursor.written = first.upto
    cursor.confirm(first.memory())

    reader, _ = reader_on(bench, late_steps=False)
    reader.start_over()

    assert reader.upto == 0
    assert positions(reader) == [0, 1]


def test_records_that_the_run_holds_already_are_counted_and_not_handed_over(bench: Bench) -> None:
    bench.log(10)
    reader, cursor = reader_on(bench)
    reader.skip_before = 4

    found = positions(reader)
    cursor.confirm(b"")

    assert found == [4, 5, 6, 7, 8, 9]
    assert (cursor.progress.confirmed, cursor.progress.stored_to) == (4, 4)


def test_what_the_backend_cannot_store_is_counted_by_reason_and_alteration(bench: Bench) -> None:
    bench.add(
        [
            Record(0, 1.0, 1, None, Text("t", "x")),
            Record(1, 1.0, 1, None, Metrics({"a": float("nan"), "b": 1.0})),
            metric(2),
        ]
    )
    reader, cursor = reader_on(bench, kinds=frozenset({Kind.METRICS}), nonfinite=False)

    found = positions(reader)
    cursor.confirm(b"")

    assert found == [1, 2]
    assert (cursor.progress.rejected, cursor.progress.altered) == ({"unsupported_kind": 1}, {"nonfinite_removed": 1})


def test_rows_without_an_entry_are_not_the_end(bench: Bench) -> None:
    for seq in range(3):
        bench.add([Record(seq, 1.0, 1, None, Text("t", "x"))])
    bench.add([metric(3)])
    reader, cursor = reader_on(bench, kinds=frozenset({Kind.METRICS}), max_batch=1)

    assert positions(reader) == [3]
    cursor.confirm(b"")
    assert cursor.progress.rejected == {"unsupported_kind": 3}


def test_damaged_records_are_counted_and_the_others_keep_their_positions(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.log(5)
    bench.log(5)
    with bench.journal._connections.transaction(1.0) as db:
        ((frames,),) = db.execute("SELECT frames FROM batches WHERE id = 1").fetchall()
        broken = bytearray(frames)
        broken[len(frames) // 2] ^= 0xFF  # in the third of five records
        db.execute("UPDATE batches SET frames = ? WHERE id = 1", (bytes(broken),))
    reader, cursor = reader_on(bench)

    found = positions(reader)
    cursor.confirm(b"")

    assert found == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert cursor.progress.rejected == {"damaged": 1}
    assert f"row 1 is damaged: 1 of the records 0 to 4 of run {SITE} cannot be read" in caplog.text


def test_a_journal_that_cannot_be_read_is_an_error_and_nothing_is_skipped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*args: Any) -> None:
        raise JournalError("I/O error")

    bench.log(3)
    reader, _ = reader_on(bench)
    monkeypatch.setattr(bench.journal, "read", unreadable)

    with pytest.raises(JournalError, match="I/O error"):
        reader.read()
    monkeypatch.undo()

    assert positions(reader) == [0, 1, 2]


def test_a_lane_whose_memory_is_damaged_delivers_everything_again(bench: Bench) -> None:
    """Its counts can be read, and a bit of the rest has changed. An error here would end the receiver."""
    bench.log(4)
    first, cursor = reader_on(bench)
    positions(first)
    cursor.written = first.upto
    cursor.confirm(b"\x81\xa8ordinals\x01")

    again, cursor = reader_on(bench)

    assert (cursor.confirmed, positions(again)) == (0, [0, 1, 2, 3])
