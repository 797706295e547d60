# SPDX-License-Identifier: Apache-2.0
"""Figures, image lists and grids, DataFrames, models and final values: what training code has, as it has it."""

from __future__ import annotations

import io
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image as Pillow

from tests.unit.readers_and_bad_backends import new_spool, read_spool, spool_of
from trackhub.errors import RecordError
from trackhub.records import Artifact, Histogram, Image, Payload, Summary, Table
from trackhub.spool.layout import blob_file
from trackhub.writer.adapters import WandBWriter
from trackhub.writer.writer import Writer

torch = pytest.importorskip("torch")
matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

CASES = np.array([[8, 1], [2, 9]])


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(new_spool(tmp_path / "spool"), strict=True)


def payloads(writer: Writer) -> list[Payload]:
    return [record.payload for records in read_spool(spool_of(writer).folder).values() for record in records]


def content(writer: Writer, payload: Payload) -> bytes:
    assert isinstance(payload, Image | Artifact)
    return blob_file(spool_of(writer).folder, payload.blob.name).read_bytes()


def a_figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 2))
    figure.subplots().plot([0, 1], [1, 0])
    return figure


def test_a_figure_of_matplotlib_becomes_an_image(writer: Writer) -> None:
    figure = a_figure()
    writer.log_figure("roc", figure, 3, "ROC")
    writer.log_figure("axes", figure.axes[0], 3)

    first, second = payloads(writer)
    assert isinstance(first, Image)
    assert (first.key, first.caption, first.blob.media_type) == ("roc", "ROC", "image/png")
    with Pillow.open(io.BytesIO(content(writer, first))) as image:
        assert np.asarray(image.convert("L")).std() > 10
    assert content(writer, second) == content(writer, first)


def test_curves_and_matrices_of_scikit_learn_become_images(writer: Writer) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    labels, scores = [0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9]
    writer.log_figure("confusion", metrics.ConfusionMatrixDisplay(CASES).plot())
    writer.log_figure("roc", metrics.RocCurveDisplay.from_predictions(labels, scores))
    writer.log_figure("pr", metrics.PrecisionRecallDisplay.from_predictions(labels, scores))
    assert [payload.key for payload in payloads(writer) if isinstance(payload, Image)] == ["confusion", "roc", "pr"]
    pyplot.close("all")


def test_a_figure_of_plotly_becomes_a_page(writer: Writer) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    writer.log_figure("curve", graph_objects.Figure(graph_objects.Scatter(y=[3, 1, 2])), 1)

    page = payloads(writer)[0]
    assert isinstance(page, Artifact)
    assert (page.key, page.artifact_type) == ("curve.html", "figure")
    assert b"Plotly.newPlot" in content(writer, page)


def test_a_figure_of_plotly_is_an_image_too_where_it_can_be_drawn(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trackhub.writer.log_figures_and_histograms._can_draw_plotly", True)
    buffer = io.BytesIO()
    Pillow.new("L", (3, 2)).save(buffer, "PNG")

    def fail(**kwargs: Any) -> bytes:
        raise RuntimeError("no browser")

    for draw in (lambda **kwargs: buffer.getvalue(), fail):
        page = types.SimpleNamespace(to_html=lambda **kwargs: "x", to_plotly_json=None, to_image=draw)
        writer.log_figure("curve", page)
    assert sorted(type(payload).__name__ for payload in payloads(writer)) == ["Artifact", "Artifact", "Image"]


@pytest.mark.parametrize("batch", [np.random.rand(3, 4, 5), torch.rand(3, 3, 4, 5), [np.zeros((4, 5), bool)] * 3])
def test_several_images_are_one_image_each(writer: Writer, batch: Any) -> None:
    writer.log_images("samples", batch, 1, captions=["a", "b"])
    found = [payload for payload in payloads(writer) if isinstance(payload, Image)]
    assert [(i.key, i.caption, i.width, i.height) for i in found] == [
        ("samples/0", "a", 5, 4), ("samples/1", "b", 5, 4), ("samples/2", "", 5, 4)
    ]  # fmt: skip


def test_images_of_several_sizes_and_modes_fit_into_one_grid(writer: Writer) -> None:
    white = Pillow.new("RGB", (4, 6), "white")
    writer.log_images("grid", [white, np.zeros((3, 3), np.uint8), np.full((2, 2), 65535, np.uint16)], columns=2)

    (grid,) = payloads(writer)
    with Pillow.open(io.BytesIO(content(writer, grid))) as image:
        assert image.size == (4 + 2 + 4, 6 + 2 + 6)
        assert [image.getpixel(at) for at in ((3, 5), (4, 0), (6, 0), (1, 9))] == [
            (255, 255, 255, 255), (0, 0, 0, 0), (0, 0, 0, 255), (255, 255, 255, 255)
        ]  # fmt: skip


TABLES: dict[str, Any] = {
    "a DataFrame": pd.DataFrame({"a": [1, 2], "b": ["x", None]}),
    "a mapping of columns": {"a": [1, 2], "b": ["x", None]},
    "a list of mappings": [{"a": 1, "b": "x"}, {"a": 2}],
}


@pytest.mark.parametrize("what", TABLES)
def test_a_whole_table_needs_no_rows(writer: Writer, what: str) -> None:
    writer.log_table("t", TABLES[what], step=1)
    (found,) = payloads(writer)
    assert isinstance(found, Table)
    assert (found.columns, found.rows[0], found.rows[1][0]) == (["a", "b"], [1, "x"], 2)


def test_the_labels_of_a_data_frame_are_its_first_column(writer: Writer) -> None:
    writer.log_table("confusion", pd.DataFrame(CASES, index=["cat", "dog"], columns=["cat", "dog"]))
    assert payloads(writer) == [Table("confusion", ["index", "cat", "dog"], [["cat", 8, 1], ["dog", 2, 9]])]


def test_a_table_of_polars_is_read_by_its_rows(writer: Writer) -> None:
    frame = types.SimpleNamespace(columns=["a"], iter_rows=lambda: iter([(1,), (None,)]))
    writer.log_table("t", frame)
    assert payloads(writer) == [Table("t", ["a"], [[1], [None]])]


def test_each_parameter_of_a_model_gets_a_histogram(writer: Writer) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1).bfloat16())
    model[0](torch.ones(1, 3)).sum().backward()
    writer.log_model_histograms(model, 5, gradients=True)
    writer.log_model_histograms(model.state_dict(), 5, prefix="state", bins=4)

    found = [payload for payload in payloads(writer) if isinstance(payload, Histogram)]
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert {h.key for h in found} == {
        *(f"{of}/{name}" for of in ("parameters", "state") for name in names), "gradients/0.weight", "gradients/0.bias"
    }  # fmt: skip
    assert {h.key: sum(h.counts) for h in found}["parameters/0.weight"] == 6
    assert len(found[-1].counts) == 4


def test_final_values_are_set_by_the_writer_and_as_with_wandb(writer: Writer) -> None:
    writer.summarize({"best": {"accuracy": np.float32(0.5), "epoch": 3}})
    summary = WandBWriter(writer=writer).summary
    summary["loss"] = 0.25
    summary.note = "early"
    summary.update({"a": 1, "b": None})

    assert payloads(writer) == [
        Summary({"best/accuracy": 0.5, "best/epoch": 3}), Summary({"loss": 0.25}), Summary({"note": "early"}),
        Summary({"a": 1, "b": None}),
    ]  # fmt: skip
    assert dict(summary) == {"loss": 0.25, "note": "early", "a": 1, "b": None}


BAD: dict[str, Any] = {
    "a text as a figure": lambda w: w.log_figure("f", "no figure"),
    "no images": lambda w: w.log_images("i", []),
    "None as images": lambda w: w.log_images("i", None),
    "a text as columns": lambda w: w.log_images("i", [np.zeros((2, 2))], columns="x"),
    "a number as a model": lambda w: w.log_model_histograms(5),
    "a number as a table": lambda w: w.log_table("t", 5),
    "a text as a table": lambda w: w.log_table("t", "abc"),
    "a number as final values": lambda w: w.summarize(5),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_none_of_these_is_refused_by_name_and_only_if_strict(tmp_path: Path, what: str) -> None:
    with pytest.raises(RecordError, match=r"expected|no image|integer|iterable"):
        BAD[what](Writer(new_spool(tmp_path / "strict"), strict=True))
    with Writer(new_spool(tmp_path / "other")) as writer:
        BAD[what](writer)
    assert not payloads(writer)
