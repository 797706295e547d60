# SPDX-License-Identifier: Apache-2.0
"""The contract of ``jsonl``: it reads the files back with the standard library.

``trackhub check jsonl`` runs it, and so do the tests, also on backends that are wrong on purpose.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
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
        """Return options with which all receivers write to one folder."""
        return {"path": str(tmp_path / "all-jobs")}

    def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack:
        """Return what the run's file holds, as Python's own JSON reads it."""
        job, site = (quote(name, safe="=") for name in (run.job.unique_name, run.site))
        folder = Path(context.options.get("path", context.workdir))
        if "path" in context.options and run.side == "client":
            job += "@client"
        return read_jsonl(folder / job / f"{site}.jsonl")


def read_jsonl(path: Path) -> ReadBack:
    """Return what one file holds."""
    items: dict[str, list[Any]] = defaultdict(list)
    params: dict[str, Any] = {}
    tags: dict[str, str] = {}
    summary: dict[str, Any] = {}
    status = None
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["kind"] == "params":
            params |= {key.removeprefix("$"): _plain(value) for key, value in line["values"].items()}
        elif line["kind"] == "summary":
            summary |= {key.removeprefix("$"): _plain(value) for key, value in line["values"].items()}
        elif line["kind"] == "tags":
            tags |= line["values"]
        elif line["kind"] == "end":
            status = line["status"]
        else:
            items[line["kind"]] += _items(line, path.parent)
    return ReadBack(
        points=items["metrics"],
        params=params,
        tags=tags,
        summary=summary,
        texts=items["text"],
        images=items["image"],
        histograms=items["histogram"],
        tables=items["table"],
        artifacts=items["artifact"],
        status=status,
    )


def _items(line: dict[str, Any], folder: Path) -> list[Any]:
    step, time = line["step"], line["time"]
    match line["kind"]:
        case "metrics":
            return [Point(key, step, _number(value), time) for key, value in line["values"].items()]
        case "text":
            return [TextItem(line["key"], step, line["text"], time)]
        case "image":
            return [ImageItem(line["key"], step, (folder / line["file"]).read_bytes(), line["caption"], time)]
        case "histogram":
            return [HistogramItem(line["key"], step, line["edges"], line["counts"], time)]
        case "table":
            rows = [[_plain(cell) for cell in row] for row in line["rows"]]
            return [TableItem(line["key"], step, line["columns"], rows, time)]
        case "artifact":
            content = (folder / line["file"]).read_bytes()
            return [ArtifactItem(line["key"], content, line["filename"], line["artifact_type"], step, time)]
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
