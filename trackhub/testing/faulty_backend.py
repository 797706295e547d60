# SPDX-License-Identifier: Apache-2.0
"""A backend around the one under test, which notes every call of the lane and injects the faults of a check.

A `ReceiverRig` puts one around its backend. The lane calls the proxy as it would call the backend.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from trackhub.errors import PermanentError, TransientError
from trackhub.spi import (
    Backend,
    BackendContext,
    BackendRun,
    Confirmation,
    ConfirmedBy,
    Entry,
    Rejection,
    Results,
    RunInfo,
    RunStatus,
    WriteReport,
)
from trackhub.testing.sample_calls_and_requests import FuturePayload

__all__ = ["FaultyBackend", "KillPoint"]


class KillPoint(msgspec.Struct, frozen=True):
    """When this process kills itself by SIGKILL.

    Attributes:
        when: ``written``: as soon as ``write`` has returned for the position. ``confirmed``: as soon as the backend has
            confirmed it, by returning from ``flush`` or ``write``, whichever it declares.
        position: of the entry.
        note: the file that gets the number of confirmed entries before the end.
    """

    when: Literal["written", "confirmed"]
    position: int
    note: str


class FaultyBackend:
    """The faults that one receiver's backend meets, and what the lane asked it to do.

    The lane's thread uses it. Read the attributes when the receiver has finished.

    Attributes:
        runs: what ``open_run`` returned.
        batches: the sizes of the batches that ``write`` was called with.
        probes: for each test of the store, two bools: the write directly before it succeeded; the test succeeded.
        attempts: the number of calls of ``write``.
        failures: what the backend raised, apart from what was injected.
        broken_rules: the rules that the backend broke, in words. Any of them makes every check fail.
    """

    def __init__(
        self,
        *,
        before: Iterable[Exception] = (),
        after: Iterable[Exception] = (),
        poison: Iterable[int] = (),
        rejected: Iterable[int] = (),
        future: Iterable[int] = (),
        late: Iterable[int] = (),
        probing: bool = False,
        max_batch: int | None = None,
        kill: KillPoint | None = None,
    ) -> None:
        """Prepare the faults.

        Args:
            before: exceptions to raise, one a call, in place of ``write``.
            after: exceptions to raise, one a call, once ``write`` has returned.
            poison: positions that no batch may contain: ``write`` raises PermanentError.
            rejected: positions that ``write`` reports as rejected.
            future: positions whose payload is replaced by one of a kind that the backend does not know.
            late: positions that are written after the rest of their batch.
            probing: call ``probe`` after each ``write``.
            max_batch: most entries in one ``write``, if less than the backend takes.
            kill: when this process kills itself.
        """
        self.runs: list[BackendRun] = []
        self.batches: list[int] = []
        self.probes: list[tuple[bool, bool]] = []
        self.attempts = 0
        self.failures: list[Exception] = []
        self.broken_rules: list[str] = []
        self._before = list(before)
        self._after = list(after)
        self._poison = frozenset(poison)
        self._rejected = frozenset(rejected)
        self._future = frozenset(future)
        self._late = frozenset(late)
        self._probing = probing
        self._max_batch = max_batch
        self._kill = kill

    def around(self, cls: type[Backend[Any]]) -> type[Backend[Any]]:
        """Return a backend class that does what ``cls`` does, through this proxy."""
        return _proxy_class(cls, self)

    def lowered(self, max_batch: int) -> int:
        """Return the largest batch that may be written, for a backend that takes this many."""
        return max_batch if self._max_batch is None else min(max_batch, self._max_batch)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what a call of the backend raises, and let it pass on.

        A method that is not implemented is a broken rule, and its error ends here. The lane would call the method again
        and again, and every check would take until its deadline.
        """
        try:
            yield
        except NotImplementedError as error:
            self._note_broken_rule(str(error) or repr(error))
        except Exception as error:
            self.failures.append(error)
            raise

    def write(self, run: BackendRun, batch: Sequence[Entry], *, confirms: bool) -> WriteReport | None:
        """Write through the faults.

        Args:
            run: the backend's run.
            batch: the entries.
            confirms: whether returning from ``write`` confirms them.

        Raises:
            BackendError: a fault that the check has set.
        """
        self.attempts += 1
        if self._before:
            raise self._before.pop(0)
        if self._poison.intersection(entry.position for entry in batch):
            raise PermanentError("this batch holds an entry that can never be stored")
        taken = [self._with_future(entry) for entry in batch if entry.position not in self._rejected]
        parts = [taken]
        if self._late.intersection(entry.position for entry in taken):
            parts = [[e for e in taken if e.position not in self._late], [e for e in taken if e.position in self._late]]
        report = None
        for part in filter(None, parts):
            with self.noting(), self._probing_after(run, part[0]):
                report = run.write(part)
        self.batches.append(len(batch))
        if self._after:
            raise self._after.pop(0)
        self.reached("written", batch[-1].position)
        if confirms:
            self.reached("confirmed", batch[-1].position)
        mine = tuple(Rejection(entry.position, "reported") for entry in batch if entry.position in self._rejected)
        return WriteReport((*(report.rejected if report else ()), *mine)) if mine else report

    @contextmanager
    def _probing_after(self, run: BackendRun, entry: Entry) -> Iterator[None]:
        """Note whether a call succeeds, and whether the test of the store succeeds afterwards."""
        is_stored = False
        try:
            yield
            is_stored = True
        finally:
            if self._probing:
                self.probes.append((is_stored, self.probe(run, entry)))

    def probe(self, run: BackendRun, entry: Entry) -> bool:
        """Return whether the backend's own test of its store succeeds. Any unexpected exception is a broken rule."""
        try:
            run.probe(entry)
        except TransientError:
            return False
        except Exception as error:  # noqa: BLE001  # it may raise anything
            self._note_broken_rule(f"probe() raised {error!r}; expected TransientError, or nothing if all is well")
            return False
        return True

    def _with_future(self, entry: Entry) -> Entry:
        if entry.position not in self._future:
            return entry
        payload: Any = FuturePayload("loss", "of a newer trackhub")
        return msgspec.structs.replace(entry, payload=payload)

    def flush(self, run: BackendRun) -> Confirmation:
        """Flush the backend's run.

        An answer of a wrong type is a broken rule, and here counts as a confirmation by the store.
        """
        answer: object = Confirmation.STORE
        with self.noting():
            answer = run.flush()
        if isinstance(answer, Confirmation):
            return answer
        self._note_broken_rule(
            f"flush() returned {answer!r}; expected Confirmation.STORE if the store has the records, or "
            "Confirmation.CLIENT if only the SDK says so"
        )
        return Confirmation.STORE

    def _note_broken_rule(self, rule: str) -> None:
        if rule not in self.broken_rules:
            self.broken_rules.append(rule)

    def reached(self, when: str, position: int) -> None:
        """Kill this process if its kill point is reached.

        Args:
            when: what happened to the entries, as in `KillPoint`.
            position: of the last one of them.
        """
        if self._kill is None or self._kill.when != when or position < self._kill.position:
            return
        with open(self._kill.note, "w", encoding="utf-8") as note:
            note.write(str(position + 1))
        os.kill(os.getpid(), signal.SIGKILL)


def _proxy_class(cls: type[Backend[Any]], proxy: FaultyBackend) -> type[Backend[Any]]:
    class Proxy(Backend[Any]):
        spi = cls.spi
        Options = cls.Options
        contract = cls.contract
        capabilities = cls.capabilities

        def __init__(self, options: msgspec.Struct, context: BackendContext) -> None:
            super().__init__(options, context)
            self._inner = cls(options, context)
            self._take_capabilities()

        def _take_capabilities(self) -> None:
            can = self._inner.capabilities
            self.capabilities = msgspec.structs.replace(can, max_batch=proxy.lowered(can.max_batch))

        def preflight(self) -> None:
            try:
                self._inner.preflight()
            finally:
                self._take_capabilities()  # preflight may replace them

        def open_run(self, info: RunInfo) -> BackendRun:
            try:
                run = self._inner.open_run(info)
            except Exception as error:
                proxy.failures.append(error)
                raise
            proxy.runs.append(run)
            return _ProxyRun(run, proxy, write_confirms=self.capabilities.confirmed_by is ConfirmedBy.WRITE)

        def results(self, info: RunInfo) -> Results | None:
            return self._inner.results(info)

        def close(self) -> None:
            self._inner.close()

    return Proxy


class _ProxyRun(BackendRun):
    def __init__(self, inner: BackendRun, proxy: FaultyBackend, *, write_confirms: bool) -> None:
        self._inner = inner
        self._proxy = proxy
        self._write_confirms = write_confirms
        self._last_position = -1

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        report = self._proxy.write(self._inner, batch, confirms=self._write_confirms)
        self._last_position = batch[-1].position
        return report

    def flush(self) -> Confirmation:
        confirmation = self._proxy.flush(self._inner)
        self._proxy.reached("confirmed", self._last_position)
        return confirmation

    def left_out(self) -> Sequence[Entry]:
        return self._inner.left_out()

    def probe(self, entry: Entry) -> None:
        self._inner.probe(entry)

    def finish(self, status: RunStatus) -> None:
        self._inner.finish(status)

    def next_position(self) -> int:
        return self._inner.next_position()
