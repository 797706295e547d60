# SPDX-License-Identifier: Apache-2.0
"""What the journal costs: the rate from spools into it, its size, and ``trackhub status`` on a large one.

The command calls `against_the_floor` and `size_and_status`.

The *floor* is the same bytes from a file through a socket into an SQLite file. Both of its arms have two processes,
one with all sites and one with the receiver. Each site has a TCP connection on the loopback and one message in flight.
Each message is one transaction.
"""

from __future__ import annotations

import functools
import json
import shutil
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from tests.bench.load import feed, fill_spool, open_receiver, requests
from tests.bench.measured_figures import Arm, Experiment, Figure, Run
from tests.bench.subprocesses import ROOT, SocketChannel, in_child, kept_folder, say, serve, started
from trackhub.delivery.journal.journal import JOURNAL_NAME, Journal
from trackhub.delivery.sender import Sender
from trackhub.delivery.wire import Batch, decode_request
from trackhub.framing import decode_body, scan_frames
from trackhub.job_and_run_info import RunStatus

__all__ = ["against_the_floor", "size_and_status"]

_CHUNK = 65_536  # bytes: what a thousand records of one metric take
_MILLION = 1_000_000
_FLOOR = (
    "a third of a record's cost at each end is the walk over the frames and their checksums in Python; the floor looks "
    "at no record. With one message in flight for each of two sites, the two ends wait for each other"
)


def against_the_floor(quick: bool) -> list[Experiment]:
    """Return the experiments that compare the way into the journal with the floor."""
    records = 100_000 if quick else 400_000
    return [_floor(sites, records, 2 if quick else 5) for sites in (2, 16)]


def _floor(sites: int, records: int, repeat: int) -> Experiment:
    figure = Figure(
        f"into the journal alone, {sites} sites", "file, TCP, SQLite: the floor", "us", "trackhub", "floor",
        "us/record", "times less", 1 / 3, _FLOOR,
    )  # fmt: skip
    arms = {"trackhub": _floor_arm("trackhub", sites, records), "floor": _floor_arm("floor", sites, records)}
    return Experiment(f"floor, {sites} sites", arms, [figure], repeat)


@functools.cache
def _spools(sites: int, records: int) -> Path:
    """Fill the sites' spools once for all rounds. They are kept until this process ends."""
    folder = kept_folder("spools")
    for i in range(sites):
        fill_spool(folder / f"spool-{i}", f"site-{i + 1}", records // sites)
    return folder


def _floor_arm(arm: str, sites: int, records: int) -> Arm:
    def run(folder: Path) -> Run:
        shutil.copytree(_spools(sites, records), folder, dirs_exist_ok=True)
        with started(f"journal_costs:{arm}_receiver", folder=str(folder)) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdin is not None
            port = int(receiver.stdout.readline())
            sent = in_child(f"journal_costs:{arm}_sites", folder=str(folder), sites=sites, port=port)
            out, err = receiver.communicate(b"\n", timeout=120)
        if receiver.returncode != 0:
            raise RuntimeError(err.decode(errors="replace")[-500:])
        stored = json.loads(out.decode().splitlines()[-1])["stored"]
        logged = records // sites * sites
        return Run({"us": sent["seconds"] / logged * 1e6}, logged, stored if arm == "trackhub" else logged)

    return run


def _serve_until_told(server: socketserver.ThreadingTCPServer) -> None:
    """Tell the parent process the server's port, and serve until the parent sends a line."""
    say(server.server_address[1])
    sys.stdin.readline()
    server.shutdown()


def trackhub_receiver(folder: str) -> dict[str, Any]:
    """Run a receiver without backends."""
    receiver = open_receiver(Path(folder, "receiver"), {})
    _serve_until_told(serve(receiver.handle))
    report = receiver.finish(RunStatus.FINISHED)
    return {"stored": sum(site.journaled for site in report.sites.values())}


def trackhub_sites(folder: str, sites: int, port: int) -> dict[str, Any]:
    """Run a sender for each site."""
    begin = time.perf_counter()
    senders = []
    for i in range(sites):
        site = f"site-{i + 1}"
        senders.append(Sender(Path(folder, f"spool-{i}"), SocketChannel(port, site)))
        senders[-1].start()
    for sender in senders:
        counts = sender.close(600)
        if counts.spooled:
            raise RuntimeError(f"{counts.spooled} records were not sent")
    return {"seconds": time.perf_counter() - begin}


def floor_receiver(folder: str) -> dict[str, Any]:
    """Insert each message into an SQLite file as it is."""
    db = sqlite3.connect(Path(folder, "floor.db"), isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=NORMAL")
    db.execute("CREATE TABLE batches (id INTEGER PRIMARY KEY, site TEXT, frames BLOB)")
    lock = threading.Lock()

    def handle(site: str, request: bytes) -> bytes:
        with lock:
            db.execute("INSERT INTO batches (site, frames) VALUES (?, ?)", (site, request))
        return b"ok"

    _serve_until_told(serve(handle))
    return {"stored": db.execute("SELECT total(length(frames)) FROM batches").fetchone()[0]}


def floor_sites(folder: str, sites: int, port: int) -> dict[str, Any]:
    """Read each site's files and send them, with one thread for each site."""

    def work(site: int) -> None:
        channel = SocketChannel(port, f"site-{site + 1}")
        for path in sorted(Path(folder, f"spool-{site}").glob("*.spool")):
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    channel(chunk, 60)
        channel.close()

    begin = time.perf_counter()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(sites)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.perf_counter() - begin}


def size_and_status(quick: bool) -> list[Experiment]:
    """Return the experiments on the journal's size and on ``trackhub status``, both against JSON lines."""
    sized = 100_000
    size = Experiment(
        "journal size",
        {"trackhub": lambda folder: _journal_bytes(folder, sized), "JSON lines": lambda folder: _json_bytes(sized)},
        [Figure("journal bytes per record", "the same points as JSON lines", "bytes", "trackhub", "JSON lines",
                "bytes", "times less", 2)],
        repeat=1,
    )  # fmt: skip
    millions = 10
    against = f"reading the same points as JSON lines (one million of them, times {millions})"
    build = functools.cache(lambda: _build(millions))
    status = Experiment(
        "status",
        {
            "trackhub status": _status(build, millions * _MILLION),
            "JSON lines": lambda folder: _read_lines(build()[1], millions),
        },
        [Figure(f"trackhub status on {millions} million records", against, "seconds", "trackhub status", "JSON lines",
                "s", "times less", 20,
                "it reads counters and no row; all of the time is the start of Python and of the command's libraries")],
        repeat=2 if quick else 5,
    )  # fmt: skip
    return [size, status]


def _journal_bytes(folder: Path, records: int) -> Run:
    receiver = open_receiver(folder, {})
    feed(receiver, {"site-1": list(requests(records))})
    stored = receiver.finish(RunStatus.FINISHED, deadline_s=0).sites["site-1"].journaled
    return Run({"bytes": (folder / "trackhub" / JOURNAL_NAME).stat().st_size / records}, records, stored)


def _json_bytes(records: int) -> Run:
    return Run({"bytes": sum(map(len, _lines(records))) / records})


def _lines(records: int) -> list[bytes]:
    """Return the records of ``load.requests`` as JSON lines with named fields, as the backend ``jsonl`` writes them."""
    encode, lines = msgspec.json.Encoder().encode, []
    for request in requests(records):
        message = decode_request(request)
        if isinstance(message, Batch):
            for frame in scan_frames(message.frames):
                record = decode_body(message.frames[frame.body : frame.end])
                line = {"time": record.time, "step": record.step, "round": record.round, "seq": record.seq}
                lines.append(encode({**line, "values": record.payload.values}) + b"\n")  # type: ignore[union-attr]
    return lines


def _build(millions: int) -> tuple[Path, Path]:
    """Make a journal and a file of JSON lines; keep both until this process ends.

    The journal holds a million records, as often as ``millions`` says. The file holds the million once.
    """
    folder = kept_folder("journal")
    messages = map(decode_request, requests(_MILLION))
    batches = [message for message in messages if isinstance(message, Batch)]
    journal = Journal.open(folder / JOURNAL_NAME, job="job", side="server")
    for number in range(millions):
        site = journal.add_site(f"site-{number % 2 + 1}", time.time())
        for batch in batches:
            journal.append(site, msgspec.structs.replace(batch, stream=f"{number:032x}"), {})
    journal.close()
    lines = folder / "points.jsonl"
    lines.write_bytes(b"".join(_lines(_MILLION)))
    return folder / JOURNAL_NAME, lines


def _status(build: functools._lru_cache_wrapper[tuple[Path, Path]], records: int) -> Arm:
    def run(folder: Path) -> Run:
        path, _ = build()
        begin = time.perf_counter()
        command = [sys.executable, "-m", "trackhub.cli", "status", "--json", str(path)]
        # Its exit status is 1: nothing has delivered the records of this journal.
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - begin
        sites = json.loads(done.stdout)["journals"][0]["sites"].values()
        return Run({"seconds": seconds}, records, sum(site["journaled"] for site in sites))

    return run


def _read_lines(path: Path, times: int) -> Run:
    """Count a million points as a script would, with a fast JSON reader. The time is multiplied by ``times``."""
    begin, count, decode = time.perf_counter(), 0, msgspec.json.Decoder().decode
    with path.open("rb") as file:
        for line in file:
            count += len(decode(line)["values"])
    return Run({"seconds": (time.perf_counter() - begin) * times}, _MILLION, count)
