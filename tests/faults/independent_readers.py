# SPDX-License-Identifier: Apache-2.0
"""Readers of spools, journals and stores that share no code with trackhub.

The tests compare their counts with those that trackhub reports. They follow the descriptions of the formats in
``trackhub.framing``, ``trackhub.spool.layout`` and ``trackhub.delivery.journal``: a defect in trackhub's own readers
then cannot hide a defect in its writers.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import json
import re
import sqlite3
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trackhub_wandb.offline_readback import read_log

from tests.faults.trainer_calls import Seen

__all__ = [
    "Frame",
    "LaneCount",
    "ReceiverCount",
    "SiteCount",
    "count_confirmed",
    "count_received",
    "count_receiver",
    "count_site",
    "read_store",
    "read_tensorboard",
    "read_times",
    "read_wandb",
    "read_wandb_offline",
]

_DROPS = ("spool_full", "disk_full", "io_error", "unconvertible", "invalid_value", "invalid_call", "writer_closed")
_GAP = 9


class Frame(NamedTuple):
    """One intact frame: its record's number, and for a gap how many records are missing, and why."""

    seq: int
    gap: int
    reason: str


@dataclass
class SiteCount:
    """The counts of a site's spool. ``logged`` comes from its ledgers, or from its frames if these hold more."""

    logged: int = 0
    streams: int = 0
    acked: int = 0
    spooled: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    withheld: int = 0


@dataclass
class LaneCount:
    """The journal's counts of one run in one lane."""

    confirmed: int
    rejected: dict[str, int]
    possible_duplicates: int


@dataclass
class ReceiverCount:
    """The journal's counts of one site. ``journaled`` is counted from the frames in it."""

    received: int
    duplicates: int
    missing: int
    journaled: int
    lanes: dict[str, LaneCount]


def frames(data: bytes) -> Iterator[Frame]:
    """Yield the frames from the beginning up to the first damaged one."""
    at = 0
    while len(data) - at >= 9:
        crc, size, kind = struct.unpack_from("<IIB", data, at)
        body = data[at + 9 : at + 9 + size]
        if len(body) < size or zlib.crc32(data[at + 4 : at + 9] + body) != crc:
            return
        seq, _, _, _, payload = msgspec.msgpack.decode(body)
        yield Frame(seq, payload[1], payload[2]) if kind == _GAP else Frame(seq, 0, "")
        at += 9 + size


def count_site(folder: Path, cursor: str = "server") -> SiteCount:
    """Count the records of a spool without damage, as the reader with this cursor left it."""
    total = SiteCount()
    retired: Any = _read_checked(folder / f"{cursor}.retired") or (0, 0, 0, 0, {}, {}, [])
    streams = {m[1] for p in folder.iterdir() if (m := re.fullmatch(r"([0-9a-f]{32})[-.].*", p.name))} - {*retired[6]}
    total.streams = len(streams) + retired[0]
    _, total.logged, total.withheld, total.acked, *_ = retired
    total.dropped.update(retired[4])
    total.refused.update(retired[5])
    for stream in streams:
        ledger = folder / f"{stream}.ledger"
        counts = 1 + len(_DROPS)
        stored = ledger.read_bytes() if ledger.exists() else bytes(8 * counts)
        logged, *drops = struct.unpack_from(f"<{counts}Q", stored)
        next_seq = 0
        explained: Counter[str] = Counter()
        if ack := _read_checked(folder / f"{stream}.{cursor}.ack"):
            _, _, next_seq, acked, refused, past, *_ = ack
            total.acked += acked
            total.refused.update(refused)
            explained.update(past)
        end = next_seq
        for segment in sorted(folder.glob(f"{stream}-*.spool")):
            for frame in frames(segment.read_bytes()[8:]):
                if frame.seq >= next_seq:
                    total.spooled += not frame.gap
                    explained[frame.reason] += frame.gap
                    end = frame.seq + (frame.gap or 1)
        total.logged += max(logged, end)
        total.withheld += explained.pop("withheld", 0)
        counted = dict(zip(_DROPS, drops, strict=True))
        for reason in {*counted, *explained} - {""}:
            if n := max(counted.get(reason, 0), explained[reason]):
                total.dropped[reason] += n
    return total


def _read_checked(path: Path) -> list[Any] | None:
    """Return the fields in a file that begins with size and checksum; None if nothing was ever written to it."""
    data = path.read_bytes() if path.exists() else b""
    if not data:  # its process may have died after it had made the file
        return None
    size, crc = struct.unpack_from("<II", data)
    assert zlib.crc32(data[8 : 8 + size]) == crc, path
    fields: list[Any] = msgspec.msgpack.decode(data[8 : 8 + size])
    return fields


def count_receiver(journal: Path) -> dict[str, ReceiverCount]:
    """Return the counts of a journal by site."""
    found = {}
    closed = not journal.with_name(f"{journal.name}-wal").exists()  # only then may the folder be read-only
    db = sqlite3.connect(f"{journal.absolute().as_uri()}?mode=ro{'&immutable=1' * closed}", uri=True)
    try:
        for site, name, received, duplicates, missing in db.execute(
            "SELECT id, name, received, duplicates, missing FROM sites"
        ).fetchall():
            blobs = db.execute("SELECT frames FROM batches WHERE site = ?", (site,))
            journaled = sum(not frame.gap for (blob,) in blobs for frame in frames(blob))
            lanes = {}
            for lane, blob in db.execute("SELECT lane, progress FROM runs WHERE site = ?", (site,)):
                p: dict[str, Any] = msgspec.msgpack.decode(blob)
                lanes[lane] = LaneCount(p["confirmed"], p["rejected"], p["possible_duplicates"])
            found[name] = ReceiverCount(received, duplicates, missing, journaled, lanes)
    finally:
        db.close()
    return found


def count_received(journal: Path) -> int:
    """Return how many records a journal has received, by its own count. It reads no frame, unlike `count_receiver`."""
    with contextlib.closing(sqlite3.connect(f"{journal.absolute().as_uri()}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT coalesce(sum(received), 0) FROM sites").fetchone()[0])


def count_confirmed(journal: Path) -> dict[str, int]:
    """Return how many records each lane of a journal has confirmed, by its own count."""
    with contextlib.closing(sqlite3.connect(f"{journal.absolute().as_uri()}?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT lane, progress FROM runs").fetchall()
    confirmed: Counter[str] = Counter()
    for lane, blob in rows:
        confirmed[lane] += msgspec.msgpack.decode(blob)["confirmed"]
    return dict(confirmed)


def read_store(path: Path) -> list[Seen]:
    """Return the records of a file of JSON lines, in order: of ``jsonl``, a faulty backend, or the failing server."""
    seen = []
    content = path.read_text() if path.exists() else ""
    for line in content[: content.rfind("\n") + 1].splitlines():  # somebody may be writing the last line
        record = json.loads(line)
        kind = record.get("kind")
        if kind == "end":
            continue
        if kind == "metrics":
            ((key, value),) = record["values"].items()
        elif kind == "text":
            key, value = record["key"], record["text"]
        elif kind == "artifact":
            key, value = record["key"], record["sha256"]
        else:
            key, value = record["key"], record["value"]
        seen.append(Seen(key, record["step"], value))
    return seen


def read_times(path: Path) -> dict[tuple[str, int], float]:
    """Return the times in a file of ``jsonl``, by key and step."""
    found = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "metrics":
            (key,) = record["values"]
            found[key, record["step"]] = record["time"]
    return found


def read_tensorboard(folder: Path) -> list[Seen]:
    """Return a run's scalars and texts, read with TensorBoard's own reader. The records of one key keep their order."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    tags = reader.Tags()
    seen = [Seen(tag, e.step, e.value) for tag in tags["scalars"] for e in reader.Scalars(tag)]
    for tag in tags["tensors"]:
        for event in reader.Tensors(tag):
            text = event.tensor_proto.string_val
            key = tag.removesuffix("/text_summary")
            if text and text[0].startswith(b"| file | type |"):  # it holds no file, only its name and digest
                seen.append(Seen(key, None, text[0].decode().rstrip(" |\n").rpartition("|")[2].strip()))
            elif text:
                seen.append(Seen(key, event.step, text[0].decode()))
    return seen


def read_wandb_offline(folder: Path, site: str) -> list[Seen]:
    """Return the records of a site in a folder ``wandb``, files last. There may be one folder for a run at most.

    The reader shares no code with the rest of trackhub. It parses the records with W&B's own protobuf classes.
    """
    logs = map(read_log, folder.glob("offline-run-*/run-*.wandb"))
    runs = [log for log in logs if log.config.get("trackhub", {}).get("site") == site]
    assert len(runs) <= 1, [log.folder for log in runs]
    seen = [seen for log in runs for seen in _rows(log.rows, partial(_text, log.folder / "files"))]
    for artifact in (artifact for log in runs for artifact in log.artifacts):
        ((_, local_path),) = artifact.files.items()
        content = (folder.parent / local_path).read_bytes()
        seen.append(Seen(artifact.metadata["key"], None, hashlib.sha256(content).hexdigest()))
    return seen


def read_wandb(state: dict[str, Any], site: str) -> list[Seen]:
    """Return the records of a site at the emulator of a W&B server, files last.

    A file that fails goes behind the others, so files have no order there. They are sorted by the number of their call.
    """
    runs = [run for run in state["runs"].values() if run["config"].get("trackhub", {}).get("site") == site]
    assert len(runs) <= 1, sorted(state["runs"])
    seen = [seen for run in runs for seen in _rows(map(json.loads, run["history"]), run["texts"].get)]
    files = [
        Seen(artifact["metadata"]["key"], None, digest)
        for artifact in state["artifacts"]
        if artifact["state"] == "COMMITTED" and artifact["metadata"].get("site") == site
        for name, digest in artifact["sha256"].items()
        if name != "wandb_manifest.json"
    ]
    return seen + sorted(files, key=lambda file: int(file.key.rpartition("-")[2]))


def _rows(rows: Iterable[dict[str, Any]], text_of: Callable[[str], str | None]) -> Iterator[Seen]:
    for row in rows:
        for key, value in row.items():
            if isinstance(value, dict):
                text = re.search(r"<pre[^>]*>(.*)</pre>", text_of(value["path"]) or "", re.DOTALL)
                yield Seen(key, row["step"], html.unescape(text[1]) if text else "a text whose file is not there")
            elif not key.startswith("_") and key not in ("step", "round"):
                yield Seen(key, row["step"], value)


def _text(folder: Path, name: str) -> str | None:
    path = folder / name
    return path.read_text() if path.exists() else None
