# SPDX-License-Identifier: Apache-2.0
"""The contract of ``tensorboard``, whose event files are read back as TensorBoard itself reads them."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

from trackhub.testing import (
    BackendContract,
    HistogramItem,
    ImageItem,
    Point,
    ReadBack,
    RunInfo,
    RunStatus,
    StoreContext,
    TableItem,
    TextItem,
)
from trackhub_tensorboard.backend import TensorBoardBackend

__all__ = ["TensorBoardContract", "read_folder"]

_EVERYTHING = dict.fromkeys(("scalars", "tensors", "images", "histograms", "compressedHistograms", "audio"), 0)
_SUFFIX = re.compile(r"( \((?:text|image|histogram|table|metrics|params|tags|caption)\))+$")
_START, _END = "_hparams_/session_start_info", "_hparams_/session_end_info"
_ENTITIES = (("<br>", "\n"), ("&lt;", "<"), ("&amp;", "&"))


class TensorBoardContract(BackendContract):
    """What `TensorBoardBackend` passes."""

    backend = TensorBoardBackend
    name = "tensorboard"

    def shared_options(self, tmp_path: Path) -> Mapping[str, Any]:
        return {"logdir": str(tmp_path / "logdir")}

    def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack:
        job, site = (quote(name, safe="") for name in run.key)
        folder = Path(context.options.get("logdir", context.workdir))
        if "logdir" in context.options and run.side == "client":
            job += "@client"
        return read_folder(folder / job / site)

    def canonical_value(self, value: float) -> float:
        """TensorBoard keeps float32; what is beyond its range becomes infinite."""
        try:
            return float(struct.unpack("f", struct.pack("f", value))[0])
        except OverflowError:
            return math.copysign(math.inf, value)

    def canonical_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The HPARAMS tab has bools, doubles and strings."""
        return {name: _param(value) for name, value in params.items()}

    def canonical_cell(self, value: Any) -> str:
        """A table is text."""
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def canonical_status(self, status: RunStatus) -> str:
        """The HPARAMS tab tells success from failure."""
        return "success" if status is RunStatus.FINISHED else "failure"


def _param(value: Any) -> bool | float | str:
    if isinstance(value, bool | str):
        return value
    is_number = isinstance(value, int | float) and math.isfinite(value) and abs(value) <= 2**53
    return float(value) if is_number else json.dumps(value, ensure_ascii=False)


def read_folder(folder: Path) -> ReadBack:
    """Return what the event files in one folder hold."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no {folder}")
    accumulator = EventAccumulator(str(folder), size_guidance=_EVERYTHING)
    accumulator.Reload()
    found = ReadBack(points=[], params={}, tags={}, texts=[], images=[], histograms=[], tables=[])
    tags: dict[str, Any] = accumulator.Tags()
    for tag in tags["scalars"]:
        key = _SUFFIX.sub("", tag)
        found.points += [Point(key, e.step, e.value, e.wall_time) for e in accumulator.Scalars(tag)]
    captions: dict[tuple[str, int], str] = {}
    for tag in tags["tensors"]:
        plugin = accumulator.SummaryMetadata(tag).plugin_data.plugin_name
        for event in accumulator.Tensors(tag):
            _add_tensor(found, plugin, tag, event, captions, set(tags["tensors"]))
    assert found.images is not None
    found.images = [
        ImageItem(i.key, i.step, i.content, captions.get((i.key, i.step or 0), ""), i.time) for i in found.images
    ]
    _add_session(found, accumulator, tags["tensors"])
    return found


def _add_tensor(
    found: ReadBack, plugin: str, tag: str, event: Any, captions: dict[tuple[str, int], str], tags: set[str]
) -> None:
    key, step, time = _SUFFIX.sub("", tag), event.step, event.wall_time
    content = make_ndarray(event.tensor_proto)
    if plugin == "histograms":
        edges = [float(row[0]) for row in content] + [float(content[-1][1])]
        assert found.histograms is not None
        found.histograms.append(HistogramItem(key, step, edges, [float(row[2]) for row in content], time))
    elif plugin == "images":
        assert found.images is not None
        found.images.append(ImageItem(key, step, content[2], "", time))
    elif plugin == "text":
        text = content.item().decode()
        columns, rows = _table(text)
        assert found.tags is not None and found.tables is not None and found.texts is not None
        if tag == "tags":
            found.tags.update({row[0]: row[1] for row in rows})
        elif tag == "params":
            return
        elif tag.endswith("/caption") and any(_SUFFIX.sub("", t) == tag.removesuffix("/caption") for t in tags):
            captions[tag.removesuffix("/caption"), step] = text
        elif columns:
            found.tables.append(TableItem(key, step, columns, list(rows), time))
        else:
            found.texts.append(TextItem(key, step, text, time))


def _table(text: str) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a Markdown table, or nothing."""
    lines = text.split("\n")
    if len(lines) < 2 or not re.fullmatch(r"\|( --- \|)+", lines[1]):
        return [], []
    cells = [[_cell(cell) for cell in re.split(r" (?<!\\)\| ", line[2:-2])] for line in lines]
    return cells[0], cells[2:]


def _cell(text: str) -> str:
    text = re.sub(r"\\(.)", r"\1", text)
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    return text


def _add_session(found: ReadBack, accumulator: EventAccumulator, tags: list[str]) -> None:
    def session(tag: str) -> Any:
        return HParamsPluginData.FromString(accumulator.SummaryMetadata(tag).plugin_data.content)

    assert found.params is not None
    if _START in tags:
        for name, value in session(_START).session_start_info.hparams.items():
            found.params[name] = getattr(value, value.WhichOneof("kind"))
    if _END in tags:
        succeeded = session(_END).session_end_info.status == STATUS_SUCCESS
        found.status = "success" if succeeded else "failure"
