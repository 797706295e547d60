# SPDX-License-Identifier: Apache-2.0
"""A receiver in a process of its own, which fails or dies as planned: ``python -m tests.faults.receiver_process PLAN``.

`tests.faults.job_processes` starts it and sends its one command, ``finish STATUS``, to stdin. The answer is a line of
JSON on stdout. The end of stdin ends the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec

from tests.faults import unix_socket
from trackhub import registry
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.wire import Refused, encode
from trackhub.job_and_run_info import JobInfo, RunInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.spi import Backend, BackendRun

__all__ = ["ReceiverPlan"]

_REFUSAL = Refused("test", "the test planned this refusal")


class ReceiverPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a receiver does, and when it dies.

    Attributes:
        folder, workdir, job, backends, limits: arguments of `trackhub.delivery.receiver.Receiver`.
        socket: where it listens.
        sites: which sites it waits for at the end.
        kill_at_commit: die during this commit of the journal, counted from 1; 0 for none.
        kill_after_us: how long after the begin of that commit, in microseconds.
        kill_at_write: a backend, a method of its runs, and a number: die in that call, before the lane sees its result.
        kill_before_work: die in that call before the backend has done anything.
        mute: take every request and reply to none.
        refuse_batch: refuse the request with this number. Number 1 is the sender's first message.
        vfs: SQLite's layer over the file system. ``unix-dotfile`` has no shared memory, and so no write-ahead log, as
            on a network file system.
    """

    folder: str
    workdir: str
    job: str
    socket: str
    backends: dict[str, dict[str, Any]]
    sites: list[str]
    limits: dict[str, float | str] = {}
    kill_at_commit: int = 0
    kill_after_us: float = 0.0
    kill_at_write: tuple[str, str, int] | None = None
    kill_before_work: bool = False
    mute: bool = False
    refuse_batch: int = 0
    vfs: str = ""


def main() -> int:
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ReceiverPlan)
    _plan_journal(plan)
    if plan.kill_at_write is not None:
        _plan_death_in_backend(*plan.kill_at_write, before=plan.kill_before_work)
    receiver = Receiver(
        Path(plan.workdir),
        state_dir=Path(plan.folder),
        job=JobInfo(plan.job),
        side=Side.SERVER,
        backends=plan.backends,
        limits=Limits.from_mapping(plan.limits),
    )
    receiver.start()
    _listen(plan, receiver)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        _, status = line.split()
        began = time.monotonic()
        silent = receiver.wait_for_sites(plan.sites)
        report = receiver.finish(RunStatus(status))
        left = [t.name for t in threading.enumerate() if t.name.startswith("trackhub")]
        answer = {"silent": sorted(silent), "report": msgspec.to_builtins(report), "threads": left}
        print(json.dumps({**answer, "took_s": time.monotonic() - began}), flush=True)
        break
    return 0


def _listen(plan: ReceiverPlan, receiver: Receiver) -> None:
    path = Path(plan.socket)
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(16)
    requests = 0

    def answer(connection: socket.socket) -> None:
        nonlocal requests
        with connection, contextlib.suppress(OSError):  # the sender gave up waiting, and asks again
            site, request = unix_socket.receive(connection).decode(), unix_socket.receive(connection)
            if plan.mute:
                threading.Event().wait()
            requests += 1
            refused = requests == plan.refuse_batch
            unix_socket.send(connection, encode(_REFUSAL) if refused else receiver.handle(site, request))

    def accept() -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _plan_journal(plan: ReceiverPlan) -> None:
    connect: Callable[..., sqlite3.Connection] = sqlite3.connect
    commits = 0

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            nonlocal commits
            if sql == "COMMIT":
                commits += 1
                if commits == plan.kill_at_commit:
                    threading.Thread(target=_die_soon, args=(plan.kill_after_us,), daemon=True).start()
            return super().execute(sql, *arguments)

    def connect_as_planned(path: Any, **rest: Any) -> sqlite3.Connection:
        if plan.vfs and not rest.get("uri"):
            path, rest["uri"] = f"{Path(path).absolute().as_uri()}?vfs={plan.vfs}", True
        return connect(path, factory=Connection, **rest)

    sqlite3.connect = connect_as_planned  # type: ignore[assignment]


def _die_soon(after_us: float) -> None:
    end = time.perf_counter() + after_us * 1e-6
    while time.perf_counter() < end:
        pass
    _die()


def _plan_death_in_backend(name: str, method: str, number: int, *, before: bool) -> None:
    """Let the process die when the backend has done its work and the lane does not know it yet, or right before it."""
    load = registry.load
    calls = 0

    def dying(work: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if before and calls >= number:
                _die()
            result = work(*arguments)
            if calls >= number:
                _die()
            return result

        return do

    def load_dying(asked: str, *, allowed: Collection[str] | None = None) -> type[Backend[Any]]:
        cls = load(asked, allowed=allowed)
        if asked != name:
            return cls

        class Dying(cls):  # type: ignore[valid-type, misc]
            def open_run(self, info: RunInfo) -> BackendRun:
                run: BackendRun = super().open_run(info)
                setattr(run, method, dying(getattr(run, method)))
                return run

        return Dying

    registry.load = load_dying  # type: ignore[assignment]


if __name__ == "__main__":
    sys.exit(main())
