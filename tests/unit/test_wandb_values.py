# SPDX-License-Identifier: Apache-2.0
"""What ``wandb.log`` takes beside numbers, with W&B's own types: each becomes a record of its kind."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image as Pillow

from tests.unit.readers_and_bad_backends import new_spool, read_spool, spool_of
from tests.unit.test_writer_bad_values import Evil, count_of, payloads
from tests.unit.test_wrong_calls import dropped
from trackhub.records import Artifact, Histogram, Image, Metrics, Params, Table, Tags, Text
from trackhub.spool.reading import SpoolReader
from trackhub.writer.adapters import WandBWriter
from trackhub.writer.writer import Writer

wandb = pytest.importorskip("wandb")


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(new_spool(tmp_path / "spool"), strict=True)


def logged(writer: Writer) -> list[Any]:
    records = [record for records in read_spool(spool_of(writer).folder).values() for record in records]
    assert {record.step for record in records} == {3}
    return [record.payload for record in records]


def test_values_of_one_call_become_records_of_their_kinds(writer: Writer) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.subplots()
    pixels = np.zeros((4, 4, 3), np.uint8)
    values = {
        "loss": 0.5,
        "note": "text",
        "figure": figure,
        "pillow": Pillow.new("L", (2, 2)),
        "image": wandb.Image(pixels, caption="c"),
        "images": [wandb.Image(pixels), wandb.Image(pixels, caption="second")],
        "histogram": wandb.Histogram([1.0, 2.0, 2.0], num_bins=4),
        "table": wandb.Table(columns=["a", "b"], data=[[1, "x"]]),
        "html": wandb.Html("<b>bold</b>"),
        "nested": {"acc": 0.25},
    }
    WandBWriter(writer=writer).log(values, step=3)

    found = logged(writer)
    assert [p for p in found if isinstance(p, Metrics)] == [Metrics({"loss": 0.5, "nested/acc": 0.25})]
    images = {p.key: p.caption for p in found if isinstance(p, Image)}
    assert images == {"figure": "", "pillow": "", "image": "c", "images/0": "", "images/1": "second"}
    (histogram,) = (p for p in found if isinstance(p, Histogram))
    assert (len(histogram.counts), sum(histogram.counts)) == (4, 3)
    assert [p for p in found if isinstance(p, Table)] == [Table("table", ["a", "b"], [[1, "x"]])]
    texts = {p.key: p.text for p in found if isinstance(p, Text)}
    assert texts["note"] == "text"
    assert "<b>bold</b>" in texts["html"]


def test_values_in_nested_mappings_become_records_too(writer: Writer) -> None:
    values: Any = {"val": {"acc": 0.5, "note": "x", 7: wandb.Image(np.zeros((2, 2)))}, 5: "t"}
    WandBWriter(writer=writer).log(values, 3)

    found = logged(writer)
    assert [p for p in found if isinstance(p, Metrics)] == [Metrics({"val/acc": 0.5})]
    assert {p.key for p in found if isinstance(p, Image | Text)} == {"val/note", "val/7", "5"}


def test_tables_charts_and_arrays_become_the_records_that_fit(writer: Writer) -> None:
    frame = pd.DataFrame({"a": [1, 2]})
    chart = wandb.plot.line(wandb.Table(data=[[0, 1.5]], columns=["x", "y"]), "x", "y")
    picture = wandb.Table(columns=["i", "x"], data=[[1, wandb.Image(np.zeros((2, 2)))]])
    values = {"frame": frame, "chart": chart, "picture": picture, "weights": np.ones((2, 3)), "two": [np.ones(2)] * 2}
    WandBWriter(writer=writer).log(values, 3)

    found = logged(writer)
    assert {p.key: p.rows for p in found if isinstance(p, Table)} == {
        "frame": [[1], [2]], "chart": [[0, 1.5]], "picture": [[1, "picture/0/x"]],
    }  # fmt: skip
    assert [p.key for p in found if isinstance(p, Image)] == ["picture/0/x"]
    assert {p.key: sum(p.counts) for p in found if isinstance(p, Histogram)} == {"weights": 6, "two/0": 2, "two/1": 2}


def test_one_value_that_raises_costs_itself_and_no_neighbour(tmp_path: Path) -> None:
    writer = Writer(new_spool(tmp_path / "spool"))
    WandBWriter(writer=writer).log({"loss": 1, "x": Evil(), "image": Pillow.new("L", (2, 2)), "t": "text"}, 3)

    assert {type(found) for found in logged(writer)} == {Metrics, Image, Text}
    counts = SpoolReader(spool_of(writer).folder, "server").counts().values()
    assert [count.altered for count in counts if count.altered] == [{"invalid_value": 1}]


class NoRows:
    """Looks like a DataFrame, but its rows cannot be read: so does cuDF's."""

    columns = ("a",)
    shape = (1, 1)

    def itertuples(self, **kwargs: Any) -> Any:
        raise TypeError("cuDF does not support iteration of DataFrame via itertuples")


CustomChart = type("CustomChart", (), {"__module__": "wandb.viz"})  # as in an old W&B: without a table
BareHistogram = type("Histogram", (), {"__module__": "wandb.sdk"})


@pytest.mark.parametrize("odd", [NoRows(), CustomChart(), BareHistogram()], ids=lambda odd: type(odd).__name__)
def test_a_value_that_fails_while_it_is_read_costs_only_itself(
    tmp_path: Path, odd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    writer = Writer(new_spool(tmp_path / "spool"))
    pixels = Pillow.new("L", (2, 2))
    table = wandb.Table(columns=["a", "b"], data=[[1, 2]])
    table.data[0][1] = odd
    WandBWriter(writer=writer).log(
        {"odd": odd, "several": [odd, pixels], "table": table, "note": "text", "loss": 0.5}, 3
    )

    found = payloads(writer)
    assert Metrics({"loss": 0.5}) in found
    assert Text("note", "text") in found
    assert {p.key for p in found if isinstance(p, Table | Image)} == {"table", "several/1"}
    in_table = 0 if isinstance(odd, NoRows) else 1  # any other object in a cell is logged as its text
    assert dropped(writer) == {"invalid_value": 2 + in_table}
    assert "log: value 'odd' cannot be read: " in caplog.text


@pytest.mark.parametrize("config", [{"lr": 0.1}, argparse.Namespace(lr=0.1), collections.UserDict(lr=0.1)])
@pytest.mark.parametrize("tags", ["a", ["a"], {"a"}], ids=str)
def test_a_run_begins_with_its_config_and_tags(tmp_path: Path, config: Any, tags: Any) -> None:
    writer = Writer(new_spool(tmp_path / "spool"), strict=True)
    run = WandBWriter(writer=writer, config=config, tags=tags)

    assert payloads(writer) == [Params({"lr": 0.1}), Tags({"a": "true"})]
    assert run.config.lr == 0.1


def test_a_config_or_tags_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    writer = Writer(new_spool(tmp_path / "spool"))
    WandBWriter(writer=writer, config=5, tags=[Evil()])

    assert count_of(writer).dropped == {"invalid_call": 2}


def test_each_file_of_a_folder_is_logged(tmp_path: Path) -> None:
    (tmp_path / "data" / "inner").mkdir(parents=True)
    for name in ("a.txt", "inner/b.txt"):
        (tmp_path / "data" / name).write_text("x")
    writer = Writer(new_spool(tmp_path / "spool"), strict=True)
    WandBWriter(writer=writer).log_artifact(tmp_path / "data", type="dataset")
    WandBWriter(writer=writer).log_model(tmp_path / "data", "m")

    found = [(p.key, p.artifact_type) for p in payloads(writer) if isinstance(p, Artifact)]
    names = ["data/a.txt", "data/inner/b.txt", "m/a.txt", "m/inner/b.txt"]
    assert found == list(zip(names, ["dataset"] * 2 + ["model"] * 2, strict=True))


def test_a_value_that_is_none_of_these_costs_itself(tmp_path: Path) -> None:
    with Writer(new_spool(tmp_path / "spool")) as writer:
        WandBWriter(writer=writer).log({"loss": 0.5, "other": object(), "list": [1, 2], "none": None}, 3)
    assert logged(writer) == [Metrics({"loss": 0.5})]
