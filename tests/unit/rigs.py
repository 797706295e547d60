# SPDX-License-Identifier: Apache-2.0
"""Rigs for the tests of lanes and senders: a journal with lanes on it, and a spool whose senders reach a receiver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.unit.readers_and_bad_backends import (
    WAIT_S,
    MemoryBackend,
    assert_balanced,
    batch_of,
    json_lines,
    metric,
    new_spool,
)
from trackhub.delivery import wire
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.lane.deliver_run import RunDelivery
from trackhub.delivery.lane.lane import Lane
from trackhub.delivery.lane.wait_for_disk_room import RunDiskRoom
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport, RunReport
from trackhub.delivery.sender import Sender
from trackhub.delivery.share_last_disk_room import DiskRoom
from trackhub.job_and_run_info import RunStatus, Side
from trackhub.limits import Limits
from trackhub.records import Record
from trackhub.spi import Backend, JobInfo, RunInfo
from trackhub.writer.writer import Writer

SITE = "site-1"


def room_for_all(folder: Path) -> DiskRoom:
    """Return a room that lets every site write."""
    return DiskRoom(folder, folder, frozenset)


class Bench:
    """A journal with records in it, and lanes on it."""

    def __init__(self, folder: Path, job: str = "job-1") -> None:
        self.folder = folder
        self.job = job
        self.journal = Journal.open(folder / "trackhub.db", job=job, side=Side.SERVER)
        self.counts: dict[str, int] = {}
        self.lanes: dict[str, Lane] = {}

    def log(self, n: int, site: str = SITE, rows: int = 1) -> None:
        for _ in range(rows):
            first = self.counts.get(site, 0)
            self.add([metric(first + i) for i in range(n)], site)

    def add(self, records: list[Record], site: str = SITE) -> None:
        found = self.journal.add_site(site, 1000.0)
        self.journal.append(found, batch_of(records), {})
        self.counts[site] = self.counts.get(site, 0) + len(records)
        for lane in self.lanes.values():
            lane.notify(found)

    def lane(self, backend: Backend[Any], name: str = "memory", *, flush_s: float = 0.01) -> Lane:
        lane = self.lanes[name] = Lane(
            name, backend, self.journal, job=JobInfo(self.job), side=Side.SERVER,
            blob_dir=lambda site: self.folder / "blobs" / site, run_folder=self.folder,
            room=room_for_all(self.folder), flush_s=flush_s, is_running=lambda: True,
        )  # fmt: skip
        lane.start()
        return lane

    def finish(self, timeout_s: float = WAIT_S, status: RunStatus = RunStatus.FINISHED) -> DeliveryReport:
        """End all lanes as a receiver does."""
        for lane in self.lanes.values():
            lane.begin_finish({}, status, timeout_s)
        deadline = time.monotonic() + timeout_s
        for lane in self.lanes.values():
            lane.join(deadline - time.monotonic())
            self.journal.save_runs(lane.unstored_ends())
        report = self.journal.report(list(self.lanes))
        self.lanes.clear()
        self.journal.close()
        assert_balanced(report, self.counts)
        return report


def run_of(report: DeliveryReport, site: str = SITE, lane: str = "memory") -> RunReport:
    return report.lanes[lane][site]


class Consuming(MemoryBackend):
    """Its runs empty the list that ``write`` was given."""

    def take(self, site: str, batch: Any) -> None:
        super().take(site, batch)
        batch.clear()


class Odd(MemoryBackend):
    """Its runs return True from ``write``, which is no report."""

    def open_run(self, info: RunInfo) -> Any:
        run = super().open_run(info)
        write = run.write

        def odd(batch: Any) -> Any:
            write(batch)
            return True

        run.write = odd  # type: ignore[method-assign]
        return run


def failing(times: int, error: Callable[[], BaseException], method: str = "write") -> Callable[[str, Any], None]:
    left = [times]

    def behave(called: str, argument: Any) -> None:
        if called == method and left[0] > 0:
            left[0] -= 1
            raise error()

    return behave


def poisoned(bad: set[int], error: Callable[[], BaseException]) -> Callable[[str, Any], None]:
    def behave(method: str, argument: Any) -> None:
        if method == "write" and any(e.position in bad for e in argument):
            raise error()

    return behave


FAST = Limits(batch_records=50, poll_s=0.005, linger_s=0, keepalive_s=0.1, flush_s=0.01)


class SenderRig:
    """A spool, a receiver, and a channel between them.

    Attributes:
        before: called with each request before the channel carries it. If it raises, the request is lost.
        after: called with each request after the receiver replied. If it raises, the reply is lost.
        requests: all requests that the channel was given.
    """

    def __init__(self, folder: Path, limits: Limits = FAST) -> None:
        self.folder = folder
        self.spool = new_spool(folder / "site" / "spool")
        self.limits = limits
        self.before: Callable[[wire.Request], None] = lambda request: None
        self.after: Callable[[wire.Request], None] = lambda request: None
        self.requests: list[wire.Request] = []
        self.receiver = self.new_receiver()
        self.senders: list[Sender] = []
        self.finished = False

    def new_receiver(self) -> Receiver:
        folder = self.folder / "receiver"
        receiver = Receiver(folder, job=JobInfo("job-1"), side=Side.SERVER, backends={"jsonl": {}}, limits=self.limits)
        receiver.start()
        return receiver

    def channel(self, data: bytes, timeout_s: float) -> bytes:
        request = wire.decode_request(data)
        self.requests.append(request)
        self.before(request)
        reply = self.receiver.handle(SITE, data)
        self.after(request)
        return reply

    def sender(self, channel: Callable[[bytes, float], bytes] | None = None, *, start: bool = True) -> Sender:
        sender = Sender(self.spool, channel or self.channel, limits=self.limits)
        if start:
            sender.start()
        self.senders.append(sender)
        return sender

    def stored(self) -> list[dict[str, Any]]:
        """Return what the backend has. Before the end, its lane may not have delivered everything yet."""
        assert self.finished, "call finish() first"
        path = self.folder / "receiver" / "jsonl" / "job-1" / f"{SITE}.jsonl"
        return json_lines(path) if path.exists() else []

    def finish(self, deadline_s: float = WAIT_S) -> DeliveryReport:
        self.finished = True
        return self.receiver.finish(RunStatus.FINISHED, deadline_s=deadline_s)


def log(spool: Path, n: int, key: str = "a") -> None:
    with Writer(spool) as writer:
        for i in range(n):
            writer.log({key: i}, i)


def assert_all_arrived(rig: SenderRig, counts: wire.SiteCounts, report: DeliveryReport, logged: dict[str, int]) -> None:
    """Check that the backend's file holds each record once and in order within its key, and that the counts agree."""
    lines = rig.stored()
    found: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line["values"].items():
            found.setdefault(key, []).append(value)
    assert found == {key: list(map(float, range(n))) for key, n in logged.items()}
    n = sum(logged.values())
    assert (counts.logged, counts.acked, counts.spooled) == (n, n, 0)
    assert_balanced(report, {SITE: n}, {("jsonl", SITE): n})
    assert report.sites[SITE].journaled == n
    assert report.undelivered() == 0
    assert report.lost() == 0


def delivery_on(bench: Bench, backend: MemoryBackend, *, flush_s: float = 3600.0) -> RunDelivery:
    """Return the delivery of the site's run to this backend."""
    site = bench.journal.add_site(SITE, 1000.0)
    info = RunInfo(JobInfo("job-1"), SITE, Side.SERVER, 1000.0, 0, bench.folder)
    return RunDelivery(
        "memory",
        backend,
        bench.journal,
        site,
        info,
        room=RunDiskRoom(room_for_all(bench.folder), SITE),
        flush_s=flush_s,
        stop=threading.Event(),
    )
