# SPDX-License-Identifier: Apache-2.0
"""From spools into the journal, against the floor: the same bytes from file through a socket into an SQLite file.

Both arms have two processes, one with all sites and one with the receiver, a TCP connection per site on the loopback, one
message in flight per site, and one transaction per message.
"""

from __future__ import annotations

import functools
import json
import shutil
import socket
import socketserver
import sqlite3
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.child import in_child, kept_folder, started
from tests.bench.figures import Arm, Experiment, Figure, Run

__all__ = ["Channel", "experiments", "serve"]

_LENGTH = struct.Struct("<I")
_CHUNK = 65_536  # what a thousand records of one metric take
_EXPLAIN = (
    "a third of what a record costs either end is the walk over the frames in Python, with their sums; the floor looks "
    "at no record. With one message in flight for each of two sites, the ends wait for each other"
)


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    records = 100_000 if quick else 400_000
    return [_experiment(sites, records, 2 if quick else 5) for sites in (2, 16)]


def _experiment(sites: int, records: int, repeat: int) -> Experiment:
    figure = Figure(
        f"into the journal alone, {sites} sites", "file, TCP, SQLite: the floor", "us", "trackhub", "floor",
        "us/record", "times less", 1 / 3, _EXPLAIN,
    )  # fmt: skip
    arms = {"trackhub": _arm("trackhub", sites, records), "floor": _arm("floor", sites, records)}
    return Experiment(f"floor, {sites} sites", arms, [figure], repeat)


@functools.cache
def _spools(sites: int, records: int) -> Path:
    """Fill the sites' spools once for all rounds; they are kept until this process ends."""
    from tests.bench.load import fill_spool

    folder = kept_folder("spools")
    for i in range(sites):
        fill_spool(folder / f"spool-{i}", f"site-{i + 1}", records // sites)
    return folder


def _arm(arm: str, sites: int, records: int) -> Arm:
    def run(folder: Path) -> Run:
        shutil.copytree(_spools(sites, records), folder, dirs_exist_ok=True)
        with started(f"floor:{arm}_receiver", folder=str(folder)) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdin is not None
            port = int(receiver.stdout.readline())
            sent = in_child(f"floor:{arm}_sites", folder=str(folder), sites=sites, port=port)
            out, err = receiver.communicate(b"\n", timeout=120)
        if receiver.returncode != 0:
            raise RuntimeError(err.decode(errors="replace")[-500:])
        stored = json.loads(out.decode().splitlines()[-1])["stored"]
        logged = records // sites * sites
        return Run({"us": sent["seconds"] / logged * 1e6}, logged, stored if arm == "trackhub" else logged)

    return run


class Channel:
    """One connection to a receiver: a request and its reply at a time."""

    def __init__(self, port: int, site: str = "") -> None:
        """Connect, and say which site this is."""
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        send(self._socket, site.encode())

    def __call__(self, request: bytes, timeout_s: float) -> bytes:
        """Send a request and return the reply."""
        send(self._socket, request)
        return receive(self._file)

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._socket.close()


def send(target: socket.socket, message: bytes) -> None:
    """Send one message."""
    target.sendall(_LENGTH.pack(len(message)) + message)


def receive(file: Any) -> bytes:
    """Return the next message; empty at the end of the stream."""
    head = file.read(_LENGTH.size)
    return bytes(file.read(_LENGTH.unpack(head)[0])) if head else b""


def serve(handle: Callable[[str, bytes], bytes]) -> socketserver.ThreadingTCPServer:
    """Return a running server that answers each site's requests, a thread per site."""

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            site = receive(self.rfile).decode()
            while request := receive(self.rfile):
                send(self.connection, handle(site, request))

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _wait_for_parent(server: socketserver.ThreadingTCPServer) -> None:
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.readline()
    server.shutdown()


def trackhub_receiver(folder: str) -> dict[str, Any]:
    """A receiver without backends."""
    from tests.bench.load import open_receiver
    from trackhub.run import RunStatus

    receiver = open_receiver(Path(folder, "receiver"), {})
    _wait_for_parent(serve(receiver.handle))
    report = receiver.finish(RunStatus.FINISHED)
    return {"stored": sum(site.journaled for site in report.sites.values())}


def trackhub_sites(folder: str, sites: int, port: int) -> dict[str, Any]:
    """A sender per site."""
    from trackhub.delivery.sender import Sender

    begin = time.perf_counter()
    senders = []
    for i in range(sites):
        site = f"site-{i + 1}"
        senders.append(Sender(Path(folder, f"spool-{i}"), Channel(port, site)))
        senders[-1].start()
    for sender in senders:
        ledger = sender.close(600)
        if ledger.spooled:
            raise RuntimeError(f"{ledger.spooled} records were not sent")
    return {"seconds": time.perf_counter() - begin}


def floor_receiver(folder: str) -> dict[str, Any]:
    """Insert each message as it is."""
    db = sqlite3.connect(Path(folder, "floor.db"), isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=NORMAL")
    db.execute("CREATE TABLE batches (id INTEGER PRIMARY KEY, site TEXT, frames BLOB)")
    lock = threading.Lock()

    def handle(site: str, request: bytes) -> bytes:
        with lock:
            db.execute("INSERT INTO batches (site, frames) VALUES (?, ?)", (site, request))
        return b"ok"

    _wait_for_parent(serve(handle))
    return {"stored": db.execute("SELECT total(length(frames)) FROM batches").fetchone()[0]}


def floor_sites(folder: str, sites: int, port: int) -> dict[str, Any]:
    """Read each site's file and send it, a thread per site."""

    def work(site: int) -> None:
        channel = Channel(port, f"site-{site + 1}")
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
