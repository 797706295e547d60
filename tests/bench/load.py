# SPDX-License-Identifier: Apache-2.0
"""Load for benchmarks: filled spools and journals, a sender's requests, and receivers that take them.

The experiments call it. It makes requests as a sender does, with trackhub's own frame format, but without a trainer
and a spool.
"""

from __future__ import annotations

import gc
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.wire import Accepted, Batch, Busy, Final, Hello, SiteCounts, decode_reply, encode
from trackhub.framing import encode_frame
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.records import Metrics, Record
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.writer.writer import Writer

__all__ = ["BATCH", "deliver", "feed", "fill_journal", "fill_spool", "open_receiver", "requests"]

BATCH = 1000
"""Records in one request: the default of ``Limits.batch_records``."""

_BUSY_S = 0.05
_EPOCH = 1_750_000_000.0


def requests(records: int, *, keys: int = 1, batch: int = BATCH) -> Iterator[bytes]:
    """Yield one site's requests, from ``Hello`` to ``Final``.

    Args:
        records: how many records, with the steps 0, 1, 2, ...
        keys: metrics in each record.
        batch: records in each request.
    """
    stream = uuid.uuid4().hex
    names = ["train/loss"] if keys == 1 else [f"train/metric_{i}" for i in range(keys)]
    yield encode(Hello())
    for first in range(0, records, batch):
        upto = min(first + batch, records)
        frames = b"".join(
            encode_frame(
                Record(seq, _EPOCH + seq / 64, seq, seq // 10_000, Metrics(dict.fromkeys(names, 1.0 / (seq + 1))))
            )
            for seq in range(first, upto)
        )
        yield encode(Batch(stream, first, upto, upto - first, frames))
    yield encode(Final(SiteCounts(logged=records, acked=records)))


def open_receiver(
    folder: Path, backends: Mapping[str, Mapping[str, Any]], limits: Limits | None = None, job: str = "job"
) -> Receiver:
    """Return a started receiver.

    Everything that is imported by then is taken out of garbage collection, as in FLARE's server (docs/adr/0006).

    Args:
        folder: the job's run folder.
        backends: name to options.
        limits: by default with a deadline that is long enough for any load here.
        job: the job's id.
    """
    receiver = Receiver(
        folder, job=JobInfo(job), side=Side.SERVER, backends=backends,
        limits=limits or Limits(deadline_s=1800, preflight_s=120),
    )  # fmt: skip
    receiver.start()
    gc.collect()
    gc.freeze()
    return receiver


def feed(receiver: Receiver, load: Mapping[str, Sequence[bytes]], threads: int = 8) -> None:
    """Hand every site's requests to the receiver. The sites take turns; each site's requests keep their order.

    Args:
        receiver: an open receiver.
        load: site to its requests.
        threads: how many threads call the receiver.

    Raises:
        RuntimeError: the receiver did not accept a request.
    """
    waiting: queue.SimpleQueue[tuple[str, Iterator[bytes]]] = queue.SimpleQueue()
    for site, messages in load.items():
        waiting.put((site, iter(messages)))
    failures: list[str] = []

    def work() -> None:
        while not failures:
            try:
                site, rest = waiting.get_nowait()
            except queue.Empty:  # other threads work on the last sites
                return
            if (request := next(rest, None)) is None:
                continue
            while isinstance(reply := decode_reply(receiver.handle(site, request)), Busy):
                time.sleep(_BUSY_S)  # a sender would send it again, too
            if not isinstance(reply, Accepted):
                failures.append(f"{site}: {reply}")
            waiting.put((site, rest))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise RuntimeError(f"the receiver did not accept a request of site {failures[0]}")


def fill_journal(folder: Path, sites: int, records: int, *, keys: int = 1, job: str = "job") -> None:
    """Make a journal of which nothing is delivered.

    Args:
        folder: the job's run folder.
        sites: how many sites.
        records: records from each site.
        keys: metrics in each record.
        job: the job's id.
    """
    receiver = open_receiver(folder, {}, job=job)
    feed(receiver, {f"site-{i + 1}": list(requests(records, keys=keys)) for i in range(sites)})
    receiver.finish(RunStatus.FINISHED, deadline_s=0)


def deliver(folder: Path, backends: Mapping[str, Mapping[str, Any]], job: str = "job") -> tuple[float, DeliveryReport]:
    """Deliver a filled journal. Return the seconds that this took, and the report.

    The time runs from the end of the backends' preflight to the end of the runs. A preflight makes the store if there
    is none; the bare SDKs also start with a store that exists.

    Args:
        folder: the job's run folder.
        backends: name to options.
        job: the job's id.
    """
    receiver = open_receiver(folder, backends, job=job)
    begin = time.perf_counter()
    report = receiver.finish(RunStatus.FINISHED)
    return time.perf_counter() - begin, report


def fill_spool(folder: Path, site: str, records: int) -> None:
    """Make a site's spool with this many records, as a trainer does."""
    create_spool(folder, SpoolInfo(site, "job", ("server",), max_bytes=1 << 34))
    with Writer(folder) as writer:
        for step in range(records):
            writer.log({"train/loss": 1.0 / (step + 1)}, step)
