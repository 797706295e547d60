# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.util import tensor_util
from trackhub_tensorboard import events

from trackhub.records import Gap
from trackhub.spi import Artifact, Entry, Histogram, Image, Metrics, Params, RunStatus, Table, Tags, Text
from trackhub.spi import Summary as FinalValues

if TYPE_CHECKING:
    from backends.tensorboard.tests.conftest import Rig

Read = Callable[[Path], EventAccumulator]
MakeEntry = Callable[..., Entry]


def points(accumulator: EventAccumulator, key: str) -> list[tuple[int, float, float]]:
    return [(event.step, event.value, event.wall_time) for event in accumulator.Scalars(key)]


def arrays(accumulator: EventAccumulator, tag: str) -> list[tuple[int, Any]]:
    return [(event.step, tensor_util.make_ndarray(event.tensor_proto)) for event in accumulator.Tensors(tag)]


def texts(accumulator: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    assert accumulator.SummaryMetadata(tag).plugin_data.plugin_name == "text"
    return [(step, array.item().decode()) for step, array in arrays(accumulator, tag)]


def test_scalars_keep_step_value_and_the_time_of_the_log_call(rig: Rig, entry: MakeEntry, read: Read) -> None:
    run = rig.open()

    run.write([entry(0, Metrics({"loss": 0.1}), step=7, time=1764000000.123456)])

    assert points(read(rig.folder()), "loss") == [(7, float(np.float32(0.1)), 1764000000.123456)]


def test_values_are_rounded_to_float32(rig: Rig, entry: MakeEntry, read: Read) -> None:
    values = [0.1, -1e-3, 1e308, -1e308, 1e-50, 16777217.0, math.nan, math.inf, -math.inf]

    rig.open().write([entry(position, Metrics({"x": value})) for position, value in enumerate(values)])

    with np.errstate(over="ignore"):
        expected = np.array(values, dtype=np.float32)
    np.testing.assert_array_equal([value for _, value, _ in points(read(rig.folder()), "x")], expected)


@pytest.mark.parametrize("keys", [100, 1000])
def test_keys_that_are_logged_one_by_one_cost_one_event_each(
    rig: Rig, entry: MakeEntry, monkeypatch: pytest.MonkeyPatch, keys: int
) -> None:
    """As ``add_scalar`` does. An event that is made anew takes most of a record's time."""
    made: list[Event] = []

    def make(*args: Any, **fields: Any) -> Event:
        made.append(Event(*args, **fields))
        return made[-1]

    monkeypatch.setattr(events, "Event", make)
    logged = [(f"layer/{i}", step) for step in range(3) for i in range(keys)]

    rig.open().write([entry(i, Metrics({key: 1.0}), step=step) for i, (key, step) in enumerate(logged)])

    assert len(made) == keys


def test_an_encoder_keeps_few_events_however_many_keys_there_are(rig: Rig, entry: MakeEntry) -> None:
    encoder = events.Encoder(rig.info(), [])

    for i in range(10_000):
        encoder.encode(entry(i, Metrics({f"k{i}": 1.0, "a": 1.0}), step=i))

    assert sum(len(kept.slots) for kept in encoder._scalar_events.values()) <= 4096


def test_sets_of_keys_that_take_turns_keep_their_own_values(rig: Rig, entry: MakeEntry, read: Read) -> None:
    """The encoder fills in the last event with the same keys again, and must leave nothing of the old values in it."""
    sets: list[dict[str, float]] = [{"a": 1.0}, {"a": 2.0, "b": 3.0}, {"b": 4.0}, {"b": 5.0, "a": 6.0}, {}, {"a": 7.0}]
    many = [{f"k{i}": float(i)} for i in range(5000)]  # more keys than an encoder keeps events for

    logged = [*sets, *many, *sets]

    rig.open().write([entry(i, Metrics(values), step=i) for i, values in enumerate(logged)])

    accumulator = read(rig.folder())
    for key in ("a", "b", "k0", "k199"):
        expected = [(i, values[key]) for i, values in enumerate(logged) if key in values]
        assert [(step, value) for step, value, _ in points(accumulator, key)] == expected


def test_late_and_repeated_steps_are_kept_in_order(rig: Rig, entry: MakeEntry, read: Read) -> None:
    steps = [5, 6, 3, 3, 2**63 - 1, 0, 6]

    rig.open().write(
        [entry(position, Metrics({"x": float(position)}), step=step) for position, step in enumerate(steps)]
    )

    assert [(step, value) for step, value, _ in points(read(rig.folder()), "x")] == [
        (step, float(position)) for position, step in enumerate(steps)
    ]


def test_keys_logged_together_stay_together(rig: Rig, entry: MakeEntry, read: Read) -> None:
    rig.open().write([entry(0, Metrics({"a": 1.0, "b/c": 2.0}), step=4)])

    accumulator = read(rig.folder())
    assert points(accumulator, "a") == [(4, 1.0, 1000.0)]
    assert points(accumulator, "b/c") == [(4, 2.0, 1000.0)]


@pytest.mark.parametrize("key", ["train/loss", "Verlust ü/漢字 🎉", "a b", "/", "..", "with\nline feed", "k" * 1000])
def test_any_key_is_kept_as_it_is(rig: Rig, entry: MakeEntry, read: Read, key: str) -> None:
    rig.open().write([entry(0, Metrics({key: 1.0}))])

    assert read(rig.folder()).Tags()["scalars"] == [key]


def test_text_is_kept_verbatim_for_the_text_dashboard(rig: Rig, entry: MakeEntry, read: Read) -> None:
    rig.open().write([entry(0, Text("note", "# Grüße\n**bold** 漢字"), step=2), entry(1, Text("note", ""), step=2)])

    assert texts(read(rig.folder()), "note") == [(2, "# Grüße\n**bold** 漢字"), (2, "")]


def test_a_table_is_a_markdown_table_whose_cells_read_as_logged(rig: Rig, entry: MakeEntry, read: Read) -> None:
    table = Table("t", ["class", "a|b"], [["cat*", 0.5], [None, True], ["<b>&\nx_y_", math.nan]])

    rig.open().write([entry(0, table, step=1)])

    ((step, text),) = texts(read(rig.folder()), "t")
    assert step == 1
    assert text.splitlines() == [
        r"| class | a\|b |",
        "| --- | --- |",
        r"| cat\* | 0.5 |",
        "| null | true |",
        r"| &lt;b>&amp;<br>x\_y\_ | NaN |",
    ]


def test_params_and_tags_are_tables_of_text(rig: Rig, entry: MakeEntry, read: Read) -> None:
    run = rig.open()

    run.write(
        [entry(0, Params({"lr": 0.1, "sizes": [1, 2]})), entry(1, Params({"lr": 0.2})), entry(2, Tags({"a": "b"}))]
    )

    accumulator = read(rig.folder())
    assert texts(accumulator, "params") == [
        (0, "| param | value |\n| --- | --- |\n| lr | 0.1 |\n| sizes | \\[1, 2\\] |"),
        (1, "| param | value |\n| --- | --- |\n| lr | 0.2 |"),
    ]
    assert texts(accumulator, "tags") == [(2, "| tag | value |\n| --- | --- |\n| a | b |")]


def test_an_image_keeps_its_bytes_and_its_caption(rig: Rig, entry: MakeEntry, read: Read) -> None:
    content = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    image = Image("samples", rig.blob("stream-0", content), width=4, height=3, caption="cat, dog")

    rig.open().write([entry(0, image, step=9)])

    accumulator = read(rig.folder())
    ((step, parts),) = arrays(accumulator, "samples")
    assert (step, list(parts)) == (9, [b"4", b"3", content])
    assert accumulator.SummaryMetadata("samples").plugin_data.plugin_name == "images"
    assert texts(accumulator, "samples/caption") == [(9, "cat, dog")]


def test_an_image_whose_file_is_gone_is_rejected_alone(rig: Rig, entry: MakeEntry, read: Read) -> None:
    blob = rig.blob("stream-1", b"x")
    (rig.blob_dir / blob.name).unlink()
    run = rig.open()

    report = run.write([entry(0, Metrics({"x": 0.0})), entry(1, Image("i", blob, 1, 1)), entry(2, Metrics({"x": 2.0}))])

    assert report is not None
    assert [(rejection.position, rejection.reason) for rejection in report.rejected] == [(1, "blob_missing")]
    assert [step for step, _, _ in points(read(rig.folder()), "x")] == [0, 2]
    assert run.next_position() == 3


def test_a_payload_of_an_unknown_kind_is_rejected_alone(rig: Rig, entry: MakeEntry, read: Read) -> None:
    """A newer trackhub may have more kinds."""
    unknown: Any = Gap(1, "spool_full")

    report = rig.open().write([entry(0, unknown), entry(1, Metrics({"x": 1.0}))])

    assert report is not None
    assert [(rejection.position, rejection.reason) for rejection in report.rejected] == [(0, "unsupported_kind")]
    assert [step for step, _, _ in points(read(rig.folder()), "x")] == [1]


def test_an_artifact_is_a_text_with_its_name_size_and_digest(rig: Rig, entry: MakeEntry, read: Read) -> None:
    blob = rig.blob("stream-2", b"weights")

    report = rig.open().write([entry(0, Artifact("model", blob, "model|1.pt", "model"))])

    assert report is None
    ((_, text),) = texts(read(rig.folder()), "model")
    assert (
        text
        == f"| file | type | bytes | sha256 |\n| --- | --- | --- | --- |\n| model\\|1.pt | model | 7 | {blob.sha256} |"
    )


def test_final_values_are_a_table_of_text(rig: Rig, entry: MakeEntry, read: Read) -> None:
    rig.open().write([entry(0, FinalValues({"best": 0.5, "note": "early", "ok": True}))])

    assert texts(read(rig.folder()), "summary") == [
        (0, "| final value | value |\n| --- | --- |\n| best | 0.5 |\n| note | early |\n| ok | true |")
    ]


def test_a_histogram_keeps_edges_and_counts_exactly(rig: Rig, entry: MakeEntry, read: Read) -> None:
    edges, counts = [-1.0, 0.1, 0.25, 3.0], [0.0, 5.0, 1e10 + 1]

    rig.open().write([entry(0, Histogram("h", edges, counts), step=1)])

    accumulator = read(rig.folder())
    ((_, rows),) = arrays(accumulator, "h")
    assert rows.tolist() == [[-1.0, 0.1, 0.0], [0.1, 0.25, 5.0], [0.25, 3.0, 1e10 + 1]]
    assert accumulator.SummaryMetadata("h").plugin_data.plugin_name == "histograms"


def test_one_key_for_records_of_two_kinds_gives_two_tags(rig: Rig, entry: MakeEntry, read: Read) -> None:
    """Each kind keeps its tag after the run was reopened."""
    run = rig.open()
    run.write([entry(0, Metrics({"x": 0.0})), entry(1, Text("x", "one")), entry(2, Text("x (text)", "other"))])
    run.finish(RunStatus.FINISHED)

    rig.open().write([entry(3, Text("x", "two")), entry(4, Metrics({"x": 4.0})), entry(5, Text("x (text)", "more"))])

    accumulator = read(rig.folder())
    assert [value for _, value, _ in points(accumulator, "x")] == [0.0, 4.0]
    assert texts(accumulator, "x (text)") == [(1, "one"), (3, "two")]
    assert texts(accumulator, "x (text) (text)") == [(2, "other"), (5, "more")]
