# SPDX-License-Identifier: Apache-2.0
"""What a site that floods costs the others: the time from an honest log call until the journal has the record.

The command calls `beside_a_flood`. Each run has a receiver, two honest sites and, in all arms but one, a site that
floods: three processes. The receiver is called in a pool of threads, as FLARE calls it. One honest site has the default
limits, so that its sender batches records for up to a second. The other one's sender waits for nothing.

The flooding site has 16 requests on their way at each moment, and sends the next one as soon as it has a reply. It
makes them before the run, so it needs little CPU time of the machine itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import statistics
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench.load import open_receiver
from tests.bench.measured_figures import Arm, Experiment, Figure, Run
from tests.bench.subprocesses import SocketChannel, in_child, say, serve, started
from trackhub.delivery.sender import Sender
from trackhub.delivery.wire import MAX_BATCH_RECORDS, Accepted, Batch, Chunk, decode_reply, decode_request, encode
from trackhub.framing import decode_body, encode_frame, scan_frames
from trackhub.job_and_run_info import RunStatus
from trackhub.limits import Limits
from trackhub.records import Metrics, Record
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.writer.writer import Writer

__all__ = ["beside_a_flood"]

_AT_ONCE = 16
_POOL = 64
"""Threads in which FLARE calls a receiver (nvflare 2.9)."""

_STEP_S = 0.02  # the mean time between two log calls
_PIECE_BYTES = 1 << 20
_ALONE, _FLOODING = "alone", "flooding"
_BATCHES = "the largest batches"
_PIECES = "file pieces"
_HONEST = {"default limits": Limits(), "linger_s=0": Limits(linger_s=0, poll_s=0.002)}
"""The honest sites, by their limits."""

_ADDED_MS = {"median": 200, "p99": 1000}
"""How many milliseconds a flood may add where the sender waits for nothing: no more than ``linger_s`` is by default."""

_EXPLAIN = (
    "reading and checking the flood's bytes takes the interpreter's lock; each of the few steps of an honest request "
    "waits for it, and then for the journal"
)


def beside_a_flood(quick: bool) -> list[Experiment]:
    """Return the experiment that compares honest sites beside a flooding one with the same sites alone."""
    figures = [
        Figure(f"log call to journal beside {flood}, {site}, {value}", "the same site alone", f"{value}, {site}", flood,
               _ALONE, "ms", "times less", *target)
        for flood in (_BATCHES, _PIECES)
        for value, added in _ADDED_MS.items()
        for site, target in (("default limits", (1 / 1.5, _EXPLAIN)), ("linger_s=0", (1, _EXPLAIN, added)))
    ]  # fmt: skip
    arms = {arm: _arm(arm, int((2 if quick else 8) / _STEP_S)) for arm in (_ALONE, _BATCHES, _PIECES)}
    return [Experiment("flood", arms, figures, 1 if quick else 3)]


def _arm(flood: str, records: int) -> Arm:
    def run(folder: Path) -> Run:
        with ExitStack() as processes:
            receiver = processes.enter_context(started("flood_costs:receive", folder=str(folder)))
            assert receiver.stdout is not None
            port = int(receiver.stdout.readline())
            if flood != _ALONE:
                hostile = processes.enter_context(started("flood_costs:send_flood", port=port, kind=flood))
                assert hostile.stdout is not None
                hostile.stdout.readline()  # the first replies have come
            in_child("flood_costs:log_honestly", folder=str(folder), port=port, records=records)
            out, err = receiver.communicate(b"\n", timeout=120)
        if receiver.returncode != 0:
            raise RuntimeError(err.decode(errors="replace")[-500:])
        result = json.loads(out.decode().splitlines()[-1])
        values = {}
        for site, delays in result["delays_ms"].items():
            values[f"median, {site}"] = statistics.median(delays)
            values[f"p99, {site}"] = statistics.quantiles(delays, n=100)[-1]
        return Run(values, records * len(_HONEST), result["stored"])

    return run


def receive(folder: str) -> dict[str, Any]:
    """Run a receiver with the backend ``jsonl`` until the parent process sends a line.

    Returns:
        For each honest site how long its records took, and how many of their records are in the journal.
    """
    receiver = open_receiver(Path(folder, "receiver"), {"jsonl": {}}, Limits(deadline_s=0))
    accepted: list[tuple[str, float, bytes]] = []

    def handle(site: str, request: bytes) -> bytes:
        reply = receiver.handle(site, request)
        if site != _FLOODING and isinstance(decode_reply(reply), Accepted):
            accepted.append((site, time.time(), request))
        return reply

    with ThreadPoolExecutor(_POOL) as pool:
        server = serve(lambda site, request: pool.submit(handle, site, request).result())
        say(server.server_address[1])
        sys.stdin.readline()
        server.shutdown()
    report = receiver.finish(RunStatus.FINISHED)
    delays_ms = defaultdict(list)
    for site, at, request in accepted:
        message = decode_request(request)
        if isinstance(message, Batch):
            for frame in scan_frames(message.frames):  # all processes have the same clock
                logged_at = decode_body(message.frames[frame.body : frame.end]).time
                delays_ms[site].append((at - logged_at) * 1e3)
    return {"delays_ms": delays_ms, "stored": sum(report.sites[site].journaled for site in _HONEST)}


def log_honestly(folder: str, port: int, records: int) -> dict[str, Any]:
    """Log as many records at each honest site, and send them."""
    pause = random.Random(1)
    senders = []
    with ExitStack() as writers:
        open_writers = []
        for number, (site, limits) in enumerate(_HONEST.items()):
            spool = Path(folder, f"spool-{number}")
            create_spool(spool, SpoolInfo(site, "job", ("server",)))
            senders.append(Sender(spool, SocketChannel(port, site), limits=limits))
            senders[-1].start()
            open_writers.append(writers.enter_context(Writer(spool)))
        for step in range(records):
            # The pauses differ. Otherwise each call would have the same distance to the sender's next look.
            time.sleep(_STEP_S * pause.uniform(0.5, 1.5))
            for writer in open_writers:
                writer.log({"train/loss": 1.0 / (step + 1)}, step)
    return {"spooled": sum(sender.close(60).spooled for sender in senders)}


def send_flood(port: int, kind: str) -> dict[str, Any]:
    """Send requests of this kind until the parent process kills this one. Print a line once the first replies came."""

    def repeat(channel: SocketChannel, requests: Iterator[bytes]) -> None:
        for request in requests:
            channel(request, 0)

    for _ in range(_AT_ONCE):  # one after another, since the server's queue of new connections is short
        channel, requests = SocketChannel(port, _FLOODING), _flood(kind)
        channel(next(requests), 0)
        threading.Thread(target=repeat, args=(channel, requests), daemon=True).start()
    say(0)
    threading.Event().wait()
    return {}


def _flood(kind: str) -> Iterator[bytes]:
    digest = hashlib.sha256(b"").hexdigest()
    while True:
        if kind == _BATCHES:  # each is of a new stream, so the receiver stores it
            yield encode(Batch(uuid.uuid4().hex, 0, MAX_BATCH_RECORDS, MAX_BATCH_RECORDS, _frames()))
        else:  # of files that are never whole
            yield encode(Chunk(f"{uuid.uuid4().hex}-0", 1 << 40, digest, 0, bytes(_PIECE_BYTES)))


@functools.cache
def _frames() -> bytes:
    records = (Record(seq, 1e9, seq, 0, Metrics({"loss": 0.5})) for seq in range(MAX_BATCH_RECORDS))
    return b"".join(map(encode_frame, records))
