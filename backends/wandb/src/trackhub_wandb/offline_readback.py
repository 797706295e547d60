# SPDX-License-Identifier: Apache-2.0
"""Reads the folder of an offline run, for the contract and the tests. It shares no code with the plugin.

A ``.wandb`` file is W&B's transaction log. It begins with the bytes ``:W&B``, a two-byte magic and a version. Its
records are framed as in LevelDB's log format, with zlib's CRC-32 of each fragment's type and data. A record is a
protobuf message.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["LoggedArtifact", "LoggedRun", "find_runs", "parse_integer", "read_log", "read_records"]

_MAGIC = b":W&B"
_HEADER = 7
_BLOCK = 1 << 15


class LoggedArtifact(msgspec.Struct):
    """One artifact record.

    Attributes:
        name: the artifact's name.
        kind: the artifact's type.
        metadata: what the backend wrote about it.
        files: name within the artifact to the path that the record gives, relative to the run folder.
    """

    name: str
    kind: str
    metadata: dict[str, Any]
    files: dict[str, str]


class LoggedRun(msgspec.Struct):
    """What a log says of its run.

    Attributes:
        folder: the run's folder.
        rows: the history, one dict for each row, media as dicts.
        config: the last value of each entry, without W&B's own entry.
        summary: the last value of each entry that the SDK has set.
        settings: project, group, name and so on, from the last run record.
        tags: the tags, from the last run record.
        metrics: the metric definitions: name or glob to the step metric, empty for none.
        uploads: the files of the run that ``wandb sync`` uploads.
        artifacts: the artifacts, in the order of their records.
        exit_code: None while the run is open.
    """

    folder: Path
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    settings: dict[str, str] = {}
    tags: list[str] = []
    metrics: dict[str, str] = {}
    uploads: list[str] = []
    artifacts: list[LoggedArtifact] = []
    exit_code: int | None = None


def find_runs(wandb_dir: Path) -> list[LoggedRun]:
    """Return all offline runs in a ``wandb`` folder."""
    return [read_log(path) for path in sorted(wandb_dir.glob("offline-run-*/run-*.wandb"))]


def read_log(path: Path) -> LoggedRun:
    """Return what one ``.wandb`` file holds. The file may be open, or a crash may have torn it.

    Raises:
        ValueError: the file is not such a log, or a checksum is wrong.
    """
    run = LoggedRun(path.parent)
    for record in read_records(path):
        _apply(run, record)
    run.config.pop("_wandb", None)
    return run


def read_records(path: Path) -> Iterator[Any]:
    """Yield the records of a log, and stop before a record that is not whole.

    Raises:
        ValueError: the file is not such a log, or a checksum is wrong.
    """
    from wandb.proto import wandb_internal_pb2

    parse = wandb_internal_pb2.Record.FromString  # type: ignore[attr-defined]  # made at import time
    data = path.read_bytes()
    if data[:4] != _MAGIC:
        raise ValueError(f"{path} is not a transaction log of W&B: it does not begin with {_MAGIC!r}")
    parts: list[bytes] = []
    for kind, body in _fragments(data):
        if kind in (1, 2):
            parts = []
        parts.append(body)
        if kind in (1, 4):
            yield parse(b"".join(parts))


def _fragments(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = _HEADER
    while at + 7 <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < 7:
            at += room
            continue
        checksum = int.from_bytes(data[at : at + 4], "little")
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        kind = data[at + 6]
        body = data[at + 7 : at + 7 + length]
        if kind == 0 or len(body) < length:
            return
        if zlib.crc32(bytes([kind]) + body) != checksum:
            raise ValueError(f"the fragment at byte {at} has a wrong checksum; the file is damaged")
        yield kind, body
        at += 7 + length


def _apply(run: LoggedRun, record: Any) -> None:
    match record.WhichOneof("record_type"):
        case "history":
            run.rows.append(_row(record.history))
        case "config":
            for item in record.config.remove:
                run.config.pop(item.key, None)
            run.config.update({item.key: json.loads(item.value_json) for item in record.config.update})
        case "summary":
            for item in record.summary.update:
                key = ".".join(item.nested_key) or item.key
                run.summary[key] = json.loads(item.value_json, parse_int=parse_integer)
        case "run":
            run.config.update({item.key: json.loads(item.value_json) for item in record.run.config.update})
            names = ("run_id", "entity", "project", "run_group", "job_type", "display_name", "notes", "host")
            run.settings = {name: getattr(record.run, name) for name in names}
            run.tags = list(record.run.tags)
        case "metric":
            metric = record.metric
            if not metric.expanded_from_glob:
                run.metrics[metric.name or metric.glob_name] = metric.step_metric
        case "files":
            run.uploads += [item.path for item in record.files.files]
        case "artifact":
            artifact = record.artifact
            files = {item.path: item.local_path for item in artifact.manifest.contents}
            metadata = json.loads(artifact.metadata or "{}")
            run.artifacts.append(LoggedArtifact(artifact.name, artifact.type, metadata, files))
        case "exit":
            run.exit_code = record.exit.exit_code


def _row(history: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in history.item:
        *path, leaf = list(item.nested_key) or [item.key]
        target = row
        for part in path:
            target = target.setdefault(part, {})
        target[leaf] = json.loads(item.value_json, parse_int=parse_integer)
    return row


def parse_integer(text: str) -> int | float:
    """Return the number that a JSON integer stands for. W&B writes the floats 2.0 and -0.0 as ``2`` and ``-0``."""
    return -0.0 if text == "-0" else int(text)
