# SPDX-License-Identifier: Apache-2.0
"""What ``wandb.log`` takes beside numbers, with W&B's own types: each becomes a record of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from tests.unit.readers_and_bad_backends import new_spool, read_spool, spool_of
from trackhub.records import Histogram, Image, Metrics, Table, Text
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


def test_a_value_that_is_none_of_these_costs_itself(tmp_path: Path) -> None:
    with Writer(new_spool(tmp_path / "spool")) as writer:
        WandBWriter(writer=writer).log({"loss": 0.5, "other": object(), "list": [1, 2], "none": None}, 3)
    assert logged(writer) == [Metrics({"loss": 0.5})]
