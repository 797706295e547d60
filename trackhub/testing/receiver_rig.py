# SPDX-License-Identifier: Apache-2.0
"""A receiver under test: trackhub's own receiver, journal and lane, with the backend of a contract class behind them.

Checks get a `ReceiverRig` from their `Kit`, let sites log, finish it, and read the store back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trackhub import registry
from trackhub.delivery.blob_store import BlobStore
from trackhub.delivery.journal.journal import JOURNAL_NAME
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport, RunReport
from trackhub.delivery.wire import Accepted, Final, Request, SiteCounts, decode_reply, encode
from trackhub.job_and_run_info import FEDERATION, JobInfo, RunInfo, RunKey, RunStatus, Side
from trackhub.limits import Limits
from trackhub.spi import Backend, BackendContext, Capabilities
from trackhub.testing.contract_hooks import ContractHooks, StoreContext
from trackhub.testing.faulty_backend import FaultyBackend
from trackhub.testing.readback import ReadBack
from trackhub.testing.sample_calls_and_requests import BASE_TIME, Call, Stream

__all__ = ["ReceiverOfClass", "ReceiverRig"]

_POLL_S = 0.01


class ReceiverOfClass(Receiver):
    """A receiver with one backend, which is given as a class and need not be installed.

    Attributes:
        backend: the backend's object, once the receiver is started.
    """

    def __init__(self, cls: type[Backend[Any]], run_dir: Path, **rest: Any) -> None:
        """Prepare a receiver.

        Args:
            cls: the backend's class.
            run_dir: the job's run folder.
            rest: the other arguments of `Receiver`.
        """
        super().__init__(run_dir, **rest)
        self._cls = cls
        self.backend: Backend[Any] | None = None

    def _set_up_backends(self) -> dict[str, Backend[Any]]:
        found: dict[str, Backend[Any]] = {}
        for name, options in self._backends.items():  # at most one
            context = BackendContext(self._run_dir / name, self.job, self._side)
            context.workdir.mkdir(parents=True, exist_ok=True)
            found[name] = self.backend = self._cls(registry.build_options(name, self._cls, options), context)
        return found


class ReceiverRig:
    """One receiver. Calls go straight to it, as if a site's sender had sent them.

    Attributes:
        hooks: the contract class.
        root: the job's run folder.
        folder: the receiver's own folder in it.
        context: where the backend works, and with which options.
        proxy: the faults that the backend meets, and what it was asked to do.
        logged: site -> its calls, in order. Each entry has the stream's name, and the call with its time filled in.
        report: the delivery report, once finished.
    """

    def __init__(
        self,
        hooks: ContractHooks,
        root: Path,
        options: Mapping[str, Any],
        *,
        job: JobInfo,
        side: Side = Side.SERVER,
        proxy: FaultyBackend | None = None,
        deliver: bool = True,
    ) -> None:
        """Prepare a receiver; ``start`` starts it.

        Args:
            hooks: the contract class.
            root: the job's run folder, which exists.
            options: the backend's options.
            job: the job of all its runs.
            side: where it is.
            proxy: the faults that the backend meets; none by default.
            deliver: False for a receiver that only fills its journal.
        """
        self.hooks = hooks
        self.root = root
        self.folder = root / "trackhub"
        self.proxy = proxy or FaultyBackend()
        self.logged: dict[str, list[tuple[str, Call]]] = {}
        self.report: DeliveryReport | None = None
        self.context = StoreContext(root / hooks.name, job, side, options={**options, **hooks.extra_options})
        self._streams: dict[tuple[str, str], Stream] = {}
        self._threads: list[threading.Thread] = []
        self._started = False
        self._receiver = ReceiverOfClass(
            self.proxy.around(hooks.backend),
            root,
            state_dir=self.folder,
            job=job,
            side=side,
            backends={hooks.name: self.context.options} if deliver else {},
            limits=Limits(flush_s=0.05, preflight_s=hooks.deadline_s),
        )

    def start(self) -> ReceiverRig:
        """Start the receiver.

        Raises:
            ConfigError: the backend says that it cannot be used as configured.
        """
        self.context.workdir.mkdir(parents=True, exist_ok=True)
        self.hooks.prepare(self.context)
        before = set(threading.enumerate())
        self._receiver.start()
        self._started = True
        name = f"trackhub-lane-{self.hooks.name}"
        self._threads = [thread for thread in threading.enumerate() if thread.name == name and thread not in before]
        return self

    @property
    def job(self) -> JobInfo:
        """The job of all its runs."""
        return self.context.job

    @property
    def can(self) -> Capabilities:
        """The backend's capabilities, as the lane acts on them."""
        assert self._receiver.backend is not None
        return self._receiver.backend.capabilities

    def again(self) -> ReceiverRig:
        """Return another receiver on the same journal and store, as after a restart. It is not started."""
        context = self.context
        rig = ReceiverRig(self.hooks, self.root, context.options, job=context.job, side=context.side)
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
        source = self._streams.setdefault((site, stream), Stream(f"{self.job.id}/{self.context.side}/{site}/{stream}"))
        timed, chunks, batch = source.append(calls)
        self.logged.setdefault(site, []).extend((stream, call) for call in timed)
        requests: list[Request] = [*chunks, batch]
        for request in requests:
            self._send(site, request)
        return timed

    def request(self, site: str, request: bytes) -> bytes:
        """Answer one request of a site, for the channel of a sender."""
        return self._receiver.handle(site, request)

    def _send(self, site: str, request: Request) -> None:
        if site == FEDERATION:  # the receiver refuses requests for this run, which it writes itself
            reply = self._receiver._answer(site, encode(request))
        else:
            reply = decode_reply(self._receiver.handle(site, encode(request)))
        if not isinstance(reply, Accepted):
            message = f"the receiver did not accept a request of the contract kit: {reply}"
            raise AssertionError(message)  # noqa: TRY004 - the reply is wrong, not an argument's type

    def settle(self, site: str) -> RunReport:
        """Wait until the backend has confirmed or rejected all that this site logged, and return the counts.

        Raises:
            AssertionError: it did not within the contract class's ``deadline_s``, or the backend broke a rule.
        """
        run = self.wait_for(site, lambda run: run.pending == 0)
        self._check_rules()
        assert not run.pending, f"{run.pending} records are still pending: {run.last_error or 'no error was raised'}"
        return run

    def wait_for(self, site: str, condition: Callable[[RunReport], bool], timeout_s: float | None = None) -> RunReport:
        """Wait until a site's counts meet a condition, or the time is up; return them.

        Args:
            site: whose run.
            condition: returns True when there is nothing more to wait for.
            timeout_s: the longest wait, in seconds; by default the contract class's ``deadline_s``.
        """
        deadline = time.monotonic() + (self.hooks.deadline_s if timeout_s is None else timeout_s)
        pause = threading.Event()
        while True:
            report = read_journal_report(self.folder / JOURNAL_NAME)
            run = report.lanes.get(self.hooks.name, {}).get(site)
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
        """End the job: every site sends its final message, and the receiver finishes.

        Args:
            status: how the job ended.
            failed: the sites whose training failed.
            deadline_s: the longest time, in seconds; by default the contract class's ``deadline_s``.

        Raises:
            AssertionError: the counts of the report do not add up, or the backend broke a rule.
        """
        for site, calls in self.logged.items():
            self._send(site, Final(SiteCounts(logged=len(calls), acked=len(calls)), failed=site in failed))
        self.report = self._receiver.finish(
            status, deadline_s=self.hooks.deadline_s if deadline_s is None else deadline_s
        )
        self._check_rules()
        assert self.report.balanced, f"the counts of the delivery report do not add up: {self.report}"
        return self.report

    def _check_rules(self) -> None:
        assert not self.proxy.broken_rules, "\n".join(self.proxy.broken_rules)

    def run(self, site: str) -> RunReport:
        """Return what the delivery report says of this site's run."""
        assert self.report is not None
        return self.report.lanes[self.hooks.name][site]

    def info(self, site: str) -> RunInfo:
        """Return what identifies a site's run."""
        job, side = self.context.job, self.context.side
        created = next((call.time for _, call in self.logged.get(site, ()) if call.time is not None), BASE_TIME)
        parent = None if site == FEDERATION else RunKey(job.id, FEDERATION)
        return RunInfo(job, site, side, created, 0, BlobStore(self.folder / "blobs").folder(site), parent)

    def read(self, site: str) -> ReadBack:
        """Return what the store holds of this site's run, as the contract class reads it.

        Raises:
            AssertionError: the run is not there, or cannot be read.
        """
        try:
            return self.hooks.read_back(self.info(site), self.context)
        except Exception as error:
            raise AssertionError(
                f"read_back cannot read the run of job {self.job.unique_name!r}, site {site!r}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def close(self) -> None:
        """End a receiver that a failed check has left running."""
        if self.report is None and self._started:
            self.report = self._receiver.finish(RunStatus.ABORTED, deadline_s=0.0)

    def is_hung(self) -> bool:
        """Return whether the backend has not returned from a call. Waits up to ``patience_s`` for it."""
        for thread in self._threads:
            thread.join(self.hooks.patience_s)
        return any(thread.is_alive() for thread in self._threads)
