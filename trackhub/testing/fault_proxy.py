# SPDX-License-Identifier: Apache-2.0
"""Stands between the lane and the backend under test: sees every call, and injects the faults that a test asks for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from trackhub.errors import PermanentError
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

__all__ = ["KillPoint", "Watch", "watched"]


class KillPoint(msgspec.Struct, frozen=True):
    """When this process kills itself by SIGKILL.

    Attributes:
        when: ``written``: as soon as ``write`` has returned for the position; ``confirmed``: as soon as the backend
            has confirmed it, by returning from ``flush``, or from ``write`` if it has no ``flush``.
        position: of the entry.
        note: file that gets the number of confirmed entries before the end.
    """

    when: str
    position: int
    note: str


class Watch:
    """What one receiver's backend was asked to do, and the faults that it shall meet.

    Attributes:
        runs: what ``open_run`` returned.
        entries: run id to the positions of the entries that ``write`` took, in order, repeated ones included.
        batches: sizes of the batches that ``write`` was called with.
        attempts: number of calls of ``write``.
        failures: what the backend raised, apart from what was injected.
        before: exceptions to raise, one a call, instead of writing.
        after: exceptions to raise, one a call, once the batch was written.
        poison: positions that no batch may contain: ``write`` raises PermanentError.
        report: positions that ``write`` reports as rejected.
        max_batch: most entries in one ``write``, if less than the backend takes.
    """

    def __init__(
        self,
        *,
        before: Iterable[Exception] = (),
        after: Iterable[Exception] = (),
        poison: Iterable[int] = (),
        report: Iterable[int] = (),
        max_batch: int | None = None,
        kill: KillPoint | None = None,
    ) -> None:
        self.runs: list[BackendRun] = []
        self.entries: dict[str, list[int]] = {}
        self.batches: list[int] = []
        self.attempts = 0
        self.failures: list[Exception] = []
        self.before = list(before)
        self.after = list(after)
        self.poison = frozenset(poison)
        self.report = frozenset(report)
        self.max_batch = max_batch
        self.kill = kill

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what a call of the backend raises."""
        try:
            yield
        except Exception as error:
            self.failures.append(error)
            raise

    def reached(self, when: str, position: int) -> None:
        """Note that the entries up to this position are written or confirmed, and end this process if it is time."""
        if self.kill is None or self.kill.when != when or position < self.kill.position:
            return
        with open(self.kill.note, "w", encoding="utf-8") as note:
            note.write(str(position + 1))
        os.kill(os.getpid(), signal.SIGKILL)


def watched(cls: type[Backend[Any]], watch: Watch) -> type[Backend[Any]]:
    """Return a backend class that does what ``cls`` does, under this watch."""

    class Watched(Backend[Any]):
        spi = cls.spi
        Options = cls.Options
        contract = cls.contract
        capabilities = cls.capabilities

        def __init__(self, options: msgspec.Struct, context: BackendContext) -> None:
            super().__init__(options, context)
            self._inner = cls(options, context)
            self._adopt()

        def _adopt(self) -> None:
            can = self._inner.capabilities
            most = can.max_batch if watch.max_batch is None else min(can.max_batch, watch.max_batch)
            self.capabilities = msgspec.structs.replace(can, max_batch=most)

        def preflight(self) -> None:
            try:
                self._inner.preflight()
            finally:
                self._adopt()

        def open_run(self, info: RunInfo) -> BackendRun:
            with watch.noting():
                run = self._inner.open_run(info)
            watch.runs.append(run)
            buffers = self.capabilities.confirmed_by is ConfirmedBy.FLUSH
            return (_BufferingRun if buffers else _Run)(run, info.run_id, watch)

        def results(self, info: RunInfo) -> Results | None:
            return self._inner.results(info)

        def close(self) -> None:
            self._inner.close()

    return Watched


class _Run(BackendRun):
    """A run whose ``write`` confirms."""

    confirms_by_write = True

    def __init__(self, inner: BackendRun, run_id: str, watch: Watch) -> None:
        self.inner = inner
        self._watch = watch
        self._entries = watch.entries.setdefault(run_id, [])
        self._last = -1

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        watch = self._watch
        watch.attempts += 1
        if watch.before:
            raise watch.before.pop(0)
        if watch.poison.intersection(entry.position for entry in batch):
            raise PermanentError("this batch holds an entry that can never be stored")
        taken = [entry for entry in batch if entry.position not in watch.report]
        with watch.noting():
            report = self.inner.write(taken) if taken else None
        watch.batches.append(len(batch))
        self._entries += [entry.position for entry in taken]
        self._last = batch[-1].position
        if watch.after:
            raise watch.after.pop(0)
        watch.reached("written", self._last)
        if self.confirms_by_write:
            watch.reached("confirmed", self._last)
        mine = tuple(Rejection(entry.position, "reported") for entry in batch if entry.position in watch.report)
        return WriteReport((*(report.rejected if report else ()), *mine)) if mine else report

    def finish(self, status: RunStatus) -> None:
        self.inner.finish(status)

    def next_position(self) -> int:
        return self.inner.next_position()


class _BufferingRun(_Run):
    """A run whose ``flush`` confirms."""

    confirms_by_write = False

    def flush(self) -> Confirmation:
        with self._watch.noting():
            confirmation = self.inner.flush()
        self._watch.reached("confirmed", self._last)
        return confirmation
