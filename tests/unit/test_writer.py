# SPDX-License-Identifier: Apache-2.0
"""What training code calls: what it accepts, what it refuses and how, and what then stands in the spool."""

from __future__ import annotations

import enum
import hashlib
import io
import json
import math
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import WAIT_S, new_spool, read_spool, spool_of
from trackhub.errors import RecordError, SpoolError
from trackhub.records import (
    MAX_STEP,
    Artifact,
    Histogram,
    Image,
    Metrics,
    Params,
    Payload,
    Record,
    Table,
    Tags,
    Text,
    key_problem,
)
from trackhub.spool.announce_spool import spool_env
from trackhub.spool.layout import blob_file
from trackhub.spool.reading import SpoolReader
from trackhub.spool.round_file import RoundFile
from trackhub.spool.writing import NewBlob, SpoolWriter
from trackhub.writer.writer import Writer

torch = pytest.importorskip("torch")


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Name(str):
    __slots__ = ()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    with Writer(new_spool(tmp_path / "spool")) as writer:
        yield writer


def logged(writer: Writer) -> list[Record]:
    """Return what the writer's streams hold on the disk: first the records without files."""
    spool = spool_of(writer)
    found = read_spool(spool.folder)
    assert found.keys() <= {spool.stream, spool.files_stream}
    return found.get(spool.stream, []) + found.get(spool.files_stream, [])


def payload(writer: Writer) -> Payload:
    (record,) = logged(writer)
    return record.payload


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (0.5, 0.5),
        (2**63, 2.0**63),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float64(0.1), 0.1),
        (np.int64(-5), -5.0),
        (np.bool_(True), 1.0),
        (np.array([[2.0]]), 2.0),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([3]), 3.0),
        (torch.tensor(True), 1.0),
        (torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True), 1.5),
        (math.nan, math.nan),
        (math.inf, math.inf),
        (-math.inf, -math.inf),
        (-0.0, -0.0),
        (5e-324, 5e-324),
        (np.float32("nan"), math.nan),
        (torch.tensor(math.inf), math.inf),
    ],
    ids=repr,
)
def test_numbers_of_every_kind_become_the_same_float(writer: Writer, value: Any, expected: float) -> None:
    writer.log({"x": value}, 0)
    found = payload(writer)
    assert isinstance(found, Metrics)
    assert struct.pack("<d", found.values["x"]) == struct.pack("<d", expected)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50, deadline=None
)
@given(
    st.dictionaries(st.text(min_size=1, max_size=50).filter(lambda key: not key_problem(key)), st.floats(), min_size=1)
)
def test_what_is_logged_is_what_is_spooled(tmp_path: Path, values: dict[str, float]) -> None:
    spool = new_spool(tmp_path / os.urandom(4).hex())
    with Writer(spool) as writer:
        writer.log(values, 1)
        ((record,),) = read_spool(spool).values()
    assert isinstance(record.payload, Metrics)
    assert [(k, struct.pack("<d", v)) for k, v in record.payload.values.items()] == [
        (k, struct.pack("<d", v)) for k, v in values.items()
    ]


@pytest.mark.parametrize("step", [0, 1, MAX_STEP, np.int64(7), np.uint8(7), torch.tensor(7), Level.HIGH], ids=repr)
def test_steps_are_ints_of_any_make(writer: Writer, step: Any) -> None:
    writer.log({"x": 1.0}, step)
    (record,) = logged(writer)
    assert (type(record.step), record.step) == (int, int(step))


def test_a_key_may_have_a_thousand_characters_and_any_script(writer: Writer) -> None:
    writer.log({"k" * 1000: 1.0, "Verlust/größe π 損失 🙂": 2.0})
    assert payload(writer) == Metrics({"k" * 1000: 1.0, "Verlust/größe π 損失 🙂": 2.0})


@pytest.mark.parametrize(
    "key",
    [
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "train\u00a0loss",
        "\u640d\u3000\u5931",
        "\U0001f469\u200d\U0001f467",
    ],
    ids=ascii,
)
def test_keys_of_every_script_are_stored_as_they_are(writer: Writer, key: str) -> None:
    writer.log({key: 1.0, "other": 2}, 0)
    writer.log({key: 1.0}, 1)
    writer.log_params({key: {key: 1}})
    writer.log_text(key, "x")
    metrics, again, params, text = (record.payload for record in logged(writer))
    assert metrics == Metrics({key: 1.0, "other": 2.0})
    assert again == Metrics({key: 1.0})
    assert params == Params({f"{key}/{key}": 1})
    assert text == Text(key, "x")


def test_a_record_holds_the_time_of_its_call_and_the_round(writer: Writer) -> None:
    rounds = RoundFile(spool_of(writer).folder, sets=True)
    before = time.time()
    writer.log({"x": 1.0})
    between = time.time()
    rounds.set(0)
    writer.log({"x": 2.0})
    rounds.set(7)
    writer.log_text("t", "x")
    rounds.set(None)
    writer.log({"x": 3.0})
    rounds.close()

    records = logged(writer)
    assert [r.round for r in records] == [None, 0, 7, None]
    assert [r.seq for r in records] == [0, 1, 2, 3]
    assert before <= records[0].time <= between <= records[1].time <= records[2].time <= time.time()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (2**64 - 1, 2**64 - 1),
        (0.1, 0.1),
        ("adam", "adam"),
        (Path("data/x"), "data/x"),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int32(3), 3),
        (np.bool_(False), False),
        (np.str_("adam"), "adam"),
        (torch.tensor(0.5), 0.5),
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        (Name("x"), "x"),
        ((1, [2.5, None]), [1, [2.5, None]]),
        ([{"b": (np.float64(1.5), Name("x")), 1: 2**64}], [{"b": [1.5, "x"], "1": str(2**64)}]),
        (math.inf, math.inf),
    ],
    ids=repr,
)
def test_params_of_every_kind_become_plain_values(writer: Writer, value: Any, expected: Any) -> None:
    writer.log_params({"p": value})
    found = payload(writer)
    assert isinstance(found, Params)
    assert found.values == {"p": expected}
    assert type(found.values["p"]) is type(expected)


def test_tags_become_strings(writer: Writer) -> None:
    writer.set_tags({"a": "x", "b": 1, "c": True, "d": None, "e": np.float64(0.5), "f": Name("n"), "g": Colour.RED})
    assert payload(writer) == Tags({"a": "x", "b": "1", "c": "True", "d": "None", "e": "0.5", "f": "n", "g": "red"})


def test_a_text_may_be_of_a_subclass_of_str(writer: Writer) -> None:
    writer.log_text("t", np.str_("größe"), 4)
    assert payload(writer) == Text("t", "größe")


def test_a_table_keeps_its_cells(writer: Writer) -> None:
    writer.log_table("t", ["a", 5], [(1, "x"), [None, np.float64(0.5)], (True, Name("y"))], 2)
    assert payload(writer) == Table("t", ["a", "5"], [[1, "x"], [None, 0.5], [True, "y"]])


def test_tensors_of_a_type_that_numpy_lacks_are_taken(writer: Writer) -> None:
    writer.log_histogram("h", torch.ones(100, dtype=torch.bfloat16, requires_grad=True), 1, bins=4)
    writer.log_image("i", torch.zeros((4, 4, 3), dtype=torch.bfloat16), 1)

    histogram, image = (record.payload for record in logged(writer))
    assert isinstance(histogram, Histogram)
    assert isinstance(image, Image)
    assert sum(histogram.counts) == 100


def test_a_histogram_counts_every_value(writer: Writer) -> None:
    writer.log_histogram("h", torch.arange(100.0, requires_grad=True), 1, bins=10)
    found = payload(writer)
    assert isinstance(found, Histogram)
    assert found.counts == [10.0] * 10
    assert found.edges == pytest.approx([9.9 * i for i in range(11)])


def test_a_histogram_may_be_given_as_edges_and_counts(writer: Writer) -> None:
    writer.log_histogram("h", edges=np.array([0, 0.5, 2]), counts=(3, np.int64(4)))  # type: ignore[arg-type]
    assert payload(writer) == Histogram("h", [0.0, 0.5, 2.0], [3.0, 4.0])


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (np.zeros((3, 5), np.uint8), (5, 3)),
        (np.zeros((3, 5, 1), np.uint8), (5, 3)),
        (np.zeros((3, 5, 3), np.uint8), (5, 3)),
        (np.zeros((3, 5, 4), np.float32), (5, 3)),
        (torch.ones(3, 6, 5, requires_grad=True), (5, 6)),
        (np.ones((3, 5), bool), (5, 3)),
    ],
    ids=lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") else "",
)
def test_an_image_becomes_a_png_beside_the_spool(writer: Writer, image: Any, size: tuple[int, int]) -> None:
    from PIL import Image as pil

    writer.log_image("i", image, 3, caption=Name("what it is"))

    found = payload(writer)
    assert isinstance(found, Image)
    data = blob_file(spool_of(writer).folder, found.blob.name).read_bytes()
    assert (found.width, found.height, found.caption) == (*size, "what it is")
    assert (found.blob.size, found.blob.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    with pil.open(io.BytesIO(data)) as read:
        assert (read.format, read.size) == ("PNG", size)
        expected = np.asarray(image.detach() if hasattr(image, "detach") else image)
        assert int(np.asarray(read)[..., :3].max()) == (255 if expected.max() else 0)


def test_a_jpeg_is_kept_as_it_is(writer: Writer, tmp_path: Path) -> None:
    from PIL import Image as pil

    path = tmp_path / "x.jpg"
    pil.new("RGB", (8, 4), "red").save(path)
    writer.log_image("path", path)
    writer.log_image("bytes", path.read_bytes())

    for record in logged(writer):
        assert isinstance(record.payload, Image)
        assert record.payload.blob.media_type == "image/jpeg"
        assert blob_file(spool_of(writer).folder, record.payload.blob.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", [b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"\xff\xd8\xff\xe0" + b"\1" * 40, b""])
def test_damaged_image_bytes_are_a_record_error(writer: Writer, damage: bytes) -> None:
    with pytest.raises(RecordError, match="'i'"):
        Writer(spool_of(writer).folder, strict=True).log_image("i", damage)


def test_an_image_that_is_a_bomb_is_a_record_error(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image as pil

    buffer = io.BytesIO()
    pil.new("L", (64, 64)).save(buffer, "BMP")
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(RecordError, match="'i'"):
        Writer(spool_of(writer).folder, strict=True).log_image("i", buffer.getvalue())


def test_a_huge_png_file_is_logged_as_it_is_without_a_decoder(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image as pil

    buffer = io.BytesIO()
    pil.new("L", (64, 48)).save(buffer, "PNG")
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", 16)
    writer.log_image("i", buffer.getvalue())
    image = payload(writer)
    assert isinstance(image, Image)
    assert (image.width, image.height, image.blob.size) == (64, 48, len(buffer.getvalue()))


def test_an_artifact_is_copied_at_once(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"weights" * 1000)
    writer.log_artifact(path, "models/best", "model")
    path.unlink()

    found = payload(writer)
    assert isinstance(found, Artifact)
    assert (found.key, found.filename, found.artifact_type) == ("models/best", "model.bin", "model")
    data = blob_file(spool_of(writer).folder, found.blob.name).read_bytes()
    assert (data, found.blob.size, found.blob.sha256) == (
        b"weights" * 1000,
        7000,
        hashlib.sha256(b"weights" * 1000).hexdigest(),
    )


def test_an_empty_file_is_an_artifact(writer: Writer, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    writer.log_artifact(tmp_path / "empty")
    found = payload(writer)
    assert isinstance(found, Artifact)
    assert (found.key, found.blob.size) == ("empty", 0)


def test_an_artifact_that_changes_meanwhile_is_stored_as_it_was_read(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "growing"
    with path.open("wb") as file:
        file.write(b"a" * (3 << 20))
        file.flush()
        append_blob = spool_of(writer).append_blob

        def grow(blob: NewBlob, step: int | None, log_time: float) -> None:
            file.write(b"b" * 100)
            file.flush()
            append_blob(blob, step, log_time)

        spool_of(writer).append_blob = grow  # type: ignore[method-assign]
        writer.log_artifact(path)

    found = payload(writer)
    assert isinstance(found, Artifact)
    data = blob_file(spool_of(writer).folder, found.blob.name).read_bytes()
    assert (found.blob.size, found.blob.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(data) == (3 << 20) + 100


def test_after_close_a_call_of_a_strict_writer_says_that_it_is_closed(tmp_path: Path) -> None:
    writer = Writer(new_spool(tmp_path / "spool"), strict=True)
    writer.log({"a": 1.0})
    writer.close()
    writer.close()
    with pytest.raises(SpoolError, match="closed"):
        writer.log({"a": 2.0})
    with pytest.raises(SpoolError, match="closed"):
        writer.log_image("i", np.zeros((2, 2), np.uint8))
    assert len(read_spool(tmp_path / "spool")[spool_of(writer).stream]) == 1
    assert list((tmp_path / "spool").glob("*.blob")) == []


def acknowledge(spool: Path, cursor: str = "server") -> None:
    reader = SpoolReader(spool, cursor)
    while batch := reader.next_batch(1000, 1 << 20):
        reader.settle(batch)


def test_flush_waits_for_the_acknowledgement(tmp_path: Path) -> None:
    spool = new_spool(tmp_path / "spool", "server", "client")
    with Writer(spool) as writer:
        assert writer.flush(0.0)
        writer.log({"a": 1.0})
        assert not writer.flush(0.0)
        acknowledge(spool, "server")
        assert not writer.flush(0.0)
        thread = threading.Timer(0.05, acknowledge, (spool, "client"))
        thread.start()
        assert writer.flush(WAIT_S)
        thread.join()


def test_flush_does_not_wait_for_records_that_were_dropped(tmp_path: Path) -> None:
    spool = new_spool(tmp_path / "spool", max_bytes=4096)
    with Writer(spool) as writer:
        for _ in range(200):
            writer.log({"a": 1.0})
        acknowledge(spool)
        assert writer.flush(0.0)


def test_threads_share_a_writer(writer: Writer) -> None:
    def work(n: int) -> None:
        for i in range(500):
            writer.log({"thread": n, "i": i}, i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    records = logged(writer)
    assert [r.seq for r in records] == list(range(2000))
    for n in range(4):
        values = [cast("Metrics", r.payload).values for r in records]
        assert [v["i"] for v in values if v["thread"] == n] == list(range(500))


def test_the_environment_variable_is_plain_json(tmp_path: Path) -> None:
    assert json.loads(spool_env(tmp_path, "site 1", "j")) == {"dir": str(tmp_path), "site": "site 1", "job": "j"}
    assert SpoolWriter.__doc__ is not None
