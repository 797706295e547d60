# SPDX-License-Identifier: Apache-2.0
"""The contract of ``jsonl``, whose files are read back by the standard library."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trackhub.builtin.jsonl import JsonlBackend
from trackhub.testing import (
    ArtifactItem,
    BackendContract,
    HistogramItem,
    ImageItem,
    Point,
    ReadBack,
    RunInfo,
    StoreContext,
    TableItem,
    TextItem,
)

__all__ = ["JsonlContract", "read_jsonl"]

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlContract(BackendContract):
    """What `JsonlBackend` passes."""

    backend = JsonlBackend
    name = "jsonl"

    def shared_options(self, tmp_path: Path) -> Mapping[str, Any]:
        return {"path": str(tmp_path / "all-jobs")}

    def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack:
        job, site = (quote(name, safe="") for name in run.key)
        folder = Path(context.options.get("path", context.workdir))
        if "path" in context.options and run.side == "client":
            job += "@client"
        return read_jsonl(folder / job / f"{site}.jsonl")


def read_jsonl(path: Path) -> ReadBack:
    """Return what one file holds."""
    found = ReadBack(points=[], params={}, tags={}, texts=[], images=[], histograms=[], tables=[], artifacts=[])
    for text in path.read_text(encoding="utf-8").splitlines():
        _add(found, json.loads(text), path.parent)
    return found


def _add(found: ReadBack, line: dict[str, Any], folder: Path) -> None:
    assert found.params is not None and found.tags is not None
    step, time = line.get("step"), line["time"]
    match line["kind"]:
        case "metrics":
            found.points += [Point(key, step, _number(value), time) for key, value in line["values"].items()]
        case "params":
            found.params.update({key.removeprefix("$"): _plain(value) for key, value in line["values"].items()})
        case "tags":
            found.tags.update(line["values"])
        case "text":
            _list(found.texts).append(TextItem(line["key"], step, line["text"], time))
        case "image":
            content = (folder / line["file"]).read_bytes()
            _list(found.images).append(ImageItem(line["key"], step, content, line["caption"], time))
        case "histogram":
            edges, counts = line["edges"], line["counts"]
            _list(found.histograms).append(HistogramItem(line["key"], step, edges, counts, time))
        case "table":
            rows = [[_plain(cell) for cell in row] for row in line["rows"]]
            _list(found.tables).append(TableItem(line["key"], step, line["columns"], rows, time))
        case "artifact":
            content, kind = (folder / line["file"]).read_bytes(), line["artifact_type"]
            _list(found.artifacts).append(ArtifactItem(line["key"], content, line["filename"], kind, step, time))
        case "end":
            found.status = line["status"]
        case other:
            raise ValueError(f"a line of kind {other!r}")


def _number(value: float | str) -> float:
    return _SPECIAL[value] if isinstance(value, str) else float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$float"}:
            return _SPECIAL[value["$float"]]
        return {key.removeprefix("$"): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _list(items: list[Any] | None) -> list[Any]:
    assert items is not None
    return items
