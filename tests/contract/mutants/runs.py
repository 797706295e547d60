# SPDX-License-Identifier: Apache-2.0
"""Backends whose runs end wrongly, or are taken for one another."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tests.contract.mutants.base import (
    ANYTHING,
    HANGS,
    NEIGHBOURS,
    Bad,
    Tampered,
    caught_by,
)
from trackhub.builtin.jsonl import JsonlBackend, JsonlOptions, JsonlRun
from trackhub.spi import (
    BackendContext,
    Entry,
    Results,
    RunInfo,
    RunStatus,
    Side,
    path_component,
)


@caught_by("test_job_without_records_ends", also=ANYTHING, **HANGS)
class HangsInClose(Bad):
    def close(self) -> None:
        threading.Event().wait(60.0)


@caught_by(
    "test_status_is_told[failed]",
    "test_status_is_told[aborted]",
    also=("test_site_that_failed_ends_as_failed", r"test_status_is_told\[killed\]"),
)
class AlwaysFinishes(Bad):
    class run(Tampered):
        def finish(self, status: RunStatus) -> None:
            super().finish(RunStatus.FINISHED)


@caught_by(
    "test_status_is_told[finished]",
    also=(
        "test_site_that_failed_ends_as_failed",
        r"test_status_is_told\[.*",
    ),
)
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


@caught_by("test_status_is_told[killed]")
class TakesKilledForFinished(Bad):
    class run(Tampered):
        def finish(self, status: RunStatus) -> None:
            super().finish(RunStatus.FINISHED if status is RunStatus.KILLED else status)


@caught_by("test_results_move_with_the_run_folder")
class NamesResultsThatAreNotThere(Bad):
    def results(self, info: RunInfo) -> Results:
        return Results(path="jsonl/index.html")


@caught_by("test_results_move_with_the_run_folder")
class NamesAnAbsolutePath(Bad):
    def results(self, info: RunInfo) -> Results:
        return Results(path=str(self._file(info)))


@caught_by("test_results_move_with_the_run_folder")
class NamesItsFolderInACommand(Bad):
    def results(self, info: RunInfo) -> Results:
        return Results(command=f"less {self._file(info)}")


@caught_by("test_run_opened_again_is_the_same_run", also=("test_end_is_bounded_in_an_outage",))
class KeepsTheEndOfAFinishedRun(Bad):
    def open_run(self, info: RunInfo) -> Any:
        path = self._file(info)
        if path.exists() and b'"kind":"end"' in path.read_bytes():
            path.write_bytes(path.read_bytes().splitlines(keepends=True)[-1])
        return super().open_run(info)


@caught_by("test_two_sites_do_not_mix", also=("test_site_that_failed_ends_as_failed",))
class MixesTwoSites(Bad):
    def _file(self, info: RunInfo) -> Path:
        site = "site-1" if info.site == "site-2" else info.site
        return super()._file(msgspec.structs.replace(info, site=site))


@caught_by("test_two_jobs_do_not_mix", also=ANYTHING)
class KnowsARunByItsSite(Bad):
    def _file(self, info: RunInfo) -> Path:
        return self._folder / "job" / f"{info.site}.jsonl"


@caught_by("test_two_jobs_of_one_name_do_not_mix", also=("test_two_sides_do_not_mix",))
class TakesAJobForAnEarlierOneOfItsName(Bad):
    def _file(self, info: RunInfo) -> Path:
        own = super()._file(info)
        earlier = sorted(self._folder.glob(f"{path_component(info.job.name)}-*"))
        return (earlier[0] if earlier else own.parent) / own.name


@caught_by("test_job_with_a_difficult_name")
class TakesAJobsNameForAPath(Bad):
    def _file(self, info: RunInfo) -> Path:
        own = super()._file(info)
        return own.parent.parent / own.parent.name.replace(path_component(info.job.name), info.job.name) / own.name


@caught_by("test_two_sides_do_not_mix")
class IgnoresTheSide(Bad):
    def __init__(self, options: JsonlOptions, context: BackendContext) -> None:
        super().__init__(options, msgspec.structs.replace(context, side=Side.SERVER))


class _BySeq(Tampered):
    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        super().__init__(inner, backend, info)
        self._seen: set[int] = set()

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        kept = []
        for entry in batch:
            if entry.seq not in self._seen:
                kept.append(entry)
            self._seen.add(entry.seq)
        return kept


@caught_by(
    "test_two_processes_of_a_site_share_its_run",
    also=(
        "test_end_is_bounded_in_an_outage",
        *NEIGHBOURS,
        "test_outage_loses_nothing",
        "test_probe_as_declared",
    ),
)
class KnowsARecordByItsSeq(Bad):
    run = _BySeq
