# SPDX-License-Identifier: Apache-2.0
"""Calls of the SDKs that differ in a detail from the plain writer's: the adapters do what the SDK does."""

from __future__ import annotations

import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.readers_and_bad_backends import new_spool
from tests.unit.test_writer_bad_values import count_of, payloads
from trackhub.errors import RecordError
from trackhub.records import Artifact, Histogram, Image, Params
from trackhub.writer.adapters import MLflowWriter, SummaryWriter
from trackhub.writer.writer import Writer


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(new_spool(tmp_path / "spool"))


@pytest.mark.parametrize("is_tracked", [True, False])
def test_add_figure_closes_its_figure_also_where_nothing_is_recorded(
    writer: Writer, is_tracked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    monkeypatch.setenv("TRACKHUB_MODE", "disabled")
    summary = SummaryWriter(writer=writer) if is_tracked else SummaryWriter()
    before = pyplot.get_fignums()
    kept = pyplot.figure()
    summary.add_figure("a", pyplot.figure())
    summary.add_figure("b", [pyplot.figure(), pyplot.figure()])
    summary.add_figure("c", kept, close=False)
    assert pyplot.get_fignums() == [*before, kept.number]
    pyplot.close(kept)


def test_axes_in_a_subfigure_are_logged_with_their_whole_figure(writer: Writer) -> None:
    from matplotlib.figure import Figure

    subfigure: Any = Figure(figsize=(2, 1)).subfigures(1, 1)
    writer.log_figure("a", subfigure.subplots())
    assert [image.key for image in payloads(writer) if isinstance(image, Image)] == ["a"]


@pytest.mark.parametrize("key", [None, ["a"]], ids=repr)
def test_a_figure_of_plotly_with_a_bad_key_is_counted(writer: Writer, key: Any) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    writer.log_figure(key, graph_objects.Figure())
    assert payloads(writer) == []
    assert count_of(writer).dropped == {"invalid_value": 1}


def test_mlflow_logs_a_figure_of_plotly_as_a_page_without_a_browser(writer: Writer) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    MLflowWriter(writer=writer).log_figure(graph_objects.Figure(), "plots/loss.html")
    assert [page.key for page in payloads(writer) if isinstance(page, Artifact)] == ["plots/loss.html"]


def test_mlflow_logs_a_folder_that_is_given_as_an_artifact(writer: Writer, tmp_path: Path) -> None:
    (tmp_path / "vocab" / "en").mkdir(parents=True)
    (tmp_path / "vocab" / "en" / "words.txt").write_text("a")
    MLflowWriter(writer=writer).log_artifact(tmp_path / "vocab")
    MLflowWriter(writer=writer).log_artifact(str(tmp_path / "vocab"), "data")
    keys = [found.key for found in payloads(writer) if isinstance(found, Artifact)]
    assert keys == ["vocab/en/words.txt", "data/vocab/en/words.txt"]


def test_the_number_of_bins_may_be_of_numpy(writer: Writer) -> None:
    SummaryWriter(writer=writer).add_histogram("h", [1.0, 2.0, 3.0], bins=np.int64(3))
    (found,) = payloads(writer)
    assert isinstance(found, Histogram)
    assert len(found.counts) == 3


@pytest.mark.parametrize("columns", [None, 2], ids=["each", "a grid"])
def test_captions_may_be_numbers_and_none(writer: Writer, columns: int | None) -> None:
    captions: Any = [7, None]
    writer.log_images("i", [np.ones((2, 2))] * 2, captions=captions, columns=columns)
    found = [image.caption for image in payloads(writer) if isinstance(image, Image)]
    assert found == (["7", ""] if columns is None else ["7, "])


@pytest.mark.parametrize("value", [decimal.Decimal("1e400"), np.longdouble("1e400"), 10**400], ids=repr)
def test_a_number_too_large_for_a_float_is_refused_and_not_infinite(tmp_path: Path, value: Any) -> None:
    strict = Writer(new_spool(tmp_path / "spool"), strict=True)
    with pytest.raises(RecordError, match="is too large for a float64"):
        strict.log({"a": value})
    for infinite in (decimal.Decimal("-Infinity"), np.longdouble("inf"), float("inf"), np.float32("inf")):
        strict.log({"a": infinite})


def test_arrays_of_texts_and_dates_are_lists_of_params(writer: Writer) -> None:
    import pandas as pd

    writer.log_params({"classes": np.array(["cat", "dog"]), "days": np.array(["2020-01-01", "2020-01-02"], "M8[ns]")})
    writer.log_params({"dates": pd.Series(pd.to_datetime(["2020-01-01", "2020-01-02"]))})
    assert payloads(writer) == [
        Params(
            {
                "classes": ["cat", "dog"],
                "days": ["2020-01-01T00:00:00.000000000", "2020-01-02T00:00:00.000000000"],
            }
        ),
        Params({"dates": ["2020-01-01T00:00:00", "2020-01-02T00:00:00"]}),
    ]


def test_a_script_may_ask_for_the_id_of_its_run_and_for_its_folder(writer: Writer) -> None:
    with MLflowWriter(writer=writer).start_run() as run:
        assert (run.info.run_id, run.info.run_name) == ("", "")
    assert SummaryWriter(writer=writer).log_dir == ""
