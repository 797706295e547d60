# SPDX-License-Identifier: Apache-2.0
"""What becomes of each type of record of FLARE's own writers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvflare.apis.analytix import AnalyticsDataType as Type
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.analytix_utils import create_analytic_dxo

from trackhub.errors import RecordError
from trackhub.flare.records_from_flare_writers import StockRecords, write_stock_record
from trackhub.framing import decode_body, scan_frames
from trackhub.records import Image, Kind, Metrics, Params, Payload, Record, Tags, Text
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.spool.reading import SpoolReader
from trackhub.writer.writer import Writer


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    create_spool(folder, SpoolInfo("site-1", "job", ("server",)))
    return folder


def _records(spool: Path) -> list[Record]:
    batch = SpoolReader(spool, "server").next_batch(1000, 1 << 20)
    return [decode_body(batch.frames[f.body : f.end]) for f in scan_frames(batch.frames)] if batch else []


def _event(key: str, value: Any, data_type: Type, **more: Any) -> Shareable:
    return create_analytic_dxo(key, value, data_type, **more).to_shareable()


@pytest.mark.parametrize(
    ("event", "payload", "step"),
    [
        (_event("loss", 0.5, Type.SCALAR, global_step=3), Metrics({"loss": 0.5}), 3),
        (_event("loss", np.float32(0.5), Type.METRIC), Metrics({"loss": 0.5}), None),
        (_event("t", {"a": 1, "b": 2.5}, Type.SCALARS, global_step=0), Metrics({"t/a": 1.0, "t/b": 2.5}), 0),
        (_event("metrics", {"a": 1, "b": 2.5}, Type.METRICS, global_step=7), Metrics({"a": 1.0, "b": 2.5}), 7),
        (_event("lr", 0.1, Type.PARAMETER), Params({"lr": 0.1}), None),
        (_event("shape", (2, {"x": Path("/p")}), Type.PARAMETER), Params({"shape": [2, {"x": "/p"}]}), None),
        (_event("params", {"lr": 0.1, "opt": None}, Type.PARAMETERS), Params({"lr": 0.1, "opt": None}), None),
        (_event("stage", 3, Type.TAG), Tags({"stage": "3"}), None),
        (_event("tags", {"a": "x", "b": True}, Type.TAGS), Tags({"a": "x", "b": "True"}), None),
        (_event("note", "hello", Type.TEXT, global_step=1), Text("note", "hello"), 1),
        (_event("text", "hello", Type.TEXT, path="dir/file.txt"), Text("dir/file.txt", "hello"), None),
    ],
)  # fmt: skip
def test_each_type_becomes_the_record_that_it_means(
    spool: Path, event: Shareable, payload: Payload, step: int | None
) -> None:
    write_stock_record(Writer(spool), event)

    (record,) = _records(spool)
    assert record.payload == payload
    assert record.step == step


def test_an_image_becomes_an_image(spool: Path) -> None:
    write_stock_record(Writer(spool), _event("samples", np.zeros((3, 4, 6), np.uint8), Type.IMAGE, global_step=2))

    (record,) = _records(spool)
    assert isinstance(record.payload, Image)
    assert (record.payload.key, record.payload.width, record.payload.height, record.step) == ("samples", 6, 4, 2)


@pytest.mark.parametrize(
    "event",
    [
        _event("m", b"weights", Type.MODEL),
        _event("r", object(), Type.LOG_RECORD),
        _event("", 1.0, Type.SCALAR),
        _event("p", {"deep": "\ud800"}, Type.PARAMETER),
        _event("i", "no image", Type.IMAGE),
        DXO(DataKind.WEIGHTS, {"w": 1}).to_shareable(),
        Shareable(),
    ],
)
def test_what_cannot_be_a_record_is_an_error_and_no_record(spool: Path, event: Shareable) -> None:
    with pytest.raises(RecordError):
        write_stock_record(Writer(spool, strict=True), event)

    assert _records(spool) == []


def _context(event: Shareable) -> FLContext:
    context = FLContextManager(engine=object(), identity_name="s", job_id="j", public_stickers={},
                               private_stickers={}).new_context()  # fmt: skip
    context.set_prop(FLContextKey.EVENT_DATA, event, private=True, sticky=False)
    return context


def test_an_unconvertible_record_is_counted_and_logged_once(spool: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = StockRecords(FLComponent())
    records.open(spool)

    with caplog.at_level(logging.WARNING, "FLComponent"):
        for _ in range(3):
            records.take(_context(_event("m", b"weights", Type.MODEL)))
    records.take(_context(_event("loss", 1.0, Type.SCALAR)))
    records.close()

    (count,) = SpoolReader(spool, "server").counts().values()
    assert (count.logged, count.dropped, count.spooled) == (4, {"unconvertible": 3}, 1)
    assert sum("log call of FLARE's writers was dropped" in r.getMessage() for r in caplog.records) == 1
    assert [f.kind for f in scan_frames(_frames(spool))] == [Kind.GAP, Kind.METRICS]


def _frames(spool: Path) -> bytes:
    batch = SpoolReader(spool, "server").next_batch(1000, 1 << 20)
    assert batch is not None
    return batch.frames


def test_a_spool_with_nothing_but_unconvertible_records_still_counts_them(spool: Path) -> None:
    records = StockRecords(FLComponent())
    records.open(spool)

    records.take(_context(_event("m", b"weights", Type.MODEL)))

    (count,) = SpoolReader(spool, "server").counts().values()
    assert (count.logged, count.dropped) == (1, {"unconvertible": 1})


def test_what_comes_before_the_spool_is_kept_and_nothing_is_taken_after_the_end(spool: Path) -> None:
    records = StockRecords(FLComponent())

    records.take(_context(_event("loss", 0.0, Type.SCALAR)))
    records.open(spool)
    records.take(_context(_event("loss", 1.0, Type.SCALAR)))
    records.close()
    records.take(_context(_event("loss", 2.0, Type.SCALAR)))

    assert [r.payload for r in _records(spool)] == [Metrics({"loss": 0.0}), Metrics({"loss": 1.0})]
