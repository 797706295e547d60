# SPDX-License-Identifier: Apache-2.0
"""A receiver under test: trackhub's own receiver, journal and lane, with the backend of a contract class behind them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trackhub import registry
from trackhub.delivery.blobs import BlobStore
from trackhub.delivery.journal.counts import read_journal_report
from trackhub.delivery.journal.store import JOURNAL_NAME
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport, RunReport
from trackhub.delivery.wire import Accepted, Final, Request, SiteCounts, decode_reply, encode
from trackhub.limits import Limits
from trackhub.run import RunInfo, RunStatus, Side
from trackhub.spi import Backend, BackendContext, Capabilities, JobInfo
from trackhub.testing.author import ContractHooks, StoreContext
from trackhub.testing.fault_proxy import KillPoint, Watch, watched
from trackhub.testing.log_calls import BASE_TIME, Call, Stream
from trackhub.testing.readback import ReadBack

__all__ = ["Child", "KitReceiver", "KitRig", "read_child"]

_POLL_S = 0.01
_CHILD_S = 120.0


class Child(msgspec.Struct, frozen=True):
    """What the process of ``python -m trackhub.testing.killed_receiver`` is to do: deliver what a journal holds.

    Attributes:
        module, qualname: where the backend's class is.
        source: the file of a module that cannot be imported by its name.
        path: ``sys.path``.
        name, options, folder, workdir, job, side: of the receiver.
        kill: when to die; None to die when all is delivered, and the journal knows it.
        max_batch: most entries in one ``write``.
    """

    module: str
    qualname: str
    source: str
    path: list[str]
    name: str
    options: dict[str, Any]
    folder: str
    workdir: str
    job: str
    side: Side
    kill: KillPoint | None
    max_batch: int


class KitReceiver(Receiver):
    """A receiver whose one backend is a given class, installed or not."""

    def __init__(self, cls: type[Backend[Any]], folder: Path, workdir: Path, **rest: Any) -> None:
        super().__init__(workdir, state_dir=folder, **rest)
        self._cls = cls
        self.backend: Backend[Any] | None = None

    def _load(self, name: str, options: Mapping[str, Any]) -> Backend[Any]:
        context = BackendContext(self._run_dir / name, self.job, self._side)
        context.workdir.mkdir(parents=True, exist_ok=True)
        self.backend = self._cls(registry.build_options(name, self._cls, options), context)
        return self.backend


class KitRig:
    """One receiver. Logging goes straight to the receiver, as if a site's sender had sent it.

    Attributes:
        root: the job's run folder.
        job, side: of all its runs.
        watch: what the backend was asked to do, and what faults it meets.
        logged: site to what it logged, in order: name of the stream, and the call with its time filled in.
        report: the delivery report, once finished.
    """

    def __init__(
        self,
        hooks: ContractHooks,
        root: Path,
        options: Mapping[str, Any],
        *,
        job: str,
        side: Side = Side.SERVER,
        watch: Watch | None = None,
        deliver: bool = True,
    ) -> None:
        self.root = root
        self.job = job
        self.side = side
        self.watch = watch or Watch()
        self.logged: dict[str, list[tuple[str, Call]]] = {}
        self.report: DeliveryReport | None = None
        self._streams: dict[tuple[str, str], Stream] = {}
        self._threads: list[threading.Thread] = []
        self._started = False
        self._hooks = hooks
        self._options = {**options, **hooks.extra_options}
        self._folder = root / "trackhub"
        self.context = StoreContext(root / hooks.name, JobInfo(job), side, options=self._options)
        self._receiver = KitReceiver(
            watched(hooks.backend, self.watch),
            self._folder,
            root,
            job=JobInfo(job),
            side=side,
            backends={hooks.name: self._options} if deliver else {},
            limits=Limits(flush_s=0.05, preflight_s=hooks.deadline_s),
        )

    def start(self) -> KitRig:
        """Start the receiver. Raises ConfigError if the backend says that it cannot be used as configured."""
        self.context.workdir.mkdir(parents=True, exist_ok=True)
        self._hooks.prepare(self.context)
        before = set(threading.enumerate())
        self._receiver.start()
        self._started = True
        name = f"trackhub-lane-{self._hooks.name}"
        self._threads = [thread for thread in threading.enumerate() if thread.name == name and thread not in before]
        return self

    @property
    def can(self) -> Capabilities:
        """The backend's capabilities, as the lane acts on them."""
        assert self._receiver.backend is not None
        return self._receiver.backend.capabilities

    def again(self, *, watch: Watch | None = None) -> KitRig:
        """Return another receiver on the same journal and store, as after a restart or for a replay; not started."""
        rig = KitRig(self._hooks, self.root, self._options, job=self.job, side=self.side, watch=watch)
        rig.logged = self.logged
        rig._streams = self._streams
        return rig

    def log(self, site: str, calls: Sequence[Call], *, stream: str = "main") -> list[Call]:
        """Let a site log these calls; return them with their times. They are in the journal when this returns.

        Args:
            site: who logs.
            calls: what it logs, in one batch.
            stream: the name of the writing process.
        """
        source = self._streams.setdefault((site, stream), Stream(f"{self.job}/{site}/{stream}"))
        timed, chunks, batch = source.append(calls)
        self.logged.setdefault(site, []).extend((stream, call) for call in timed)
        requests: list[Request] = [*chunks, batch]
        for request in requests:
            self._send(site, request)
        return timed

    def request(self, site: str, request: bytes) -> bytes:
        """Hand over one request of a site; what a sender's channel does."""
        return self._receiver.handle(site, request)

    def _send(self, site: str, request: Request) -> None:
        reply = decode_reply(self._receiver.handle(site, encode(request)))
        if not isinstance(reply, Accepted):
            message = f"the receiver did not accept a request of the contract kit: {reply}"
            raise AssertionError(message)  # noqa: TRY004 - it is no argument that has a wrong type

    def settle(self, site: str, *, timeout_s: float | None = None) -> RunReport:
        """Wait until the backend has confirmed or rejected all that this site logged, and return the counts."""
        run = self.wait_for(site, lambda run: run.pending == 0, timeout_s)
        if run.pending:
            raise AssertionError(f"{run.pending} records are still pending: {run.last_error or 'no error was raised'}")
        return run

    def wait_for(self, site: str, condition: Any, timeout_s: float | None = None) -> RunReport:
        """Wait until the site's counts meet a condition, or the time is up; return them."""
        deadline = time.monotonic() + (self._hooks.deadline_s if timeout_s is None else timeout_s)
        pause = threading.Event()
        while True:
            report = read_journal_report(self._folder / JOURNAL_NAME)
            run = report.lanes.get(self._hooks.name, {}).get(site)
            run = run or RunReport(pending=report.sites[site].journaled)
            if condition(run) or time.monotonic() > deadline:
                return run
            pause.wait(_POLL_S)

    def finish(
        self,
        status: RunStatus = RunStatus.FINISHED,
        *,
        failed: Sequence[str] = (),
        deadline_s: float | None = None,
    ) -> DeliveryReport:
        """End the job: every site sends its final message, those in ``failed`` with an error. Check that the counts add up."""
        for site, calls in self.logged.items():
            self._send(site, Final(SiteCounts(logged=len(calls), acked=len(calls)), failed=site in failed))
        self.report = self._receiver.finish(
            status, deadline_s=self._hooks.deadline_s if deadline_s is None else deadline_s
        )
        assert self.report.balanced, f"the counts do not add up: {self.report}"
        return self.report

    def run(self, site: str) -> RunReport:
        """Return what the report says of this site."""
        assert self.report is not None
        return self.report.lanes[self._hooks.name][site]

    def info(self, site: str) -> RunInfo:
        """Return what identifies a site's run."""
        created = next((call.time for _, call in self.logged.get(site, ()) if call.time is not None), BASE_TIME)
        return RunInfo(JobInfo(self.job), site, self.side, created, 0, BlobStore(self._folder / "blobs").folder(site))

    def read(self, site: str) -> ReadBack:
        """Return what the store holds of this site's run, by the author's own door.

        Raises:
            AssertionError: the run is not there, or cannot be read.
        """
        try:
            return self._hooks.read_back(self.info(site), self.context)
        except Exception as error:
            raise AssertionError(
                f"read_back finds no run of job {self.job!r}, site {site!r} that it can read: "
                f"{type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """End a receiver that a failed test has left running."""
        if self.report is None and self._started:
            self.report = self._receiver.finish(RunStatus.ABORTED, deadline_s=0.0)

    def is_hung(self) -> bool:
        """Return whether the backend has not returned from a call; waits for it a little."""
        for thread in self._threads:
            thread.join(self._hooks.patience_s)
        return any(thread.is_alive() for thread in self._threads)

    def run_child(self, kill: KillPoint | None, *, max_batch: int) -> int:
        """Deliver what this finished receiver's journal holds from a process that is killed on the way.

        Returns:
            How many entries were confirmed when it died.
        """
        cls = self._hooks.backend
        module = sys.modules[cls.__module__]
        child = Child(
            module=cls.__module__,
            qualname=cls.__qualname__,
            source=getattr(module, "__file__", None) or "",
            path=[os.path.abspath(part) for part in sys.path],
            name=self._hooks.name,
            options=dict(self._options),
            folder=str(self._folder),
            workdir=str(self.root),
            job=self.job,
            side=self.side,
            kill=kill,
            max_batch=max_batch,
        )
        with tempfile.TemporaryDirectory() as folder:
            plan = Path(folder, "child.json")
            plan.write_bytes(msgspec.json.encode(child))
            done = subprocess.run(
                [sys.executable, "-m", "trackhub.testing.killed_receiver", str(plan)],
                capture_output=True,
                text=True,
                timeout=_CHILD_S,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(child.path)},
                check=False,
            )
        if done.returncode != -9:
            raise AssertionError(
                f"a process that should have been killed while it delivered ended by itself with status "
                f"{done.returncode}. It wrote:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        return int(Path(kill.note).read_text(encoding="utf-8")) if kill else -1


def read_child(path: Path) -> Child:
    """Return the plan in a file."""
    return msgspec.json.decode(path.read_bytes(), type=Child)
