# SPDX-License-Identifier: Apache-2.0
"""A site that floods gets no more than its share: of replies, of a lane's time, and of the time at the end of the job.

The receiver is called in a pool of threads, as FLARE calls it: a message waits for a thread, in the order of arrival.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.hostile_site import HOSTILE, Job, batch, metrics
from tests.unit.readers_and_bad_backends import STREAM, WAIT_S, MemoryBackend, metric
from tests.unit.rigs import Bench, room_for_all
from trackhub.delivery import wire
from trackhub.delivery.lane.fair_turns import FairTurns
from trackhub.delivery.lane.file_uploads import FileQueue, FileUploads
from trackhub.delivery.lane.wait_for_disk_room import RunDiskRoom
from trackhub.job_and_run_info import RunStatus
from trackhub.records import Blob, Image, Params, Record
from trackhub.spi import BackendRun, Entry

POOL = 64
"""Threads in which FLARE calls a receiver (nvflare 2.9)."""


class Traffic:
    """Sites that ask a receiver, each as soon as it has the reply to its last request.

    Attributes:
        acks: replies *accepted*, by site.
    """

    def __init__(self, job: Job) -> None:
        self.acks: Counter[str] = Counter()
        self._job = job
        self._pool = ThreadPoolExecutor(POOL)
        self._changed = threading.Condition()
        self._stopped: set[str] = set()

    def send(self, site: str, requests: Iterator[wire.Request]) -> None:
        """Send these one after another. Call it several times for a site that does not wait for its replies."""
        self._ask(site, wire.encode(next(requests)), requests)

    def _ask(self, site: str, request: bytes, rest: Iterator[wire.Request]) -> None:
        def ask() -> None:
            reply = wire.decode_reply(self._job.receiver.handle(site, request))
            upcoming = request
            if isinstance(reply, wire.Accepted):
                with self._changed:
                    self.acks[site] += 1
                    self._changed.notify_all()
                upcoming = wire.encode(next(rest))
            if site not in self._stopped:
                self._ask(site, upcoming, rest)

        self._pool.submit(ask)

    def wait_for(self, count: int, *sites: str) -> Counter[str]:
        """Wait until each of these sites has as many acks more, and return the acks of all sites since the call."""
        with self._changed:
            before = Counter(self.acks)
            assert self._changed.wait_for(lambda: all(self.acks[s] - before[s] >= count for s in sites), 2 * WAIT_S)
            return self.acks - before

    def stop(self, *sites: str) -> None:
        """Have these sites send nothing more."""
        self._stopped |= set(sites)

    def close(self) -> None:
        """End all traffic."""
        self._stopped |= self.acks.keys() | {HOSTILE}
        self._pool.shutdown()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "run", {})


@pytest.fixture
def traffic(job: Job) -> Iterator[Traffic]:
    traffic = Traffic(job)
    yield traffic
    traffic.close()
    job.receiver.finish(RunStatus.FINISHED, deadline_s=0)


def metrics_of(site: str, seq: int) -> Record:
    return metric(seq, key=site)


def batches(number: int) -> Iterator[wire.Request]:
    for seq in range(0, 1 << 40, 20):
        yield batch([metrics(seq + i) for i in range(20)], seq, stream=f"{number:032x}")


def pieces(number: int) -> Iterator[wire.Request]:
    """The pieces of a file that is never whole."""
    digest, piece = hashlib.sha256(b"x").hexdigest(), bytes(1000)
    for offset in range(0, 1 << 40, len(piece)):
        yield wire.Chunk(f"{number:032x}-0", 1 << 40, digest, offset, piece)


@pytest.mark.parametrize("kind", [batches, pieces])
@pytest.mark.parametrize(("quiet", "at_once"), [(1, 8), (3, 16)])
def test_a_site_that_floods_gets_no_more_acks_than_the_others(
    traffic: Traffic, kind: Callable[[int], Iterator[wire.Request]], quiet: int, at_once: int
) -> None:
    sites = [f"site-{i}" for i in range(quiet)]
    for i, site in enumerate(sites):
        traffic.send(site, kind(i))
    for i in range(at_once):
        traffic.send(HOSTILE, kind(100 + i))
    traffic.wait_for(1, *sites, HOSTILE)

    acks = traffic.wait_for(40, *sites)

    most = max(acks[site] for site in sites)
    assert acks[HOSTILE] <= 1.5 * most + 2, acks


def test_a_site_that_floods_alone_may_use_all(traffic: Traffic) -> None:
    traffic.send("site-0", batches(0))
    for i in range(8):
        traffic.send(HOSTILE, batches(100 + i))
    traffic.wait_for(5, "site-0")

    traffic.stop("site-0")

    assert traffic.wait_for(100, HOSTILE)[HOSTILE] >= 100


def test_sites_that_wait_for_their_replies_share_alike(traffic: Traffic) -> None:
    sites = [f"site-{i}" for i in range(6)]
    for i, site in enumerate(sites):
        traffic.send(site, batches(i))
    traffic.wait_for(1, *sites)

    acks = traffic.wait_for(600, *sites)  # on a busy machine, a few turns show only how threads are scheduled

    assert max(acks.values()) <= 2 * min(acks.values()), acks


@pytest.mark.parametrize("costs_s", [(0.01, 0.01, 0.01), (0.01, 0.02, 0.3), (1.0, 0.001)])
def test_busy_runs_get_the_same_time_of_a_lane_whatever_their_turns_cost(costs_s: tuple[float, ...]) -> None:
    turns, used_s = FairTurns(), [0.0] * len(costs_s)

    for _ in range(5000):
        for run in turns.begin(range(len(costs_s))):
            if not turns.must_wait(run):
                used_s[run] += costs_s[run]
                turns.add(run, costs_s[run], moved=True)

    assert max(used_s) - min(used_s) <= max(costs_s) + 0.1 + 1e-6


def test_a_run_that_was_idle_has_no_claim_to_the_time_that_it_did_not_use() -> None:
    turns = FairTurns()
    for _ in range(100):
        for run in turns.begin([0]):
            turns.add(run, 1.0, moved=True)

    order = []
    for _ in range(6):
        for run in turns.begin([0, 1]):
            if not turns.must_wait(run):
                order.append(run)
                turns.add(run, 1.0, moved=True)

    assert order.count(0) >= 3


def test_at_the_end_runs_with_nothing_left_finish_before_a_flood_is_delivered(tmp_path: Path) -> None:
    events: list[Any] = []

    def behave(method: str, argument: Any) -> None:
        if method == "write":
            time.sleep(0.002)  # what a write costs
            events.append(next(iter(argument[0].payload.values)))
        elif method == "finish":
            events.append("finish")

    bench = Bench(tmp_path)
    flood = [metrics_of("flood", seq) for seq in range(3000)]
    bench.add(flood, "a-flood")
    bench.add([metrics_of("quiet", seq) for seq in range(100)], "b-quiet")
    bench.add([metrics_of("quiet", seq) for seq in range(100)], "c-quiet")
    bench.lane(MemoryBackend(behave, max_batch=10))

    bench.finish()

    ends = [i for i, event in enumerate(events) if event == "finish"]
    assert len(ends) == 3
    # Ten writes each, and those of a tenth of a second by which a run may be ahead; of 300.
    assert events[: ends[1]].count("flood") < 150
    assert events[ends[1] :].count("flood") > 150


def test_large_params_of_one_site_are_not_written_again_with_each_confirmation(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.add([metrics_of("quiet", seq) for seq in range(100)], "b-quiet")
    for seq in range(20):
        params = Record(seq, 1000.0, None, None, Params({f"k{seq}": "x" * 200_000}))
        bench.add([params], "a-flood")
    backend = MemoryBackend(changing_params=False)
    bench.lane(backend)

    bench.finish()

    assert {site: len(entries) for site, entries in backend.stored.items()} == {"a-flood": 20, "b-quiet": 100}
    with contextlib.closing(sqlite3.connect(tmp_path / "trackhub.db")) as db:
        (largest,) = db.execute("SELECT max(length(progress)) FROM runs").fetchone()
    assert largest < 10_000


def test_files_of_a_quiet_site_wait_for_one_file_of_a_flooding_one(tmp_path: Path) -> None:
    order: list[int] = []
    all_there, both_done = threading.Event(), threading.Event()

    class Run(BackendRun):
        def __init__(self, site: int) -> None:
            self._site = site

        def write(self, batch: Sequence[Entry]) -> None:
            assert all_there.wait(WAIT_S)
            order.append(self._site)

    uploads = FileUploads("memory", lambda site: both_done.set() if len(order) == 35 else None)
    flood, quiet = (FileQueue(uploads, site, RunDiskRoom(room_for_all(tmp_path), str(site))) for site in (1, 2))
    for queue, files in ((flood, 30), (quiet, 5)):
        image = Image("k", Blob(f"{STREAM}-0", 1, "0" * 64, "image/png"), 1, 1)
        queue.add(Run(queue.site_id), [Entry(i, 1000.0, i, None, image, STREAM, i) for i in range(files)])
    all_there.set()

    assert both_done.wait(WAIT_S)
    uploads.stop(WAIT_S)
    assert order[:12].count(2) == 5
