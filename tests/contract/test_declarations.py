# SPDX-License-Identifier: Apache-2.0
"""Backends that are right under other declarations than the file backend's: each branch of the kit passes on one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from tests.contract.mutants.base import CAN, Bad, Tampered
from trackhub.builtin.jsonl import JsonlBackend, JsonlOptions
from trackhub.spi import (
    Backend,
    BackendContext,
    BackendRun,
    Capabilities,
    Confirmation,
    ConfirmedBy,
    Entry,
    Kind,
    Metrics,
    PermanentError,
    Redelivery,
    Results,
    RunInfo,
    RunStatus,
    WriteReport,
)
from trackhub.testing.checks.fixtures import QUICK_ENV
from trackhub.testing.contracts.jsonl import JsonlContract


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUICK_ENV, "1")


class _Appending(Tampered):
    """Stores whatever comes, as often as it comes."""

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        self.inner._next = 0
        return super().write(batch)


class AtLeastOnce(Bad):
    capabilities = msgspec.structs.replace(CAN, redelivery=Redelivery.AT_LEAST_ONCE)
    run = _Appending


class TestAtLeastOnce(JsonlContract):
    backend = AtLeastOnce


class AnyOrder(Bad):
    capabilities = msgspec.structs.replace(CAN, redelivery=Redelivery.AT_LEAST_ONCE, any_order=True)
    run = _Appending


class TestAnyOrder(JsonlContract):
    backend = AnyOrder


class Rebuild(Bad):
    capabilities = msgspec.structs.replace(CAN, redelivery=Redelivery.REBUILD)

    def open_run(self, info: RunInfo) -> Any:
        if info.resume_from == 0:
            self._file(info).unlink(missing_ok=True)
        return super().open_run(info)


class TestRebuild(JsonlContract):
    backend = Rebuild


class _Buffering(Tampered):
    """Stores nothing before it is asked to."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kept: list[Entry] = []

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        last = self._kept[-1].position if self._kept else -1
        new = [entry for entry in batch if entry.position > last]
        for entry in new:
            # What can never be stored has to be found while its record can be named.
            self.inner._line(entry)
        self._kept += new
        return None

    def flush(self) -> Confirmation:
        if self._kept:
            self.inner.write(self._kept)
        self._kept = []
        return Confirmation.STORE

    def finish(self, status: RunStatus) -> None:
        self.flush()
        super().finish(status)


class Buffering(Bad):
    run = _Buffering
    capabilities = msgspec.structs.replace(Bad.capabilities, confirmed_by=ConfirmedBy.FLUSH)


class TestBuffering(JsonlContract):
    backend = Buffering


class _Delegating(BackendRun):
    """Hands every call on to another run, as a wrapper does that counts or traces calls."""

    def __init__(self, inner: BackendRun) -> None:
        self._inner = inner

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        return self._inner.write(batch)

    def flush(self) -> Confirmation:
        return self._inner.flush()

    def finish(self, status: RunStatus) -> None:
        self._inner.finish(status)

    def probe(self, entry: Entry) -> None:
        self._inner.probe(entry)

    def next_position(self) -> int:
        return self._inner.next_position()


class Delegating(Backend[JsonlOptions]):
    """Hands every call on to another backend."""

    spi = 1
    contract = 1
    wrapped: type[JsonlBackend] = JsonlBackend
    capabilities = wrapped.capabilities

    def __init__(self, options: JsonlOptions, context: BackendContext) -> None:
        super().__init__(options, context)
        self._inner = self.wrapped(options, context)

    def preflight(self) -> None:
        self._inner.preflight()

    def open_run(self, info: RunInfo) -> BackendRun:
        return _Delegating(self._inner.open_run(info))

    def results(self, info: RunInfo) -> Results | None:
        return self._inner.results(info)

    def close(self) -> None:
        self._inner.close()


class TestDelegating(JsonlContract):
    """A wrapper overrides ``flush`` although ``write`` confirms: only the declaration tells what confirms."""

    backend = Delegating  # type: ignore[assignment]  # its class is not jsonl's


class DelegatingToBuffering(Delegating):
    wrapped = Buffering
    capabilities = Buffering.capabilities


class TestDelegatingToBuffering(JsonlContract):
    backend = DelegatingToBuffering  # type: ignore[assignment]


class _Weak(Tampered):
    """Has nothing but metrics: finite ones, in rising steps, under plain keys."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._highest: dict[str, int] = {}
        self._last = -1

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        for entry in batch:
            if entry.position <= self._last:
                continue  # it comes again, after an error
            if not isinstance(entry.payload, Metrics) or entry.step is None:
                raise PermanentError(f"cannot hold {entry}")
            for key, value in entry.payload.values.items():
                if not re.fullmatch("[A-Za-z0-9_]{1,250}", key) or not math.isfinite(value):
                    raise ValueError(f"cannot hold {key}")
                if entry.step < self._highest.get(key, 0):
                    raise ValueError("cannot go back")
                self._highest[key] = entry.step
            self._last = entry.position
        self.inner._next = 0
        return super().write(batch)

    def flush(self) -> Confirmation:
        return Confirmation.CLIENT


class Weak(Bad):
    capabilities = Capabilities(kinds=frozenset({Kind.METRICS}))
    run = _Weak


class TestWeak(JsonlContract):
    """Claims nothing, and has nothing."""

    backend = Weak
