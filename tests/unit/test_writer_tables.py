# SPDX-License-Identifier: Apache-2.0
"""Tables as training code has them: each cell is where a person expects it, and a bad cell costs only itself."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.unit.readers_and_bad_backends import new_spool, read_spool, settle_all, spool_of
from trackhub.errors import RecordError
from trackhub.records import Table
from trackhub.spool.reading import SpoolReader
from trackhub.writer.adapters import MLflowWriter
from trackhub.writer.writer import Writer

FRAME = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
COLUMNS, ROWS = ["a", "b"], [[1, "x"], [2, "y"]]


def tables(writer: Writer) -> list[Table]:
    found = [record.payload for records in read_spool(spool_of(writer).folder).values() for record in records]
    assert all(isinstance(payload, Table) for payload in found)
    return found  # type: ignore[return-value]


def stored(tmp_path: Path, *args: Any) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of the table that the spool holds of these arguments."""
    writer = Writer(new_spool(tmp_path / "spool"), strict=True)
    writer.log_table("t", *args)
    (table,) = tables(writer)
    return table.columns, table.rows


SAME: dict[str, tuple[Any, ...]] = {
    "a frame": (FRAME,),
    "a frame as a dict": (FRAME.to_dict(),),
    "a frame as a dict of lists": (FRAME.to_dict("list"),),
    "a frame as a dict of Series": (dict(FRAME.items()),),
    "a frame as records": (FRAME.to_dict("records"),),
    "columns and lists": (COLUMNS, ROWS),
    "columns and an array": (COLUMNS, FRAME.to_numpy()),
    "columns and records": (COLUMNS, FRAME.to_dict("records")),
    "columns and a generator of records": (COLUMNS, (row for row in FRAME.to_dict("records"))),
    "columns and a frame": (COLUMNS, FRAME),
    "columns and a wider frame": (COLUMNS, FRAME.assign(c=3)[["c", "b", "a"]]),
    "columns and a frame with other names": (COLUMNS, FRAME.rename(columns={"a": "p", "b": "q"})),
    "columns and a dict of columns": (COLUMNS, FRAME.to_dict("list")),
    "columns and a dict of dicts": (COLUMNS, FRAME.to_dict()),
    "columns and a frame of polars": (
        COLUMNS,
        types.SimpleNamespace(columns=["b", "a"], iter_rows=lambda: iter([("x", 1), ("y", 2)])),
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_each_form_of_a_table_becomes_the_same_table(tmp_path: Path, what: str) -> None:
    args = SAME[what]
    if isinstance(args[-1], types.GeneratorType):
        args = (COLUMNS, iter(FRAME.to_dict("records")))
    assert stored(tmp_path, *args) == (COLUMNS, ROWS)


def test_mlflow_tables_from_a_nested_dict_keep_their_cells(tmp_path: Path) -> None:
    writer = Writer(new_spool(tmp_path / "spool"), strict=True)
    MLflowWriter(writer=writer).log_table(FRAME.to_dict(), "t.json")
    (table,) = tables(writer)
    assert (table.columns, table.rows) == (COLUMNS, ROWS)


def test_scores_per_class_keep_their_labels_and_values(tmp_path: Path) -> None:
    scores = {"cat": {"precision": 0.5, "recall": 0.25}, "accuracy": 0.75, "dog": {"recall": 1.0}}
    assert stored(tmp_path, scores) == (
        ["index", "cat", "accuracy", "dog"], [["precision", 0.5, 0.75, None], ["recall", 0.25, 0.75, 1.0]]
    )  # fmt: skip


def test_a_classification_report_of_scikit_learn_is_a_table(tmp_path: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    report = metrics.classification_report([0, 1, 1], [0, 1, 1], output_dict=True)
    columns, rows = stored(tmp_path, report)
    assert columns == ["index", "0", "1", "accuracy", "macro avg", "weighted avg"]
    assert [row[0] for row in rows] == ["precision", "recall", "f1-score", "support"]
    assert rows[3][:3] == ["support", 1.0, 2.0]


@pytest.mark.parametrize(
    ("index", "names"),
    [
        (pd.Index(["p", "q"], name="a"), ["a_index"]),
        (pd.Index(["p", "q"], name="index"), ["index"]),
        (pd.MultiIndex.from_tuples([("p", 1), ("q", 2)], names=["a", None]), ["a_index", "level_1"]),
        (pd.MultiIndex.from_tuples([("p", 1), ("q", 2)], names=["z", "z"]), ["z", "z_index"]),
    ],
    ids=["as a column", "as none", "two levels", "two equal levels"],
)
def test_an_index_gets_a_name_that_no_column_has(tmp_path: Path, index: Any, names: list[str]) -> None:
    columns, rows = stored(tmp_path, FRAME.set_index(index))
    assert columns == [*names, "a", "b"]
    assert [row[0] for row in rows] == ["p", "q"]
    assert [row[-2:] for row in rows] == ROWS


def test_a_bad_cell_costs_only_itself(tmp_path: Path) -> None:
    class Evil:
        def __str__(self) -> str:
            raise RuntimeError("evil")

    writer = Writer(new_spool(tmp_path / "spool"))
    writer.log_table("t", COLUMNS, [[1, "\ud800"], [Evil(), "y"], ["x" * (2 << 20), 3]])

    assert tables(writer) == [Table("t", COLUMNS, [[1, None], [None, "y"], [None, 3]])]
    reader = SpoolReader(spool_of(writer).folder, "server")
    settle_all(reader, final=True)
    (count,) = reader.counts().values()
    assert (count.logged, count.dropped, count.altered) == (1, {}, {"invalid_value": 3})
    with pytest.raises(RecordError, match="row 0 of table"):
        stored(tmp_path / "strict", COLUMNS, [[1, "\ud800"]])


@pytest.mark.parametrize(
    "args",
    [
        ({"a": [1, 2], "b": [1]},),
        ({"a": {"x": 1}, "b": [1, 2]},),
        (["a"], ["x"]),
        (COLUMNS, FRAME.assign(c=1).rename(columns={"a": "z"})),
        (["a"], np.zeros(3)),
    ],
    ids=["columns of two lengths", "labels of another length", "a text as a row", "other columns", "no rows"],
)
def test_what_is_no_table_is_refused_by_name(tmp_path: Path, args: tuple[Any, ...]) -> None:
    with pytest.raises(RecordError, match=r"table 't'.*expected"):
        stored(tmp_path, *args)


def test_single_values_are_one_row(tmp_path: Path) -> None:
    assert stored(tmp_path, {"a": 1, "b": "x", "c": np.array(2.5)}) == (["a", "b", "c"], [[1, "x", 2.5]])
    assert stored(tmp_path / "empty", {"a": [], "b": 1}) == (["a", "b"], [])


EPOCHS = pd.DataFrame({"epoch": [10, 20, 30], "loss": [3.0, 2.0, 1.0]})


@pytest.mark.parametrize("epochs", [[10, 20, 30], [10, 20, 31], [0, 1, 2], [2, 1, 0]])
def test_labels_are_kept_whatever_numbers_they_are(tmp_path: Path, epochs: list[int]) -> None:
    """pandas makes a RangeIndex of any evenly spaced numbers."""
    frame = EPOCHS.assign(epoch=epochs)
    rows = [[epoch, loss] for epoch, loss in zip(epochs, [3.0, 2.0, 1.0], strict=True)]
    assert stored(tmp_path / "whole", frame.set_index("epoch")) == (["epoch", "loss"], rows)
    assert stored(tmp_path / "chosen", ["epoch", "loss"], frame.set_index("epoch")) == (["epoch", "loss"], rows)
    assert stored(tmp_path / "series", {"loss": frame.set_index("epoch")["loss"]}) == (["epoch", "loss"], rows)


@pytest.mark.parametrize("index", [[1, 3, 5], [0, 2, 4], [5, 6, 7], [False, True, False], [0.5, 1.5, 2.5]])
def test_a_chosen_row_keeps_its_label(tmp_path: Path, index: list[Any]) -> None:
    expected = (["index", "a"], [[label, 7] for label in index])
    assert stored(tmp_path / "frame", pd.DataFrame({"a": 7}, index=index)) == expected
    assert stored(tmp_path / "series", {"a": pd.Series(7, index=index)}) == expected


def test_columns_that_are_series_are_joined_by_their_labels(tmp_path: Path) -> None:
    train, val = pd.Series(list("aaab")).value_counts(), pd.Series(list("abbbc")).value_counts()
    columns, rows = stored(tmp_path / "1", {"train": train, "val": val, "split": "x"})
    assert columns == ["index", "train", "val", "split"]
    assert sorted(rows) == [["a", 3, 1, "x"], ["b", 1, 3, "x"], ["c", None, 1, "x"]]

    rest = EPOCHS["loss"][EPOCHS["loss"] < 3]
    assert stored(tmp_path / "2", {"all": EPOCHS["loss"], "rest": rest}) == (
        ["all", "rest"],
        [[3.0, None], [2.0, 2.0], [1.0, 1.0]],
    )
    assert stored(tmp_path / "3", {"n": {False: 1, True: 2}}) == (["index", "n"], [[False, 1], [True, 2]])


def test_labels_that_come_twice_are_kept_or_refused_but_never_mixed_up(tmp_path: Path) -> None:
    twice = pd.Series([1, 2], index=["a", "a"])
    assert stored(tmp_path / "same", {"x": twice, "y": twice + 1})[1] == [["a", 1, 2], ["a", 2, 3]]
    with pytest.raises(RecordError, match="a label comes twice"):
        stored(tmp_path / "others", {"x": twice, "y": pd.Series([1], index=["b"])})


def test_columns_whose_names_become_the_same_text_are_both_kept(tmp_path: Path) -> None:
    both: Any = {1: [1, 2], "1": [3, 4]}
    assert stored(tmp_path / "whole", both) == (["1", "1"], [[1, 3], [2, 4]])
    assert stored(tmp_path / "chosen", [1, "1"], both) == (["1", "1"], [[1, 3], [2, 4]])
