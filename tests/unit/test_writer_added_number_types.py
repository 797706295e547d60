# SPDX-License-Identifier: Apache-2.0
"""Numbers of types that a library adds to NumPy, as JAX, TensorFlow and Keras have them, and numbers as keys."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from tests.unit.readers_and_bad_backends import new_spool, read_spool, spool_of
from trackhub.records import Histogram, Image, Metrics, Params, Payload, Text
from trackhub.spool.layout import blob_file
from trackhub.writer.writer import Writer


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(new_spool(tmp_path / "spool"), strict=True)


def payloads(writer: Writer) -> list[Payload]:
    """Return what was logged: images last, since they are in a stream of their own."""
    found = [record.payload for records in read_spool(spool_of(writer).folder).values() for record in records]
    return sorted(found, key=lambda payload: isinstance(payload, Image))


def pixels(writer: Writer, image: Payload) -> Any:
    assert isinstance(image, Image)
    with Pillow.open(io.BytesIO(blob_file(spool_of(writer).folder, image.blob.name).read_bytes())) as found:
        return np.asarray(found)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"])
def test_numbers_of_ml_dtypes_are_numbers_everywhere(writer: Writer, name: str) -> None:
    one = getattr(pytest.importorskip("ml_dtypes"), name)(1)
    writer.log({"scalar": one, "array": np.array(one), "list of one": np.array([one])}, one)
    writer.log_params({"scalar": one, "array": np.array([one, one])})
    writer.log_histogram("h", np.array([one, one]), bins=1)
    writer.log_image("i", np.array([[one, one * 0]]))

    metrics, params, histogram, image = payloads(writer)
    assert metrics == Metrics({"scalar": 1.0, "array": 1.0, "list of one": 1.0})
    assert params == Params({"scalar": 1, "array": [1, 1]})
    assert histogram == Histogram("h", [0.5, 1.5], [2.0])
    np.testing.assert_array_equal(pixels(writer, image), [[255, 0]])


@pytest.mark.parametrize(
    "value",
    [np.zeros(1, [("a", "f8")])[0], np.void(b"12345678"), np.complex64(1), np.datetime64("2026-01-01")],
    ids=["structure", "bytes", "complex", "date"],
)
def test_structures_and_dates_are_still_no_numbers(tmp_path: Path, value: Any) -> None:
    writer = Writer(new_spool(tmp_path / "spool"))
    writer.log({"a": value, "good": 1.0})
    writer.log_histogram("h", np.array([value]))
    assert payloads(writer)[0] == Metrics({"good": 1.0})
    assert not any(isinstance(payload, Histogram) for payload in payloads(writer))


@pytest.mark.parametrize("key", [np.int64(5), np.uint8(5), np.array(5), 5], ids=lambda key: type(key).__name__)
def test_a_whole_number_is_a_key_of_every_kind_of_record(writer: Writer, key: Any) -> None:
    if not isinstance(key, np.ndarray):  # it cannot be in a dict
        writer.log({"acc": {key: 0.5}, key: 1.0})
        writer.log_params({"acc": {key: 0.5}, "list": [{key: 1}]})
    writer.log_text(key, "x")
    writer.log_histogram(key, [1.0])
    writer.log_image(key, [[0.0]])
    writer.log_table(key, {"a": [1]})

    found = payloads(writer)
    assert [getattr(one, "key", "5") for one in found] == ["5"] * len(found)
    assert Text("5", "x") in found
    if not isinstance(key, np.ndarray):
        assert found[:2] == [Metrics({"acc/5": 0.5, "5": 1.0}), Params({"acc/5": 0.5, "list": [{"5": 1}]})]
