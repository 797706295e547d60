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
from typing import Any, ClassVar

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
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
_MARK = "trackhub/1 "
_START, _END = "_hparams_/session_start_info", "_hparams_/session_end_info"
_ENTITIES = (("<br>", "\n"), ("&lt;", "<"), ("&amp;", "&"))


class TensorBoardContract(BackendContract):
    """The contract that `TensorBoardBackend` passes."""

    backend = TensorBoardBackend
    name = "tensorboard"
    cannot_tell: ClassVar[Mapping[str, str]] = {"artifacts": "TensorBoard keeps an artifact's name, size and digest"}

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

    def canonical_summary(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Final values are a table of text."""
        return {name: self.canonical_cell(value) for name, value in values.items()}

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
    names = _names(folder)
    points = [
        Point(names[tag][1], event.step, event.value, event.wall_time)
        for tag in kinds["scalars"]
        if tag in names
        for event in accumulator.Scalars(tag)
    ]
    read = _Tensors(accumulator, {tag: names[tag] for tag in kinds["tensors"] if tag in names})
    params, status = _session(accumulator, kinds["tensors"])
    return ReadBack(
        points=points,
        params=params,
        tags=read.tags,
        summary=read.summary,
        texts=read.texts,
        images=read.images,
        histograms=read.histograms,
        tables=read.tables,
        status=status,
    )


def _names(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the kind and the key that each tag stands for, as the marks in the files say.

    A tag without a mark belongs to a batch that was not written completely.
    """
    names = {}
    for path in folder.glob("*.trackhub"):
        for event in EventFileLoader(str(path)).Load():
            if event.session_log.msg.startswith(_MARK):
                mark = json.loads(event.session_log.msg.removeprefix(_MARK))
                names.update({tag: (kind, key) for kind, key, tag in mark.get("tags", ())})
    return names


class _Tensors:
    """The values in one run's event files that are not scalars, by kind."""

    def __init__(self, accumulator: EventAccumulator, names: Mapping[str, tuple[str, str]]) -> None:
        """Read the tensors of these tags, each given with its kind and key."""
        self.tags: dict[str, str] = {}
        self.summary: dict[str, str] = {}
        self.texts: list[TextItem] = []
        self.images: list[ImageItem] = []
        self.histograms: list[HistogramItem] = []
        self.tables: list[TableItem] = []
        self._captions: dict[tuple[str, int], str] = {}
        # Captions come before the images that they belong to.
        for tag in sorted(names, key=lambda tag: names[tag][0] != "caption"):
            for event in accumulator.Tensors(tag):
                self._add(*names[tag], make_ndarray(event.tensor_proto), event.step, event.wall_time)

    def _add(self, kind: str, key: str, content: Any, step: int, time: float) -> None:
        match kind:
            case "histogram":
                edges = [float(row[0]) for row in content] + [float(content[-1][1])]
                self.histograms.append(HistogramItem(key, step, edges, [float(row[2]) for row in content], time))
            case "image":
                self.images.append(ImageItem(key, step, content[2], self._captions.get((key, step), ""), time))
            case "caption":
                self._captions[key.removesuffix("/caption"), step] = content.item().decode()
            case "table":
                columns, rows = _table(content.item().decode())
                self.tables.append(TableItem(key, step, columns, rows, time))
            case "tags":
                _, rows = _table(content.item().decode())
                self.tags.update({row[0]: row[1] for row in rows})
            case "summary":
                _, rows = _table(content.item().decode())
                self.summary.update({row[0]: row[1] for row in rows})
            case "text":
                self.texts.append(TextItem(key, step, content.item().decode(), time))


def _table(text: str) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a Markdown table."""
    cells = [[_cell(cell) for cell in re.split(r" (?<!\\)\| ", line[2:-2])] for line in text.split("\n")]
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
