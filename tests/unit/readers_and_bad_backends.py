# SPDX-License-Identifier: Apache-2.0
"""Shared by the unit tests of spool, journal, lanes and receiver: independent readers, and backends that misbehave."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.wire import Batch, SiteCounts
from trackhub.framing import decode_body, encode_frame
from trackhub.records import Gap, Metrics, Record
from trackhub.spi import (
    ANY_KEY,
    Backend,
    BackendContext,
    BackendRun,
    Capabilities,
    Confirmation,
    ConfirmedBy,
    Entry,
    JobInfo,
    Kind,
    NoOptions,
    Redelivery,
    RunInfo,
    RunStatus,
    Side,
    WriteReport,
)
from trackhub.spool.batch import SpoolBatch
from trackhub.spool.counts import StreamCount
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.spool.reading import SpoolReader
from trackhub.spool.writing import SpoolWriter
from trackhub.writer.writer import Writer

WAIT_S = 20.0
"""How long a test waits for what must happen; only a failure takes so long."""

ALL_KINDS = frozenset(Kind) - {Kind.GAP}
STREAM = "0123456789abcdef" * 2


def new_spool(folder: Path, *cursors: str, max_bytes: int = 1 << 30) -> Path:
    create_spool(folder, SpoolInfo("site-1", "job-1", cursors or ("server",), max_bytes))
    return folder


def spool_of(writer: Writer) -> SpoolWriter:
    """Return the spool that a writer records into."""
    assert writer._spool is not None
    return writer._spool


def frames_in(data: bytes) -> list[bytes]:
    """Return the bodies of the whole, sound frames at the start of ``data``. Written from the format's description."""
    bodies, at = [], 0
    while len(data) - at >= 9:
        crc, size, _ = struct.unpack_from("<IIB", data, at)
        checked = data[at + 4 : at + 9 + size]
        if len(checked) < size + 5 or zlib.crc32(checked) != crc:
            break
        bodies.append(checked[5:])
        at += 9 + size
    return bodies


def read_spool(folder: Path) -> dict[str, list[Record]]:
    """Return what the segments hold, by stream, in order."""
    found: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.spool")):
        match = re.fullmatch(r"([0-9a-f]{32})-\d+\.spool", path.name)
        assert match, path
        found.setdefault(match[1], []).extend(decode_body(body) for body in frames_in(path.read_bytes()[8:]))
    return found


def metric(seq: int, key: str = "loss", step: int | None = None) -> Record:
    return Record(seq, 1000.0 + seq, seq if step is None else step, None, Metrics({key: float(seq)}))


def batch_of(records: Sequence[Record], stream: str = STREAM) -> Batch:
    """Return a batch as a sender would make it of these consecutive records, gaps among them."""
    first = records[0].seq
    end = first
    for record in records:
        end = record.seq + (record.payload.count if isinstance(record.payload, Gap) else 1)
    count = sum(not isinstance(record.payload, Gap) for record in records)
    return Batch(stream, first, end, count, b"".join(map(encode_frame, records)))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records in a file of the backend ``jsonl``, without the line that ends it."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] != "end"]


def assert_balanced(
    report: DeliveryReport, logged: dict[str, int], stored: dict[tuple[str, str], int] | None = None
) -> None:
    """Check the report's equations, and its numbers against independent counts.

    Args:
        logged: site to the number of log calls that returned.
        stored: (backend, site) to the number of records that were read back.
    """
    assert report.balanced
    assert set(report.sites) == set(logged)
    for site, n in logged.items():
        found = report.sites[site]
        assert found.received == found.duplicates + found.journaled
        assert found.missing == 0
        if (at_site := found.at_site) is not None:
            assert at_site.logged == n
            gone = at_site.withheld + sum(at_site.dropped.values()) + sum(at_site.refused.values())
            assert n == gone + at_site.acked + at_site.spooled
            assert at_site.acked <= found.journaled <= n - gone
        for lane in report.lanes.values():
            run = lane[site]
            assert found.journaled == sum(run.rejected.values()) + run.confirmed + run.pending
            assert run.pending >= 0
    for (lane_name, site), n in (stored or {}).items():
        assert report.lanes[lane_name][site].confirmed == n


def total(counts: SiteCounts) -> int:
    return counts.withheld + sum(counts.dropped.values()) + sum(counts.refused.values()) + counts.acked + counts.spooled


@contextmanager
def small_disk(path: Path, size: int, inodes: int = 0) -> Iterator[Path]:
    """Mount a file system of this size in bytes, so that it can really be full. Skip the test where mounting fails.

    Args:
        path: where to mount it.
        size: its size in bytes.
        inodes: how many files and folders it may have; 0 is no limit.
    """
    with mounted(path, ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "tmpfs", str(path)]):
        yield path


@contextmanager
def mounted(path: Path, *commands: list[str]) -> Iterator[Path]:
    """Make a folder, and mount a file system there with these commands. Skip the test where that is not possible."""
    path.mkdir()
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"there is no {command[0]}")
        if done.returncode:
            pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def allow_inodes(disk: Path, inodes: int = 0) -> None:
    """Change how many files a disk of `small_disk` may have."""
    subprocess.run(["mount", "-o", f"remount,nr_inodes={inodes}", str(disk)], check=True)


class MemoryRun(BackendRun):
    """A run of `MemoryBackend`; subclasses and ``behave`` make it misbehave."""

    def __init__(self, backend: MemoryBackend, info: RunInfo) -> None:
        self.backend = backend
        self.info = info
        self.site = info.site

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        self.backend.calls["write"] += 1
        result = self.backend.behave("write", list(batch))
        self.backend.take(self.site, batch)
        return result if isinstance(result, WriteReport) else None

    def probe(self, entry: Entry) -> None:
        self.backend.calls["probe"] += 1
        self.backend.behave("probe", entry)

    def finish(self, status: RunStatus) -> None:
        self.backend.calls["finish"] += 1
        self.backend.behave("finish", status)
        self.backend.statuses[self.site] = status

    def next_position(self) -> int:
        stored = self.backend.stored.get(self.site)
        return stored[-1].position + 1 if stored else 0


class BufferingRun(MemoryRun):
    """Its ``flush`` confirms."""

    def left_out(self) -> Sequence[Entry]:
        late: Sequence[Entry] | None = self.backend.behave("left_out", self.site)
        return late or ()

    def flush(self) -> Confirmation:
        self.backend.calls["flush"] += 1
        said = self.backend.behave("flush", None)
        return said if isinstance(said, Confirmation) else Confirmation.STORE


class MemoryBackend(Backend[NoOptions]):
    """Keeps entries in memory, by site, in the order of arrival.

    Attributes:
        stored: what a server would hold.
        calls: number of calls of each method.
        behave: called first in every method with its name and argument; raises, hangs or returns a report.
        infos: what ``open_run`` was given.
    """

    spi = 1
    capabilities = Capabilities(
        kinds=ALL_KINDS,
        redelivery=Redelivery.IDEMPOTENT,
        nonfinite=True,
        late_steps=True,
        optional_step=True,
        changing_params=True,
        any_order=True,
        key_rule=ANY_KEY,
    )
    run_class: type[MemoryRun] = MemoryRun

    def __init__(
        self,
        behave: Callable[[str, Any], Any] | None = None,
        *,
        buffering: bool = False,
        stored: dict[str, list[Entry]] | None = None,
        **can: Any,
    ) -> None:
        super().__init__(NoOptions(), BackendContext(Path(), JobInfo("job-1"), Side.LOCAL))
        confirmed_by = ConfirmedBy.FLUSH if buffering else ConfirmedBy.WRITE
        self.capabilities = msgspec.structs.replace(type(self).capabilities, **{"confirmed_by": confirmed_by, **can})
        self.behave = behave or (lambda method, argument: None)
        self.run_class = BufferingRun if buffering else MemoryRun
        self.stored: dict[str, list[Entry]] = {} if stored is None else stored
        self.calls: Counter[str] = Counter()
        self.statuses: dict[str, RunStatus] = {}
        self.infos: list[RunInfo] = []
        self.threads: set[int] = set()
        self.changed = threading.Condition()

    def preflight(self) -> None:
        self.behave("preflight", None)

    def open_run(self, info: RunInfo) -> BackendRun:
        self.calls["open"] += 1
        self.behave("open", info)
        self.infos.append(info)
        if self.capabilities.redelivery is Redelivery.REBUILD:
            self.stored[info.site] = []
        return self.run_class(self, info)

    def close(self) -> None:
        self.calls["close"] += 1

    def take(self, site: str, batch: Sequence[Entry]) -> None:
        with self.changed:
            held = self.stored.setdefault(site, [])
            known = {e.position for e in held}
            if self.capabilities.redelivery is Redelivery.IDEMPOTENT:
                held.extend(e for e in batch if e.position not in known)
            else:
                held.extend(batch)
            self.threads.add(threading.get_ident())
            self.changed.notify_all()

    def wait_for(self, site: str, count: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: len(self.stored.get(site, ())) >= count, WAIT_S)

    def positions(self, site: str = "site-1") -> list[int]:
        return [e.position for e in self.stored.get(site, ())]


def values(records: list[Record]) -> list[float]:
    return [v for r in records if isinstance(r.payload, Metrics) for v in r.payload.values.values()]


def settle_all(reader: SpoolReader, *, final: bool = False) -> int:
    count = 0
    while batch := reader.next_batch(100, 1 << 20, final=final):
        reader.settle(batch)
        count += batch.records
    return count


def assert_accounted(count: StreamCount, logged: int) -> None:
    assert count.logged == logged
    gone = count.withheld + sum(count.dropped.values()) + sum(count.refused.values())
    assert logged == gone + count.acked + count.spooled


class ModelReceiver:
    """What a receiver does, in the simplest way: append what is new of each stream, in order, or fail the test."""

    def __init__(self) -> None:
        self.records: dict[str, list[Record]] = {}
        self.next_seq: Counter[str] = Counter()
        self.gaps: dict[str, Counter[str]] = {}

    def accept(self, batch: SpoolBatch) -> None:
        seq, count = batch.first_seq, 0
        known = self.next_seq[batch.stream]
        assert seq <= known, "records were skipped without a reason"
        stored = self.records.setdefault(batch.stream, [])
        gaps = self.gaps.setdefault(batch.stream, Counter())
        for body in frames_in(batch.frames):
            record = decode_body(body)
            assert record.seq == seq
            if isinstance(record.payload, Gap):
                seq += record.payload.count
                if record.seq >= known:
                    gaps[record.payload.reason] += record.payload.count
            else:
                seq += 1
                count += 1
                if record.seq >= known:
                    stored.append(record)
        assert (seq, count) == (batch.next_seq, batch.records)
        self.next_seq[batch.stream] = max(known, seq)


def drain(
    reader: SpoolReader, receiver: ModelReceiver, *, final: bool = True, max_records: int = 7, max_bytes: int = 2000
) -> None:
    for _ in range(100_000):
        batch = reader.next_batch(max_records, max_bytes, final=final)
        if batch is None:
            return
        receiver.accept(batch)
        reader.settle(batch)
    pytest.fail("the reader does not come to an end")
