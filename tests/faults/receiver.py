# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.faults.receiver PLAN``: a receiver in a process of its own, which may be planned to kill itself.

Commands on stdin, an answer in JSON on stdout: ``finish STATUS``. The end of stdin ends the process.
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

from tests.faults import wire
from trackhub import registry
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.wire import Refused, encode
from trackhub.limits import Limits
from trackhub.run import JobInfo, RunInfo, RunStatus, Side
from trackhub.spi import Backend, BackendRun

__all__ = ["ReceiverPlan"]

_REFUSAL = Refused("test", "as planned")


class ReceiverPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a receiver does, and when it dies.

    Attributes:
        folder, workdir, job, backends, limits: as for trackhub's own.
        socket: where it listens.
        sites: whom to wait for at the end.
        kill_at_commit: die while this commit of the journal is being made; 0 never.
        kill_after_us: how long after that commit began.
        kill_at_write: backend, method, and the number of the call after which to die, before trackhub hears of it.
        mute: take every request and answer none.
        refuse_batch: answer this request, counted from 1, with a refusal: 1 is the sender's hello.
        vfs: SQLite's layer over the file system; ``unix-dotfile`` has no shared memory, as a network file system has
            none, so that there is no write-ahead log.
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
    mute: bool = False
    refuse_batch: int = 0
    vfs: str = ""


def main() -> int:
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ReceiverPlan)
    _plan_journal(plan)
    if plan.kill_at_write is not None:
        _plan_death_in_backend(*plan.kill_at_write)
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
        with connection, contextlib.suppress(OSError):  # the sender has gone: it asks again
            site, request = wire.receive(connection).decode(), wire.receive(connection)
            if plan.mute:
                threading.Event().wait()
            requests += 1
            refused = requests == plan.refuse_batch
            wire.send(connection, encode(_REFUSAL) if refused else receiver.handle(site, request))

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


def _plan_death_in_backend(name: str, method: str, number: int) -> None:
    """Have the process die when the backend's work is done and the lane does not know it yet."""
    load = registry.load
    calls = 0

    def dying(work: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any) -> Any:
            nonlocal calls
            result = work(*arguments)
            calls += 1
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
