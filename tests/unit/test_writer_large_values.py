# SPDX-License-Identifier: Apache-2.0
"""Values at the ends of what a record can hold: a too large one costs itself, and no finite one is lost."""

from __future__ import annotations

import collections
import io
import itertools
import math
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from tests.unit.readers_and_bad_backends import new_spool
from tests.unit.test_writer_bad_values import count_of, payloads
from trackhub.errors import RecordError
from trackhub.records import Histogram, Image, Params, Summary, Tags
from trackhub.writer.adapters import SummaryWriter, WandBWriter
from trackhub.writer.plain_values import shown
from trackhub.writer.writer import Writer

torch = pytest.importorskip("torch")

LONG = "x" * (2 << 20)


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(new_spool(tmp_path / "spool"))


@pytest.mark.parametrize(
    "large", [LONG, ["x" * 300] * 4000, list(range(200_000)), {"a": [LONG]}], ids=["text", "texts", "ints", "dict"]
)
def test_one_too_large_value_costs_only_itself(writer: Writer, large: Any, caplog: pytest.LogCaptureFixture) -> None:
    writer.log_params({"lr": 0.1, "prompt": large, "bs": 4})
    writer.set_tags({"a": "b", "prompt": large, "c": "d"})
    writer.summarize({"best": 0.5, "prompt": large})

    assert payloads(writer) == [Params({"lr": 0.1, "bs": 4}), Tags({"a": "b", "c": "d"}), Summary({"best": 0.5})]
    count = count_of(writer)
    assert (count.logged, count.dropped, count.altered) == (3, {}, {"invalid_value": 3})
    assert all("prompt" in message for message in caplog.messages)
    assert "log_artifact" in caplog.text


def test_a_too_large_value_is_an_error_of_a_strict_writer(tmp_path: Path) -> None:
    strict = Writer(new_spool(tmp_path / "spool"), strict=True)
    with pytest.raises(RecordError, match=r"'prompt': it takes \d+ bytes encoded; expected at most"):
        strict.log_params({"lr": 0.1, "prompt": LONG})


@pytest.mark.parametrize(
    "params",
    [
        {f"k{i}": 1 for i in range(250_001)},
        {f"k{i}": "x" * 900_000 for i in range(3)},
        {f"k{i}": "y" * 9_999 for i in range(300)},
        {f"k{i}": list(range(60_000)) for i in range(3)},
        {"k" * 1000: "x" * 1_044_000, "b": 1},
    ],
    ids=["many", "long", "some", "lists", "long key"],
)
def test_params_that_fit_only_together_into_no_record_become_several(writer: Writer, params: dict[str, Any]) -> None:
    writer.log_params(params)
    found = payloads(writer)
    assert all(isinstance(part, Params) for part in found)
    assert list(itertools.chain.from_iterable(part.values.items() for part in found)) == list(params.items())  # type: ignore[union-attr]
    assert count_of(writer).altered == {}


FINITE: dict[str, Any] = {
    "one large value": np.full(3, 1e17),
    "the largest float": np.full(3, np.finfo(float).max),
    "the smallest float": np.full(3, -np.finfo(float).max),
    "both": [np.finfo(float).max, -np.finfo(float).max],
    "almost both": [1.7e308, 0.0, -1.7e308],
    "neighbours": np.linspace(1, 1 + 1e-15, 100),
    "tiny": [0.0, 5e-324],
    "the largest int": np.array([2**64 - 1, 2**64 - 1], np.uint64),
    "nanoseconds": np.array([1_700_000_000_000_000_000, 1_700_000_000_000_000_100]),
    "a list of losses": [torch.tensor(0.5, requires_grad=True), torch.tensor(2.0)],
    "a list of tensors": [torch.ones(2, requires_grad=True), torch.zeros(2, dtype=torch.bfloat16)],
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a tensor of 8 bits": torch.ones(3).to(torch.float8_e4m3fn),
    "bools": torch.tensor([True, False]),
    "nothing": [],
}


@pytest.mark.parametrize("what", FINITE)
def test_finite_values_of_any_size_and_type_become_a_histogram(writer: Writer, what: str) -> None:
    values = FINITE[what]
    writer.log_histogram("h", values, bins=30)

    (found,) = payloads(writer)
    assert isinstance(found, Histogram)
    assert all(map(math.isfinite, found.edges))
    assert all(low < high for low, high in itertools.pairwise(found.edges))
    assert 1 <= len(found.counts) <= 30
    sizes = {"a list of tensors": 4, "a sparse tensor": 9}
    assert sum(found.counts) == sizes.get(what, len(values))
    assert count_of(writer).altered == {}


def test_complex_numbers_are_in_no_histogram_whatever_their_library(writer: Writer) -> None:
    writer.log_histogram("h", np.ones(3, complex))
    writer.log_histogram("h", torch.ones(3, dtype=torch.complex64))
    assert count_of(writer).dropped == {"invalid_value": 2}


@pytest.mark.parametrize("bins", [0, -1, 50_000, 10**9, 10**30, "auto", None, 1.5])
def test_a_number_of_bins_out_of_range_is_refused_before_any_memory_is_taken(tmp_path: Path, bins: Any) -> None:
    strict = Writer(new_spool(tmp_path / "spool"), strict=True)
    with pytest.raises(RecordError, match=r"bins .*; expected a whole number from 1 to 49999"):
        strict.log_histogram("h", [1.0, 2.0], bins=bins)
    strict.log_histogram("h", np.arange(1e5), bins=49_999)


@pytest.mark.parametrize("kind", ["t" * 256, "t" * 300], ids=["a little", "more"])
def test_an_artifact_type_that_no_reader_could_decode_is_refused(
    writer: Writer, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "f"
    path.write_text("x")
    writer.log_artifact(path, type=kind)
    writer.log_artifact(path, type="t" * 255)
    assert [getattr(payload, "artifact_type", None) for payload in payloads(writer)] == ["t" * 255]
    assert "invalid_value" in caplog.text
    assert "type of artifact 'f' has" in caplog.text


def test_a_bad_name_of_a_parameter_costs_only_its_histogram(writer: Writer) -> None:
    writer.log_model_histograms({"a": [1.0], None: [1.0], "b\n": [1.0], 5: [1.0], "c": object(), "d": [1.0]})
    assert [one.key for one in payloads(writer) if isinstance(one, Histogram)] == [
        "parameters/a", "parameters/5", "parameters/d"
    ]  # fmt: skip
    assert count_of(writer).dropped == {"invalid_value": 3}


def test_a_bad_image_of_a_grid_leaves_its_cell_empty(writer: Writer) -> None:
    white = np.ones((2, 2))
    log: Callable[..., None] = writer.log_images
    log("grid", [white, np.full((2, 2), 9.5), white], columns=3, captions=None)
    log("all bad", [np.full((2, 2), 9.5)], columns=3)

    (image,) = [payload for payload in payloads(writer) if isinstance(payload, Image)]
    assert (image.key, image.width, image.height) == ("grid", 2 + 2 + 2 + 2 + 2, 2)


def test_an_image_takes_no_caption_and_an_open_file(writer: Writer, tmp_path: Path) -> None:
    file = io.BytesIO()
    Pillow.new("L", (3, 2)).save(file, "PNG")  # now it is at its end
    (tmp_path / "a.png").write_bytes(file.getvalue())
    log: Callable[..., None] = writer.log_image
    log("i", file, caption=None)
    with open(tmp_path / "a.png", "rb") as opened:
        log("i", opened)
    log("i", np.zeros((2, 3)), caption=None)
    assert [(p.width, p.height, p.caption) for p in payloads(writer) if isinstance(p, Image)] == [(3, 2, "")] * 3


class Dataset(Sequence[Any]):
    """A million samples, each of which takes long to load."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("a sample was loaded")


def shared(levels: int) -> list[Any]:
    """Return lists of ten: ten to the power of ``levels`` values, in as many objects as there are levels."""
    values: list[Any] = [0.5] * 10
    for _ in range(levels - 1):
        values = [values] * 10
    return values


ENDLESS: dict[str, Callable[[Any], Any]] = {
    "a range": lambda w: w.log_params({"indices": range(10**12)}),
    "a set": lambda w: w.log_params({"indices": set(range(200_000))}),
    "a data set": lambda w: w.log_params({"data": Dataset()}),
    "shared lists": lambda w: w.log_params({"net": shared(15)}),
    "a data set as a tag": lambda w: w.set_tags({"data": Dataset()}),
    "rows": lambda w: w.log_table("t", ["a"], ([i] for i in itertools.count())),
    "rows without cells": lambda w: w.log_table("t", [], ([] for _ in itertools.count())),
    "cells": lambda w: w.log_table("t", ["a"], [itertools.count()]),
    "a column": lambda w: w.log_table("t", {"a": itertools.count()}),
    "column names": lambda w: w.log_table("t", itertools.count(), [[1]]),
    "a data set as a table": lambda w: w.log_table("t", Dataset()),
    "a data set in a cell": lambda w: w.log_table("t", ["a"], [[Dataset()]]),
    "edges": lambda w: w.log_histogram("h", edges=itertools.count(), counts=[1]),
    "counts": lambda w: w.log_histogram("h", edges=[0, 1], counts=itertools.repeat(1)),
    "images": lambda w: w.log_images("i", itertools.repeat(np.ones((2, 2)))),
    "images of a grid": lambda w: w.log_images("i", itertools.repeat(np.ones((2, 2))), columns=2),
    "captions": lambda w: w.log_images("i", [np.ones((2, 2))], captions=itertools.repeat("")),
    "buckets": lambda w: SummaryWriter(writer=w).add_histogram_raw("h", 0, 1, 1, 1, 1, itertools.count(), [1]),
    "tags": lambda w: WandBWriter(writer=w, tags=itertools.count()),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_is_a_data_set_or_has_no_end_is_not_read_to_its_end(tmp_path: Path, what: str) -> None:
    with pytest.raises(RecordError, match=r"more than 1\d*,000 .*; log a file of them with log_artifact"):
        ENDLESS[what](Writer(new_spool(tmp_path / "spool"), strict=True))


REPRS: list[Any] = [
    [], [1, "a"], (), (1,), (1, 2), {}, {"a": [1]}, set(), {1}, frozenset({1}), b"x", "it's", 1.5, None, [[[[1]]]],
    collections.deque([1]), "x" * 80,
]  # fmt: skip


@pytest.mark.parametrize("value", REPRS, ids=repr)
def test_a_message_shows_a_short_value_as_python_does(value: Any) -> None:
    assert shown(value) == repr(value) or len(repr(value)) > 80


LARGE: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"x" * 10_000_000,
    "a text": lambda: "x" * 10_000_000,
    "a list": lambda: [1.5] * 1_000_000,
    "a list in a tuple": lambda: ([1.5] * 1_000_000,),
    "a dict": lambda: dict.fromkeys(range(100_000)),
    "a set": lambda: set(range(100_000)),
    "an ordered dict": lambda: collections.OrderedDict.fromkeys(range(100_000)),
    "shared lists": lambda: shared(15),
}


@pytest.mark.parametrize("what", LARGE)
def test_a_message_makes_no_text_of_the_end_of_a_large_value(what: str) -> None:
    value = LARGE[what]()
    tracemalloc.start()
    try:
        text = shown(value)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(text), text[-3:]) == (83, "...")
    assert most_bytes < 100_000
