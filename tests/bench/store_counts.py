# SPDX-License-Identifier: Apache-2.0
"""Counts what a store holds, by other means than those that wrote it.

The arms call it after each run. With ``key``, only entries with this text in their key count. What
trackhub itself writes to the federation run (``fl/...``) is no call of an arm, and never counts.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

__all__ = ["count_event_files", "count_event_points", "count_mlflow", "count_spool", "count_wandb"]


def count_spool(folder: Path) -> int:
    """Return the number of records in a spool folder."""
    from trackhub.framing import scan_frames
    from trackhub.spool.layout import SEGMENT_HEADER

    return sum(sum(1 for _ in scan_frames(path.read_bytes(), len(SEGMENT_HEADER))) for path in folder.glob("*.spool"))


def count_event_files(folder: Path) -> int:
    """Return the number of scalars in all event files below a folder."""
    return sum(1 for _ in _scalars(folder))


def count_event_points(folder: Path, key: str = "") -> int:
    """Return the number of scalars in all event files below a folder, each pair of tag and step once."""
    return sum(key in tag for tag, _ in set(_scalars(folder)))


def _scalars(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield tag and step of all scalars below a folder. Decodes protobuf and checks the CRCs."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    for path in folder.rglob("*tfevents*"):
        if path.is_file():
            for data in RawEventFileLoader(str(path)).Load():
                event = Event.FromString(data)
                for value in event.summary.value:
                    if value.tag[:1] != "_":
                        yield value.tag, event.step


def count_mlflow(database: Path, key: str = "") -> int:
    """Return the number of metric points in an MLflow store."""
    with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as db:
        count = "SELECT count(*) FROM metrics WHERE instr(key, ?) AND key NOT LIKE 'fl/%'"
        return int(db.execute(count, (key,)).fetchone()[0])


def count_wandb(folder: Path, key: str = "") -> int:
    """Return the number of history rows in all offline runs below a folder."""
    from trackhub_wandb.offline_readback import read_records  # a reader for tests: it shares no code with the plugin

    records = (record for path in folder.rglob("*.wandb") for record in read_records(path))
    rows = (record.history for record in records if record.HasField("history"))
    keys = ([item.key or "/".join(item.nested_key) for item in row.item] for row in rows)
    return sum(any(key in found for found in row) and not any(found.startswith("fl/") for found in row) for row in keys)
