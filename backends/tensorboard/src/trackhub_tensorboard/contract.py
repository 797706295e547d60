# SPDX-License-Identifier: Apache-2.0
"""The contract of ``tensorboard``: it reads the event files back with TensorBoard's own reader.

``trackhub check tensorboard`` and this package's tests run it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

from trackhub.spi import path_component
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
        """Return options with which all receivers write to one log folder."""
        return {"logdir": str(tmp_path / "logdir")}

    def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack:
        """Return what TensorBoard's own reader finds in the event files."""
        job, site = path_component(run.job.unique_name), path_component(run.site)
        folder = Path(context.options.get("logdir", context.workdir))
        if "logdir" in context.options and run.side == "client":
            job += "@client"
        return read_folder(folder / job / site)

    def canonical_value(self, value: float) -> float:
        """TensorBoard keeps float32. A value beyond its range becomes infinite."""
        try:
            return float(struct.unpack("f", struct.pack("f", value))[0])
        except OverflowError:
            return math.copysign(math.inf, value)

    def canonical_params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The HPARAMS tab holds bools, doubles and strings. Every other value is a string of JSON."""
        return {name: _param(value) for name, value in params.items()}

    def canonical_cell(self, value: Any) -> str:
        """A table is Markdown text, so its cells are text."""
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def canonical_status(self, status: RunStatus) -> str:
        """The HPARAMS tab knows success and failure only."""
        return "success" if status is RunStatus.FINISHED else "failure"


def _param(value: Any) -> bool | float | str:
    if isinstance(value, bool | str):
        return value
    is_number = isinstance(value, int | float) and math.isfinite(value) and abs(value) <= 2**53
    return float(value) if is_number else json.dumps(value, ensure_ascii=False)


def read_folder(folder: Path) -> ReadBack:
    """Return what the event files in one folder hold.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no {folder}")
    accumulator = EventAccumulator(str(folder), size_guidance=_EVERYTHING)
    accumulator.Reload()
    kinds: dict[str, list[str]] = accumulator.Tags()
    points = [
        Point(_SUFFIX.sub("", tag), event.step, event.value, event.wall_time)
        for tag in kinds["scalars"]
        for event in accumulator.Scalars(tag)
    ]
    read = _Tensors(accumulator, kinds["tensors"])
    params, status = _session(accumulator, kinds["tensors"])
    return ReadBack(
        points=points,
        params=params,
        tags=read.tags,
        texts=read.texts,
        images=read.images,
        histograms=read.histograms,
        tables=read.tables,
        status=status,
    )


class _Tensors:
    """The values in one run's event files that are no scalars, by kind."""

    def __init__(self, accumulator: EventAccumulator, tags: list[str]) -> None:
        self.tags: dict[str, str] = {}
        self.texts: list[TextItem] = []
        self.images: list[ImageItem] = []
        self.histograms: list[HistogramItem] = []
        self.tables: list[TableItem] = []
        self._captions: dict[tuple[str, int], str] = {}
        self._keys = {_SUFFIX.sub("", tag) for tag in tags}
        # Captions come before the images that they belong to.
        for tag in sorted(tags, key=lambda tag: not tag.endswith("/caption")):
            plugin = accumulator.SummaryMetadata(tag).plugin_data.plugin_name
            for event in accumulator.Tensors(tag):
                self._add(plugin, tag, event)

    def _add(self, plugin: str, tag: str, event: Any) -> None:
        key, step, time = _SUFFIX.sub("", tag), event.step, event.wall_time
        content = make_ndarray(event.tensor_proto)
        if plugin == "histograms":
            edges = [float(row[0]) for row in content] + [float(content[-1][1])]
            self.histograms.append(HistogramItem(key, step, edges, [float(row[2]) for row in content], time))
        elif plugin == "images":
            self.images.append(ImageItem(key, step, content[2], self._captions.get((key, step), ""), time))
        elif plugin == "text":
            self._add_text(tag, key, content.item().decode(), step, time)

    def _add_text(self, tag: str, key: str, text: str, step: int, time: float) -> None:
        columns, rows = _table(text)
        if tag == "tags":
            self.tags.update({row[0]: row[1] for row in rows})
        elif tag.endswith("/caption") and tag.removesuffix("/caption") in self._keys:
            self._captions[tag.removesuffix("/caption"), step] = text
        elif columns and tag != "params":
            self.tables.append(TableItem(key, step, columns, list(rows), time))
        elif tag != "params":
            self.texts.append(TextItem(key, step, text, time))


def _table(text: str) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a Markdown table, or two empty lists if the text is no table."""
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


def _session(accumulator: EventAccumulator, tags: list[str]) -> tuple[dict[str, Any], str | None]:
    """Return the params of the HPARAMS tab, and how the run ended."""

    def data(tag: str) -> Any:
        return HParamsPluginData.FromString(accumulator.SummaryMetadata(tag).plugin_data.content)

    params, status = {}, None
    if _START in tags:
        held = data(_START).session_start_info.hparams
        params = {name: getattr(value, value.WhichOneof("kind")) for name, value in held.items()}
    if _END in tags:
        status = "success" if data(_END).session_end_info.status == STATUS_SUCCESS else "failure"
    return params, status
