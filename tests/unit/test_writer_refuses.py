# SPDX-License-Identifier: Apache-2.0
"""Bad arguments of a strict writer: each a clear error at the call, and nothing is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.readers_and_bad_backends import new_spool, read_spool, spool_of
from trackhub.errors import RecordError
from trackhub.records import Metrics, Payload, Record
from trackhub.writer.writer import Writer

torch = pytest.importorskip("torch")


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    with Writer(new_spool(tmp_path / "spool"), strict=True) as writer:
        yield writer


def logged(writer: Writer) -> list[Record]:
    """Return what the writer's stream holds on the disk."""
    (records,) = read_spool(spool_of(writer).folder).values()
    return records


def payload(writer: Writer) -> Payload:
    (record,) = logged(writer)
    return record.payload


def test_a_call_of_too_many_values_is_refused_with_their_number(writer: Writer) -> None:
    """The receiver would refuse the record."""
    with pytest.raises(RecordError, match="10001 metrics are logged together; expected at most 10000; log them in"):
        writer.log({f"k{i}": 1.0 for i in range(10_001)}, step=0)
    with pytest.raises(RecordError, match=r"table 'preds': more than 100,000 .*; log a file"):
        writer.log_table("preds", list("abc"), [[0, 1, 2]] * 40_000)
    assert read_spool(spool_of(writer).folder) == {}


BAD_KEYS: dict[str, Any] = {
    "empty": "",
    "10,000 characters": "k" * 10_000,
    "None": None,
    "bytes": b"loss",
    "a tuple": ("a", "b"),
    "a newline": "a\nb",
    "a NUL": "a\0b",
    "DEL": "a\x7f",
    "a next line": "a\x85",
    "a line separator": "a\u2028",
    "a paragraph separator": "\u2029a",
    "a lone surrogate": "a\ud800",
}
BAD_METRICS: dict[str, Any] = {
    "a string": "0.5",
    "a complex": 1 + 2j,
    "a complex of numpy": np.complex64(1),
    "None": None,
    "a tensor of 2": torch.zeros(2),
    "an array of 2": np.zeros(2),
    "an empty array": np.zeros(0),
    "a list": [1.0],
    "a string of numpy": np.str_("1"),
    "a date of numpy": np.datetime64("2026-01-01"),
    "too large for a float": 10**400,
    "too large to print": 10**5000,
    "an object without a repr": Unprintable(),
}
BAD_STEPS: dict[str, Any] = {
    "negative": -1,
    "a float": 1.5,
    "a string": "1",
    "a bool": True,
    "too large": 2**63,
    "too large to print": 10**5000,
    "a tensor of a float": torch.tensor(1.5),
    "a tensor of 2": torch.tensor([1, 2]),
}
METHODS: dict[str, Callable[[Writer, Any], None]] = {
    "log": lambda w, key: w.log({key: 1.0}),
    "log_params": lambda w, key: w.log_params({key: 1}),
    "set_tags": lambda w, key: w.set_tags({key: "x"}),
    "log_text": lambda w, key: w.log_text(key, "x"),
    "log_image": lambda w, key: w.log_image(key, np.zeros((2, 2), np.uint8)),
    "log_histogram": lambda w, key: w.log_histogram(key, [1.0]),
    "log_table": lambda w, key: w.log_table(key, ["a"], [[1]]),
    "log_artifact": lambda w, key: w.log_artifact(__file__, key),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", BAD_KEYS)
def test_a_bad_key_is_an_error_that_names_it_and_nothing_is_recorded(writer: Writer, method: str, what: str) -> None:
    if method == "log_artifact" and what == "None":
        pytest.skip("None means the file's own name")
    with pytest.raises(RecordError, match=r"key .*expected") as caught:
        METHODS[method](writer, BAD_KEYS[what])
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()
    assert spool_of(writer).next_seq == 0


@pytest.mark.parametrize("what", BAD_METRICS)
def test_a_metric_that_is_no_number_is_an_error_that_names_its_key(writer: Writer, what: str) -> None:
    with pytest.raises(RecordError, match="'train/loss'"):
        writer.log({"fine": 1.0, "train/loss": BAD_METRICS[what]}, 1)
    assert spool_of(writer).next_seq == 0


@pytest.mark.parametrize("what", BAD_STEPS)
def test_a_bad_step_is_an_error_that_says_what_is_expected(writer: Writer, what: str) -> None:
    for values in ({"loss": 1.0}, {"loss": 1}):
        with pytest.raises(RecordError, match=r"^step .*expected"):
            writer.log(values, BAD_STEPS[what])
    with pytest.raises(RecordError, match=r"^step .*expected"):
        writer.log_image("x", np.zeros((2, 2), np.uint8), BAD_STEPS[what])
    assert spool_of(writer).next_seq == 0
    assert list(spool_of(writer).folder.glob("*.blob")) == []


@pytest.mark.parametrize("metrics", [None, 1.0, [("a", 1.0)], "loss"], ids=repr)
def test_metrics_are_a_mapping(writer: Writer, metrics: Any) -> None:
    with pytest.raises(RecordError, match="mapping"):
        writer.log(metrics)


@pytest.mark.parametrize(
    "call",
    {
        "text is no str": lambda w: w.log_text("t", 5),
        "text is too long": lambda w: w.log_text("t", "x" * (1 << 20)),
        "text cannot be encoded": lambda w: w.log_text("t", "\ud800"),
        "param is nested without end": lambda w: w.log_params({"p": endless()}),
        "tag cannot be encoded": lambda w: w.set_tags({"t": "\ud800"}),
        "table with a short row": lambda w: w.log_table("t", ["a", "b"], [[1, 2], [3]]),
        "table without rows": lambda w: w.log_table("t", ["a"], 5),
        "table with a row that is no list": lambda w: w.log_table("t", ["a"], [5]),
        "table without columns": lambda w: w.log_table("t", None, []),
        "table that is too large": lambda w: w.log_table("t", ["a"], [["x" * 1000]] * 2000),
        "histogram of nothing": lambda w: w.log_histogram("h"),
        "histogram of both": lambda w: w.log_histogram("h", [1], edges=[0, 1], counts=[1]),
        "histogram of edges alone": lambda w: w.log_histogram("h", edges=[0, 1]),
        "histogram of NaN": lambda w: w.log_histogram("h", [math.nan]),
        "histogram of strings": lambda w: w.log_histogram("h", ["a"]),
        "histogram with no bins": lambda w: w.log_histogram("h", [1.0], bins=0),
        "histogram with unordered edges": lambda w: w.log_histogram("h", edges=[0, 2, 1], counts=[1, 1]),
        "histogram with infinite edges": lambda w: w.log_histogram("h", edges=[0, math.inf], counts=[1]),
        "histogram with a count too many": lambda w: w.log_histogram("h", edges=[0, 1], counts=[1, 1]),
        "histogram with a negative count": lambda w: w.log_histogram("h", edges=[0, 1], counts=[-1]),
        "histogram with one count": lambda w: w.log_histogram("h", edges=[0, 1], counts=5),
        "artifact that does not exist": lambda w: w.log_artifact("/no/such/file"),
        "artifact that is a folder": lambda w: w.log_artifact("/"),
        "artifact that is no path": lambda w: w.log_artifact(5),
        "artifact that is a device": lambda w: w.log_artifact("/dev/null"),
        "artifact whose path has a NUL": lambda w: w.log_artifact("a\0b"),
        "artifact with a type that is no str": lambda w: w.log_artifact(__file__, type=5),
        "image of a wrong shape": lambda w: w.log_image("i", np.zeros((5, 5, 7), np.uint8)),
        "image without pixels": lambda w: w.log_image("i", np.zeros((0, 4), np.uint8)),
        "image of complex numbers": lambda w: w.log_image("i", np.zeros((2, 2), complex)),
        "image out of range": lambda w: w.log_image("i", np.full((2, 2), 1.5)),
        "image of NaN": lambda w: w.log_image("i", np.full((2, 2), math.nan)),
        "image that does not exist": lambda w: w.log_image("i", "/no/such/file.png"),
        "image of bytes that are none": lambda w: w.log_image("i", b"GIF of nothing"),
        "image of an object": lambda w: w.log_image("i", object()),
        "image with a caption that is no str": lambda w: w.log_image("i", np.zeros((2, 2), np.uint8), caption=5),
        "image with a caption that cannot be encoded": lambda w: w.log_image("i", np.zeros((2, 2)), caption="\ud800"),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_bad_argument_is_an_error_and_nothing_is_recorded(
    writer: Writer, call: tuple[str, Callable[[Writer], None]]
) -> None:
    with pytest.raises(RecordError) as caught:
        call[1](writer)
    assert len(str(caught.value)) < 1000
    assert spool_of(writer).next_seq == 0
    assert list(spool_of(writer).folder.glob("*.blob")) == []
    writer.log({"after": 1.0})
    assert [r.payload for r in logged(writer)] == [Metrics({"after": 1.0})]


def endless() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner
