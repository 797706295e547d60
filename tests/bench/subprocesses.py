# SPDX-License-Identifier: Apache-2.0
"""Runs functions of the benchmark in processes of their own, connects these, and reads what a process used.

The arms call `in_child` and `started`: what one arm imports and leaves in memory then does not change another arm.
`serve` and `SocketChannel` carry requests between two such processes, over TCP on the loopback.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "ROOT",
    "SocketChannel",
    "children_cpu_s",
    "in_child",
    "kept_folder",
    "own_cpu_s",
    "peak_mb",
    "resident_mb",
    "say",
    "serve",
    "started",
]

ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 900.0
_LENGTH = struct.Struct("<I")


def in_child(function: str, timeout_s: float = _TIMEOUT_S, /, **arguments: Any) -> dict[str, Any]:
    """Call a function in a new process and return its result. Blocks until the process ends.

    Args:
        function: ``module:name`` in ``tests.bench``. It returns a mapping that JSON can hold.
        timeout_s: kill the process after this time.
        arguments: the function's arguments, as JSON can hold them.

    Raises:
        RuntimeError: the function failed, or took too long.
    """
    with started(function, **arguments) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{function} did not end within {timeout_s:.0f} s") from error
    if process.returncode != 0:
        lines = err.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise RuntimeError(f"{function} failed: {lines[-1]}")
    result: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
    return result


def kept_folder(name: str) -> Path:
    """Return a new folder for what all rounds share. It is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"trackhub-bench-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def started(function: str, **arguments: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a function in a new process group; kill the group at the end of the ``with`` block."""
    command = [sys.executable, "-m", "tests.bench.subprocesses", function, json.dumps(arguments, default=str)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class SocketChannel:
    """A connection to a receiver in another process: one request and its reply at a time."""

    def __init__(self, port: int, site: str = "") -> None:
        """Connect, and tell the receiver which site this is."""
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self._socket.makefile("rb")
        _send(self._socket, site.encode())

    def __call__(self, request: bytes, timeout_s: float) -> bytes:
        """Send a request and return the reply."""
        _send(self._socket, request)
        return _receive(self._file)

    def close(self) -> None:
        """Close the connection."""
        self._file.close()
        self._socket.close()


def serve(handle: Callable[[str, bytes], bytes]) -> socketserver.ThreadingTCPServer:
    """Return a running server that answers each site's requests, with one thread for each site."""

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            site = _receive(self.rfile).decode()
            while request := _receive(self.rfile):
                _send(self.connection, handle(site, request))

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _send(target: socket.socket, message: bytes) -> None:
    target.sendall(_LENGTH.pack(len(message)) + message)


def _receive(file: Any) -> bytes:
    """Return the next message; empty at the end of the stream."""
    head = file.read(_LENGTH.size)
    return bytes(file.read(_LENGTH.unpack(head)[0])) if head else b""


def own_cpu_s() -> float:
    """Return the CPU time of this process, all threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def children_cpu_s() -> float:
    """Return the CPU time of all child processes that have ended and been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def resident_mb(pid: int | str = "self") -> float:
    """Return the resident memory of a process now, in MB of 2**20 bytes."""
    return _status(pid, "VmRSS")


def peak_mb(pid: int | str = "self") -> float:
    """Return the largest resident memory that a process ever had, in MB of 2**20 bytes."""
    return _status(pid, "VmHWM")


def _status(pid: int | str, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/status has no field {field}; expected one on Linux")


def say(number: int) -> None:
    """Print one number for the parent process."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main(argv: list[str]) -> None:
    """Call the function that the arguments name, and print its result as one line of JSON."""
    module, _, name = argv[0].partition(":")
    function = getattr(importlib.import_module(f"tests.bench.{module}"), name)
    result = function(**json.loads(argv[1]))
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
