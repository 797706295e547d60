# SPDX-License-Identifier: Apache-2.0
"""What a hostile site sends: requests made without trackhub's encoder, so that they may break any rule."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.unit.readers_and_bad_backends import STREAM, WAIT_S, batch_of, json_lines, metric
from trackhub.delivery import wire
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.records import Kind, Record

HONEST, HOSTILE = "site-honest", "site-hostile"
OTHER_STREAM = "f" * 32


def frame(kind: int, body: bytes) -> bytes:
    """Return a frame with the right checksum, whatever it holds."""
    checked = struct.pack("<IB", len(body), kind) + body
    return struct.pack("<I", zlib.crc32(checked)) + checked


def record(seq: int, kind: int, *fields: Any, time: Any = 1000.0, step: Any = 1, round_: Any = None) -> bytes:
    """Return the body of a record with these fields of its payload."""
    return msgspec.msgpack.encode([seq, time, step, round_, [kind, *fields]])


def batch(frames: Sequence[bytes], first: int = 0, stream: str = STREAM) -> wire.Batch:
    """Return a batch of frames that are one record each."""
    return wire.Batch(stream, first, first + len(frames), len(frames), b"".join(frames))


def metrics(seq: int, values: Any = None) -> bytes:
    """Return the frame of a record of metrics."""
    return frame(Kind.METRICS, record(seq, Kind.METRICS, {"loss": 1.0} if values is None else values))


class Job:
    """A receiver with an honest and a hostile site.

    Attributes:
        honest_records: what the honest site has sent.
        sent: how many these are.
    """

    def __init__(self, folder: Path, backends: dict[str, dict[str, Any]] | None = None, **limits: Any) -> None:
        self.folder = folder
        self.honest_records: list[Record] = []
        self.receiver = Receiver(
            folder, job=JobInfo("job-1"), side=Side.SERVER, backends=backends or {"jsonl": {}}, limits=Limits(**limits)
        )
        self.receiver.start()

    def ask(self, request: wire.Request, site: str = HOSTILE) -> wire.Reply:
        return wire.decode_reply(self.receiver.handle(site, wire.encode(request)))

    def log_honestly(self, n: int = 20) -> None:
        records = [metric(self.sent + i, key=f"honest/{i % 3}") for i in range(n)]
        assert self.ask(batch_of(records), HONEST) == wire.Accepted()
        self.honest_records += records

    @property
    def sent(self) -> int:
        return len(self.honest_records)

    def stored(self, site: str) -> list[dict[str, Any]]:
        path = self.folder / "jsonl" / "job-1" / f"{site}.jsonl"
        return json_lines(path) if path.exists() else []

    def finish(self, deadline_s: float = WAIT_S) -> DeliveryReport:
        """End the job, and check that the honest site has all that it sent and that its numbers are right."""
        self.ask(wire.Final(wire.SiteCounts(logged=self.sent, acked=self.sent)), HONEST)
        report = self.receiver.finish(RunStatus.FINISHED, deadline_s=deadline_s)
        site = report.sites[HONEST]
        assert site.is_balanced()
        assert (site.received, site.journaled, site.refused, site.missing) == (self.sent, self.sent, {}, 0)
        for lane in report.lanes:
            run = report.lanes[lane][HONEST]
            assert (run.confirmed, run.pending, run.state) == (self.sent, 0, "finished")
        if "jsonl" in report.lanes:
            assert [line["seq"] for line in self.stored(HONEST)] == list(range(self.sent))
        if hostile := report.sites.get(HOSTILE):
            assert hostile.received == hostile.duplicates + hostile.journaled + sum(hostile.refused.values())
        for runs in report.lanes.values():
            for name, run in runs.items():
                assert report.sites[name].journaled == run.confirmed + run.pending + sum(run.rejected.values())
                assert run.pending >= 0
        return report
