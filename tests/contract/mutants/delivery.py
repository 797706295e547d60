# SPDX-License-Identifier: Apache-2.0
"""Backends that are wrong when something is killed, fails, or ends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, get_args

import msgspec

from tests.contract.mutants.base import (
    ANYTHING,
    CAN,
    HANGS,
    NEIGHBOURS,
    Bad,
    Tampered,
    caught_by,
    payloads,
)
from trackhub.builtin.jsonl import JsonlBackend, JsonlRun
from trackhub.spi import (
    Entry,
    Kind,
    Payload,
    PermanentError,
    Redelivery,
    RunInfo,
    RunStatus,
    TransientError,
    WriteReport,
)


class _Buffered(Tampered):
    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        super().__init__(inner, backend, info)
        self._kept: list[Entry] = []

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        self._kept += batch
        return None

    def finish(self, status: RunStatus) -> None:
        if self._kept:
            self.inner.write(self._kept)
        super().finish(status)


@caught_by(
    "test_confirmed_records_survive_sigkill",
    also=(
        "test_end_is_bounded_in_an_outage",
        *NEIGHBOURS,
        "test_redelivery_after_an_error_as_declared",
    ),
)
class ConfirmsBeforeItIsDurable(Bad):
    run = _Buffered


class _Repeating(Tampered):
    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        self.inner._next = 0
        return super().write(batch)

    def next_position(self) -> int:
        return 0


@caught_by(
    "test_redelivery_after_sigkill_as_declared[written]",
    "test_redelivery_after_sigkill_as_declared[confirmed]",
    "test_redelivery_after_an_error_as_declared",
    also=(
        "test_end_is_bounded_in_an_outage",
        "test_run_opened_again_is_the_same_run",
        "test_run_resumes_in_a_new_process",
    ),
)
class DoublesOnRedelivery(Bad):
    run = _Repeating


@caught_by("test_redelivery_after_an_error_as_declared")
class IsResumableButClaimsLess(Bad):
    capabilities = msgspec.structs.replace(CAN, redelivery=Redelivery.AT_LEAST_ONCE)


@caught_by("test_redelivery_after_an_error_as_declared", also=(r"test_redelivery_after_sigkill_as_declared\[.*",))
class ClaimsToBeIdempotent(Bad):
    capabilities = msgspec.structs.replace(CAN, redelivery=Redelivery.IDEMPOTENT)
    run = _Repeating


@caught_by(
    "test_redelivery_after_sigkill_as_declared[written]",
    also=(
        "test_end_is_bounded_in_an_outage",
        r"test_redelivery_after_sigkill_as_declared\[.*",
        "test_run_opened_again_is_the_same_run",
        "test_run_resumes_in_a_new_process",
    ),
)
class ResumesOneTooFar(Bad):
    class run(Tampered):
        def next_position(self) -> int:
            held = self.inner.next_position()
            return held + 1 if held else 0


@caught_by(
    "test_run_resumes_in_a_new_process",
    also=(
        "test_end_is_bounded_in_an_outage",
        *NEIGHBOURS,
        r"test_redelivery_after_sigkill_as_declared\[.*",
        "test_run_opened_again_is_the_same_run",
    ),
)
class KeepsTheEndOfAResumedRun(Bad):
    def open_run(self, info: RunInfo) -> Any:
        path = self._file(info)
        if path.exists():
            path.write_bytes(path.read_bytes().splitlines(keepends=True)[-1])
        return super().open_run(info)


@caught_by("test_any_order_as_declared", also=(r"test_redelivery_after_.*",))
class ClaimsAnyOrder(Bad):
    """The file backend skips an entry whose position is lower than that of the last one."""

    capabilities = msgspec.structs.replace(CAN, redelivery=Redelivery.IDEMPOTENT, any_order=True)


@caught_by("test_probe_as_declared")
class ProbesAnotherPlace(Bad):
    class run(Tampered):
        def probe(self, entry: Entry) -> None:
            """Say that all is well, as a server does whose disk is full."""


@caught_by("test_probe_as_declared")
class ProbesAndLeavesALine(Bad):
    class run(Tampered):
        def probe(self, entry: Entry) -> None:
            self.inner.write([msgspec.structs.replace(entry, position=self.inner.next_position())])


@caught_by("test_probe_as_declared")
class ClaimsAProbeThatItLacks(Bad):
    class run(Tampered):
        def probe(self, entry: Entry) -> None:
            raise NotImplementedError


@caught_by("test_files_beside_as_declared", also=ANYTHING)
class ClaimsThatTwoThreadsMayWrite(Bad):
    capabilities = msgspec.structs.replace(
        CAN, redelivery=Redelivery.AT_LEAST_ONCE, files_beside=frozenset({Kind.ARTIFACT})
    )

    class run(_Repeating):
        def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
            return [] if threading.current_thread().name.endswith("-files") else list(batch)


class _FailsFirst(Tampered):
    failed = False

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        if not self.failed:
            self.failed = True
            raise TransientError("it always does, the first time")
        return super().write(batch)


@caught_by(
    "test_transient_errors_lose_nothing",
    "test_unknown_errors_lose_nothing",
    also=(
        "test_probe_as_declared",
        "test_redelivery_after_an_error_as_declared",
        "test_records_of_a_newer_trackhub_are_rejected",
    ),
)
class FailsForNoReason(Bad):
    run = _FailsFirst


class _NoHoles(Tampered):
    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        first = self.inner.next_position()
        return [entry for number, entry in enumerate(batch, first) if entry.position == number]


@caught_by(
    "test_permanent_error_takes_only_its_records",
    "test_records_of_a_newer_trackhub_are_rejected",
    "test_reported_rejections_are_counted",
    also=NEIGHBOURS,
)
class ExpectsPositionsWithoutHoles(Bad):
    run = _NoHoles


class _Ignorant(Tampered):
    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        for entry in batch:
            if not isinstance(entry.payload, get_args(Payload)):
                raise TypeError(f"what is {entry.payload}?")
        return list(batch)


@caught_by("test_payloads_that_write_does_not_know_are_rejected")
class FailsOnUnknownPayloads(Bad):
    run = _Ignorant


@caught_by("test_payloads_that_write_does_not_know_are_rejected")
class PassesOverUnknownPayloads(Bad):
    run = payloads(lambda payload: payload if isinstance(payload, get_args(Payload)) else None)


class _First100(Tampered):
    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        return list(batch[:100])


@caught_by(
    "test_batches_are_as_large_as_declared",
    also=(
        "test_order_is_kept",
        "test_volume",
    ),
)
class TakesLessThanItDeclares(Bad):
    run = _First100


class _Swallowing(Tampered):
    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        try:
            return super().write(batch)
        except TransientError:
            return None


# The other check of an outage lets it pass: a run that was left open is opened by the replay, and then the store says
# itself what it lacks.
@caught_by("test_outage_loses_nothing", also=("test_probe_as_declared",))
class SwallowsErrors(Bad):
    run = _Swallowing


class _Impatient(Tampered):
    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        try:
            return super().write(batch)
        except TransientError as error:
            raise PermanentError(str(error)) from error


@caught_by("test_outage_loses_nothing", also=("test_end_is_bounded_in_an_outage", "test_probe_as_declared"))
class TakesAnOutageForTheEnd(Bad):
    run = _Impatient


class _Stubborn(Tampered):
    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        while True:
            try:
                return super().write(batch)
            except TransientError:
                threading.Event().wait(0.05)


@caught_by("test_end_is_bounded_in_an_outage", patience_s=1.0)
class RetriesForEver(Bad):
    run = _Stubborn


@caught_by("test_finish_returns", also=ANYTHING, **HANGS)
class HangsInFinish(Bad):
    class run(Tampered):
        def finish(self, status: RunStatus) -> None:
            threading.Event().wait(60.0)
