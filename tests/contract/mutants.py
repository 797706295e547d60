# SPDX-License-Identifier: Apache-2.0
"""Backends that are wrong, each in one way, and the test of the contract kit that is meant for it.

Every one is the good file backend with one thing changed. ``test_kit_catches.py`` runs them.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import msgspec

from trackhub.builtin.jsonl import JsonlBackend, JsonlOptions, JsonlRun
from trackhub.spi import (
    Artifact,
    BackendRun,
    Entry,
    Histogram,
    Image,
    Kind,
    Metrics,
    Params,
    PermanentError,
    Redelivery,
    Results,
    RunInfo,
    RunKey,
    RunStatus,
    Side,
    SinkContext,
    Table,
    Tags,
    Text,
    TransientError,
    WriteReport,
)
from trackhub.testing.contracts.jsonl import JsonlContract

CAN = JsonlBackend.capabilities


class Mutant(NamedTuple):
    """One mutant's contract class, and the tests that must fail on it.

    Attributes:
        caught_by: the tests that are meant for it.
        also: other tests that cannot help failing on it, as regular expressions.
    """

    name: str
    caught_by: tuple[str, ...]
    also: tuple[str, ...]


MUTANTS: list[Mutant] = []


def caught_by(
    *tests: str, also: Sequence[str] = (), **hooks: Any
) -> Callable[[type[JsonlBackend]], type[JsonlBackend]]:
    """Make a contract class for a mutant; ``hooks`` replace those of the good one."""

    def add(cls: type[JsonlBackend]) -> type[JsonlBackend]:
        name = f"Test{cls.__name__}"
        globals()[name] = type(name, (JsonlContract,), {"backend": cls, "__module__": __name__, **hooks})
        MUTANTS.append(Mutant(name, tests, tuple(also)))
        return cls

    return add


class Tampered(BackendRun):
    """A good run, before which something is done to the entries."""

    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        self.inner = inner
        self.backend = backend
        self.info = info

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        return list(batch)

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        if entries := self.tamper(batch):
            self.inner.write(entries)
        return None

    def finish(self, status: RunStatus) -> None:
        self.inner.finish(status)

    def next_position(self) -> int:
        return self.inner.next_position()


class Bad(JsonlBackend):
    """A good backend, around whose runs there is a tampered one."""

    run: ClassVar[type[Tampered]] = Tampered

    def open_run(self, info: RunInfo) -> Any:
        return self.run(super().open_run(info), self, info)


def replace_keys(payload: Any, change: Callable[[str], str]) -> Any:
    if isinstance(payload, Metrics | Params | Tags):
        renamed: dict[str, Any] = {change(key): value for key, value in payload.values.items()}
        return type(payload)(renamed)
    return msgspec.structs.replace(payload, key=change(payload.key))


def each(change: Callable[[Entry], Entry | None]) -> type[Tampered]:
    """Return a run that changes or drops each entry by itself."""

    class Each(Tampered):
        def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
            return [kept for entry in batch if (kept := change(entry)) is not None]

    return Each


def payloads(change: Callable[[Any], Any]) -> type[Tampered]:
    """Return a run that changes each payload, or drops the entry where that gives None."""

    def apply(entry: Entry) -> Entry | None:
        payload = change(entry.payload)
        return None if payload is None else msgspec.structs.replace(entry, payload=payload)

    return each(apply)


def keys(change: Callable[[str], str], *kinds: type) -> type[Tampered]:
    """Return a run that renames keys."""
    return payloads(lambda p: replace_keys(p, change) if not kinds or isinstance(p, kinds) else p)


def values(change: Callable[[float], float | None]) -> type[Tampered]:
    """Return a run that changes metric values, or drops those that become None."""

    def apply(payload: Any) -> Any:
        if not isinstance(payload, Metrics):
            return payload
        changed = {key: new for key, value in payload.values.items() if (new := change(value)) is not None}
        return Metrics(changed) if changed else None

    return payloads(apply)


def steps(change: Callable[[int | None], int | None]) -> type[Tampered]:
    """Return a run that changes steps."""
    return each(lambda entry: msgspec.structs.replace(entry, step=change(entry.step)))


class _Last(Tampered):
    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        return list(batch[:-1])


@caught_by("test_kind_as_declared[metrics]")
class DropsTheLastRecord(Bad):
    run = _Last


@caught_by("test_kind_as_declared[params]")
class WritesParamsAsMetrics(Bad):
    run = payloads(
        lambda p: (
            Metrics({k: float(v) for k, v in p.values.items() if isinstance(v, int | float)})
            if isinstance(p, Params)
            else p
        )
    )


@caught_by("test_kind_as_declared[tags]")
class KeepsOneTag(Bad):
    run = payloads(lambda p: Tags(dict(list(p.values.items())[-1:])) if isinstance(p, Tags) else p)


@caught_by("test_kind_as_declared[text]")
class ClaimsTextButHasNone(Bad):
    run = payloads(lambda p: None if isinstance(p, Text) else p)


@caught_by("test_kind_as_declared[text]")
class HasTextButClaimsNone(Bad):
    capabilities = msgspec.structs.replace(CAN, kinds=CAN.kinds - {Kind.TEXT})


@caught_by("test_kind_as_declared[image]")
class LosesCaptions(Bad):
    run = payloads(lambda p: msgspec.structs.replace(p, caption="") if isinstance(p, Image) else p)


@caught_by("test_kind_as_declared[histogram]")
class LosesTheLastBin(Bad):
    run = payloads(lambda p: Histogram(p.key, p.edges[:-1], p.counts[:-1]) if isinstance(p, Histogram) else p)


@caught_by("test_kind_as_declared[table]")
class TurnsCellsIntoText(Bad):
    run = payloads(
        lambda p: Table(p.key, p.columns, [list(map(str, r)) for r in p.rows]) if isinstance(p, Table) else p
    )


@caught_by("test_kind_as_declared[artifact]")
class LosesTheNamesOfFiles(Bad):
    run = payloads(lambda p: msgspec.structs.replace(p, filename="file") if isinstance(p, Artifact) else p)


class _FirstParams(Tampered):
    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        super().__init__(inner, backend, info)
        self._seen: set[str] = set()

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        kept = []
        for entry in batch:
            payload = entry.payload
            if isinstance(payload, Params):
                payload = Params({k: v for k, v in payload.values.items() if k not in self._seen})
                self._seen.update(payload.values)
            kept.append(msgspec.structs.replace(entry, payload=payload))
        return kept


@caught_by("test_changing_params_as_declared")
class KeepsTheFirstParams(Bad):
    run = _FirstParams


@caught_by("test_changing_params_as_declared")
class ChangesParamsButClaimsNot(Bad):
    capabilities = msgspec.structs.replace(CAN, changing_params=False)


class _OneKind(Tampered):
    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        super().__init__(inner, backend, info)
        self._kinds: dict[str, type] = {}

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        def first(entry: Entry) -> bool:
            kind = type(entry.payload)
            names = getattr(entry.payload, "values", None) or [entry.payload.key]  # type: ignore[union-attr]
            return all(self._kinds.setdefault(name, kind) is kind for name in names)

        return [entry for entry in batch if first(entry)]


@caught_by("test_one_key_serves_every_kind")
class GivesAKeyToTheFirstKind(Bad):
    run = _OneKind


class _Lenient(Tampered):
    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        for entry in batch:
            try:
                self.inner.write([entry])
            except PermanentError:
                logging.getLogger(__name__).warning("passed over")
        return None


@caught_by("test_missing_content_is_not_passed_over")
class PassesOverMissingContent(Bad):
    run = _Lenient


@caught_by("test_names_with_difficult_characters")
class StripsNames(Bad):
    run = keys(lambda key: key.strip(" ./") or "_", Metrics)


@caught_by("test_names_in_many_scripts")
class NormalisesNames(Bad):
    run = keys(lambda key: unicodedata.normalize("NFKC", key), Metrics)


@caught_by("test_long_names_stay_apart")
class CutsLongNames(Bad):
    run = keys(lambda key: key[:250], Metrics)


@caught_by("test_names_that_look_alike_stay_apart")
class MergesTwoKeys(Bad):
    run = keys(lambda key: re.sub(r"\W", "_", key), Metrics)


@caught_by("test_names_of_params_and_tags_stay_apart")
class MergesTwoParams(Bad):
    run = keys(lambda key: key.lower().replace("/", "_"), Params, Tags)


@caught_by("test_site_with_a_difficult_name")
class ReplacesTheSitesName(Bad):
    def open_run(self, info: RunInfo) -> Any:
        site = re.sub(r"[^\w-]", "_", info.key.site)
        return super().open_run(msgspec.structs.replace(info, key=RunKey(info.key.job, site)))


class _Reversed(Tampered):
    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        return [
            msgspec.structs.replace(entry, position=position)
            for entry, position in zip(reversed(batch), [entry.position for entry in batch], strict=True)
        ]


@caught_by("test_order_is_kept")
class Reorders(Bad):
    run = _Reversed


class _StepFilter(Tampered):
    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        super().__init__(inner, backend, info)
        self._highest: dict[str, int] = {}

    def keep(self, step: int, highest: int) -> bool:
        raise NotImplementedError

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        kept = []
        for entry in batch:
            if not isinstance(entry.payload, Metrics) or entry.step is None:
                kept.append(entry)
                continue
            key = next(iter(entry.payload.values))
            if self.keep(entry.step, self._highest.get(key, -1)):
                kept.append(entry)
            self._highest[key] = max(entry.step, self._highest.get(key, -1))
        return kept


class _NotLate(_StepFilter):
    def keep(self, step: int, highest: int) -> bool:
        return step >= highest


class _NotEqual(_StepFilter):
    def keep(self, step: int, highest: int) -> bool:
        return step != highest


@caught_by("test_late_steps_as_declared")
class DropsLateSteps(Bad):
    run = _NotLate


@caught_by("test_late_steps_as_declared")
class HasLateStepsButClaimsNone(Bad):
    capabilities = msgspec.structs.replace(CAN, late_steps=False)


@caught_by("test_equal_steps_are_all_kept")
class DropsEqualSteps(Bad):
    run = _NotEqual


@caught_by("test_steps_with_gaps")
class Has32BitSteps(Bad):
    run = steps(lambda step: None if step is None else step % 2**31)


@caught_by("test_largest_step")
class HasFloatSteps(Bad):
    run = steps(lambda step: None if step is None else min(int(float(step)), 2**63 - 2))


@caught_by("test_optional_step_as_declared")
class PutsPointsWithoutStepAtZero(Bad):
    run = steps(lambda step: step or 0)


@caught_by("test_times_are_those_of_the_log_calls")
class StampsItsOwnTime(Bad):
    run = each(lambda entry: msgspec.structs.replace(entry, time=time.time()))


@caught_by("test_nonfinite_as_declared")
class LosesNaN(Bad):
    run = values(lambda value: None if math.isnan(value) else value)


@caught_by("test_nonfinite_as_declared")
class HasNaNButClaimsNone(Bad):
    capabilities = msgspec.structs.replace(CAN, nonfinite=False)


@caught_by("test_extreme_numbers")
class RoundsToSixDigits(Bad):
    run = values(lambda value: float(f"{value:.6g}"))


@caught_by("test_calls_of_the_writer")
class LosesTheLargestInteger(Bad):
    run = values(lambda value: None if abs(value) == 2.0**63 else value)


@caught_by("test_class_can_be_loaded")
class IsForAnotherSpi(Bad):
    spi = 99


class _OpenOptions(JsonlOptions, frozen=True, forbid_unknown_fields=False):
    pass


@caught_by("test_class_can_be_loaded")
class LetsUnknownOptionsPass(Bad):
    Options = _OpenOptions


@caught_by("test_contract_version_is_one_that_exists")
class PassedAContractThatIsNotWritten(Bad):
    contract = 99


@caught_by("test_making_a_backend_does_no_work")
class WorksWhenItIsMade(Bad):
    def __init__(self, options: JsonlOptions, context: SinkContext) -> None:
        super().__init__(options, context)
        (context.workdir / "lock").write_text("mine")


_HANGS = {"deadline_s": 1.0, "patience_s": 1.0}


@caught_by("test_job_without_records_ends", **_HANGS)
class HangsInClose(Bad):
    def close(self) -> None:
        threading.Event().wait(60.0)


@caught_by("test_status_is_told[failed]", "test_status_is_told[aborted]")
class AlwaysFinishes(Bad):
    class run(Tampered):
        def finish(self, status: RunStatus) -> None:
            super().finish(RunStatus.FINISHED)


@caught_by("test_status_is_told[finished]")
class NeverFinishes(Bad):
    class run(Tampered):
        def finish(self, status: RunStatus) -> None:
            pass


@caught_by("test_site_that_failed_ends_as_failed")
class EndsAllRunsAsTheFirst(Bad):
    first: RunStatus | None = None

    class run(Tampered):
        def finish(self, status: RunStatus) -> None:
            assert isinstance(self.backend, EndsAllRunsAsTheFirst)
            self.backend.first = self.backend.first or status
            super().finish(self.backend.first)


@caught_by("test_results_can_be_looked_at")
class NamesResultsThatAreNotThere(Bad):
    def results(self, info: RunInfo) -> Results:
        return Results(path=str(self.context.workdir / "index.html"))


@caught_by("test_run_opened_again_is_the_same_run")
class StartsAFinishedRunAnew(Bad):
    def open_run(self, info: RunInfo) -> Any:
        path = self._file(info)
        if path.exists() and b'"kind":"end"' in path.read_bytes():
            path.unlink()
        return super().open_run(info)


@caught_by("test_two_sites_do_not_mix")
class MixesTwoSites(Bad):
    def _file(self, info: RunInfo) -> Path:
        site = "site-1" if info.key.site == "site-2" else info.key.site
        return super()._file(msgspec.structs.replace(info, key=RunKey(info.key.job, site)))


@caught_by("test_two_jobs_do_not_mix")
class KnowsARunByItsSite(Bad):
    def _file(self, info: RunInfo) -> Path:
        return self._folder / "job" / f"{info.key.site}.jsonl"


@caught_by("test_two_sides_do_not_mix")
class IgnoresTheSide(Bad):
    def __init__(self, options: JsonlOptions, context: SinkContext) -> None:
        super().__init__(options, msgspec.structs.replace(context, side=Side.SERVER))


class _BySeq(Tampered):
    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        super().__init__(inner, backend, info)
        self._seen: set[int] = set()

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        kept = [entry for entry in batch if entry.seq not in self._seen]
        self._seen.update(entry.seq for entry in batch)
        return kept


@caught_by("test_two_processes_of_a_site_share_its_run")
class KnowsARecordByItsSeq(Bad):
    run = _BySeq


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


@caught_by("test_confirmed_records_survive_sigkill", "test_run_resumes_in_a_new_process")
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
)
class DoublesOnRedelivery(Bad):
    run = _Repeating


@caught_by("test_redelivery_after_an_error_as_declared")
class IsResumableButClaimsLess(Bad):
    capabilities = msgspec.structs.replace(CAN, redelivery=Redelivery.AT_LEAST_ONCE)


@caught_by("test_redelivery_after_an_error_as_declared")
class ClaimsToBeIdempotent(Bad):
    capabilities = msgspec.structs.replace(CAN, redelivery=Redelivery.IDEMPOTENT)
    run = _Repeating


@caught_by("test_redelivery_after_sigkill_as_declared[written]")
class ResumesOneTooFar(Bad):
    class run(Tampered):
        def next_position(self) -> int:
            held = self.inner.next_position()
            return held + 1 if held else 0


@caught_by("test_run_resumes_in_a_new_process")
class StartsAResumedRunAnew(Bad):
    def open_run(self, info: RunInfo) -> Any:
        if info.resume_from:
            self._file(info).unlink(missing_ok=True)
        return super().open_run(info)


class _FailsFirst(Tampered):
    failed = False

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        if not self.failed:
            self.failed = True
            raise TransientError("it always does, the first time")
        return super().write(batch)


@caught_by("test_transient_errors_lose_nothing", "test_unknown_errors_lose_nothing")
class FailsForNoReason(Bad):
    run = _FailsFirst


class _NoHoles(Tampered):
    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        first = self.inner.next_position()
        return [entry for number, entry in enumerate(batch, first) if entry.position == number]


@caught_by("test_permanent_error_takes_only_its_records", "test_reported_rejections_are_counted")
class ExpectsPositionsWithoutHoles(Bad):
    run = _NoHoles


class _First100(Tampered):
    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        return list(batch[:100])


@caught_by("test_batches_are_as_large_as_declared")
class TakesLessThanItDeclares(Bad):
    run = _First100


class _Swallowing(Tampered):
    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        try:
            return super().write(batch)
        except TransientError:
            return None


@caught_by("test_outage_loses_nothing", "test_finish_is_bounded_with_a_dead_peer")
class SwallowsErrors(Bad):
    run = _Swallowing


class _Impatient(Tampered):
    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        try:
            return super().write(batch)
        except TransientError as error:
            raise PermanentError(str(error)) from error


@caught_by("test_outage_loses_nothing")
class TakesAnOutageForTheEnd(Bad):
    run = _Impatient


class _Stubborn(Tampered):
    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        while True:
            try:
                return super().write(batch)
            except TransientError:
                threading.Event().wait(0.05)


@caught_by("test_finish_is_bounded_with_a_dead_peer", patience_s=1.0)
class RetriesForEver(Bad):
    run = _Stubborn


@caught_by("test_finish_returns", **_HANGS)
class HangsInFinish(Bad):
    class run(Tampered):
        def finish(self, status: RunStatus) -> None:
            threading.Event().wait(60.0)


@caught_by("test_secrets_are_nowhere")
class WritesTheTokenToDisk(Bad):
    def open_run(self, info: RunInfo) -> Any:
        (self.context.workdir / "environment.txt").write_text(repr(dict(os.environ)))
        return super().open_run(info)


@caught_by("test_secrets_are_nowhere")
class LogsTheToken(Bad):
    def open_run(self, info: RunInfo) -> Any:
        logging.getLogger("acme.client").debug("logging in with %s", os.environ.get("TRACKHUB_CONTRACT_SECRET"))
        return super().open_run(info)


class _TokenOptions(JsonlOptions, frozen=True, forbid_unknown_fields=True):
    token: str = ""


@caught_by("test_secrets_are_nowhere", secret_options={"token": "${secret:TRACKHUB_CONTRACT_SECRET}"})
class PrintsItsOptions(Bad):
    Options = _TokenOptions

    def preflight(self) -> None:
        print(f"acme uses {msgspec.structs.asdict(self.options)['token']!s}", file=sys.stderr)
        super().preflight()


@caught_by("test_no_thread_is_left", patience_s=1.0)
class LeaksAThread(Bad):
    def open_run(self, info: RunInfo) -> Any:
        threading.Thread(target=threading.Event().wait, args=(60.0,), daemon=True).start()
        return super().open_run(info)


_LEAKED: list[io.IOBase] = []


@caught_by("test_no_file_is_left_open", patience_s=1.0)
class LeaksAFile(Bad):
    def open_run(self, info: RunInfo) -> Any:
        run = super().open_run(info)
        _LEAKED.append((self.context.workdir / f"lock-{info.run_id}").open("wb"))
        return run


_PROCESSES: list[subprocess.Popen[bytes]] = []


@caught_by("test_no_process_is_left", patience_s=1.0)
class LeaksAProcess(Bad):
    def open_run(self, info: RunInfo) -> Any:
        _PROCESSES.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"]))
        return super().open_run(info)


class _Bounded(Tampered):
    taken = 0

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        room = max(0, 900 - self.taken)
        self.taken += len(batch)
        return list(batch[:room])


@caught_by("test_volume")
class HoldsNoMoreThanSoMany(Bad):
    run = _Bounded


class _Misspelt(Tampered):
    def flsh(self) -> None:
        """Nobody calls this."""


@caught_by("test_no_method_is_misspelt")
class MisspellsFlush(Bad):
    run = _Misspelt


@caught_by("test_no_method_is_misspelt")
class MisspellsPreflight(Bad):
    def preflght(self) -> None:
        """Nobody calls this."""


def _nothing(self: Any) -> None:
    """Passes."""


@caught_by("test_contract_is_whole", test_order_is_kept=None)
class RemovesATest(Bad):
    pass


@caught_by("test_contract_is_whole", test_extreme_numbers=_nothing)
class ReplacesATest(Bad):
    pass


@caught_by("test_contract_is_whole", read_bakc=_nothing)
class MisspellsAHook(Bad):
    pass


@caught_by("test_kind_as_declared[tags]", cannot_tell={"tags": "for no reason"})
class SaysItCannotTell(Bad):
    pass
