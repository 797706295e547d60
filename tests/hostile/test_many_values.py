# SPDX-License-Identifier: Apache-2.0
"""A site that sends many values in few records holds up no backend: a record is limited, and so is a write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.hostile_site import HOSTILE, Job, batch, frame, record
from tests.unit.readers_and_bad_backends import MemoryBackend
from tests.unit.rigs import Bench
from trackhub.delivery import wire
from trackhub.delivery.lane.split_into_writes import MAX_VALUES_OF_WRITE, split_into_writes
from trackhub.errors import RecordError
from trackhub.framing import encode_frame
from trackhub.records import (
    KIND_OF,
    MAX_METRICS_OF_RECORD,
    MAX_VALUES_OF_RECORD,
    Artifact,
    Blob,
    Histogram,
    Image,
    Metrics,
    Params,
    Payload,
    Record,
    Summary,
    Table,
    Tags,
    Text,
    count_values,
)
from trackhub.spi import Entry

STREAM = "5" * 32
MOST = MAX_VALUES_OF_RECORD


def keyed(count: int, value: Any) -> dict[str, Any]:
    return {f"k{i}": value for i in range(count)}


LARGEST: dict[str, tuple[Payload, Payload]] = {
    "metrics": (Metrics(keyed(MAX_METRICS_OF_RECORD, 1.0)), Metrics(keyed(MAX_METRICS_OF_RECORD + 1, 1.0))),
    "params": (Params(keyed(MOST, 1)), Params(keyed(MOST + 1, 1))),
    "tags": (Tags(keyed(MOST, "")), Tags(keyed(MOST + 1, ""))),
    "final values": (Summary(keyed(MOST, 1)), Summary(keyed(MOST + 1, 1))),
    "params in a list": (Params({"a": [0] * (MOST - 1)}), Params({"a": [0] * MOST})),
    "params in lists": (Params({"a": [[[]]] * (MOST // 2 - 1)}), Params({"a": [[[]]] * (MOST // 2)})),
    "params in a dict": (Params({"a": {"b": [0] * (MOST - 2)}}), Params({"a": {"b": [0] * (MOST - 1)}})),
    "cells": (Table("t", ["a"] * 100, [[0] * 100] * 1000), Table("t", ["a"] * 100, [[0] * 100] * 1001)),
    "columns": (Table("t", [""] * MOST, []), Table("t", [""] * (MOST + 1), [])),
    "rows": (Table("t", [], [[]] * MOST), Table("t", [], [[]] * (MOST + 1))),
    "bins": (
        Histogram("h", [*map(float, range(MOST // 2))], [0.0] * (MOST // 2 - 1)),
        Histogram("h", [*map(float, range(MOST // 2 + 1))], [0.0] * (MOST // 2)),
    ),
}


def sent(payload: Payload, seq: int) -> bytes:
    kind = KIND_OF[type(payload)]
    fields = [getattr(payload, name) for name in payload.__struct_fields__]
    return frame(kind, record(seq, kind, *fields))


@pytest.mark.parametrize("case", LARGEST)
def test_a_record_of_too_many_values_is_refused_by_the_receiver_and_by_the_writer(tmp_path: Path, case: str) -> None:
    """Both have the same limit, so that no record is logged which the receiver refuses."""
    largest, too_large = LARGEST[case]
    job = Job(tmp_path / "run")

    assert job.ask(batch([sent(largest, 0), sent(too_large, 1)])) == wire.Accepted(refused={"too_many_values": 1})
    encode_frame(Record(0, 1000.0, 1, None, largest))
    with pytest.raises(RecordError, match="expected at most"):
        encode_frame(Record(0, 1000.0, 1, None, too_large))
    job.log_honestly()
    assert job.finish().lanes["jsonl"][HOSTILE].confirmed == 1


def test_records_that_together_have_many_keys_are_not_refused(tmp_path: Path) -> None:
    job = Job(tmp_path / "run")
    frames = [sent(Metrics({f"{seq}-{i}": 1.0 for i in range(MAX_METRICS_OF_RECORD // 2)}), seq) for seq in range(6)]

    assert job.ask(batch(frames)) == wire.Accepted()
    job.finish()


def values_of(entries: Sequence[Entry]) -> int:
    return sum(count_values(entry.payload) for entry in entries)


def test_one_request_of_many_values_becomes_many_writes(tmp_path: Path) -> None:
    """Other runs get their turns between two writes, and so does the end of the job."""
    writes: list[list[Entry]] = []
    backend = MemoryBackend(lambda method, batch: writes.append(batch) if method == "write" else None)
    bench = Bench(tmp_path)
    bench.add([Record(seq, 1000.0, seq, None, Metrics(keyed(60, 1.0))) for seq in range(1000)])
    bench.lane(backend)

    bench.finish()

    assert len(writes) == 13
    assert max(map(values_of, writes)) <= MAX_VALUES_OF_WRITE
    assert [entry.position for batch in writes for entry in batch] == list(range(1000))


def entries(*payloads: Payload) -> list[Entry]:
    return [Entry(i, 1000.0, i, None, payload, STREAM, i) for i, payload in enumerate(payloads)]


def test_a_record_of_more_values_than_a_write_is_written_alone() -> None:
    large = Metrics(keyed(MAX_VALUES_OF_WRITE + 1, 1.0))
    found = split_into_writes(entries(Metrics({"a": 1.0}), large, Metrics({"a": 2.0}), Metrics({"a": 3.0})), 1000)

    assert [[entry.position for entry in batch] for batch in found] == [[0], [1], [2, 3]]


def test_a_thousand_records_of_a_few_values_are_one_write() -> None:
    found = split_into_writes(entries(*[Metrics(keyed(5, 1.0))] * 2500), 1000)

    assert [len(batch) for batch in found] == [1000, 1000, 500]


@pytest.mark.parametrize(
    "payload",
    [
        Text("t", "x"),
        Table("t", ["a"], [[1]]),
        Histogram("h", [0.0, 1.0], [1.0]),
        Image("i", Blob(f"{STREAM}-0", 10, "0" * 64, "image/png"), 1, 1),
    ],
    ids=lambda payload: type(payload).__name__,
)
def test_a_write_has_a_hundred_documents_at_most(payload: Payload) -> None:
    """An SDK needs some milliseconds for each, although it has few values."""
    found = list(split_into_writes(entries(*[payload] * 1000), 1000))

    assert 50 <= max(map(len, found)) <= 100


def test_a_write_has_files_of_some_hundred_megabytes_at_most() -> None:
    large = Artifact("a", Blob(f"{STREAM}-0", 100_000_000, "0" * 64, "text/plain"), "a.bin")

    assert max(len(batch) for batch in split_into_writes(entries(*[large] * 20), 1000)) <= 3
