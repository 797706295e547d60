# SPDX-License-Identifier: Apache-2.0
"""What a backend is told: names, folders and results that stay right when a job's folder is moved."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from trackhub.spi import (
    FEDERATION,
    Backend,
    BackendContext,
    BackendRun,
    Capabilities,
    Confirmation,
    ConfirmedBy,
    JobInfo,
    NoOptions,
    Results,
    RunInfo,
    RunKey,
    Side,
)

UUID = "7c9e6679-7425-40de-944b-e07fc1f90ae7"


def info(job: JobInfo, site: str = "site-1", side: Side = Side.SERVER) -> RunInfo:
    return RunInfo(job, site, side, created=1000.0, resume_from=0, blob_dir=Path(), parent=RunKey(job.id, FEDERATION))


def context(run_folder: Path, side: Side = Side.SERVER) -> BackendContext:
    return BackendContext(run_folder / "acme", JobInfo("job-1", name="cifar10"), side)


@pytest.mark.parametrize(
    ("job", "name", "unique_name"),
    [
        (JobInfo("job-1"), "job-1", "job-1"),
        (JobInfo("job-1", name="cifar10"), "cifar10", "cifar10-job-1"),
        (JobInfo(UUID, name="cifar10"), "cifar10", "cifar10-7c9e6679"),
        (JobInfo(UUID), UUID, UUID),
    ],
)
def test_a_job_has_a_name_for_people_and_a_unique_one(job: JobInfo, name: str, unique_name: str) -> None:
    assert (job.name, job.unique_name) == (name, unique_name)


def test_two_jobs_of_one_name_are_two_runs_with_one_display_name() -> None:
    one, other = info(JobInfo("job-1", name="cifar10")), info(JobInfo("job-2", name="cifar10"))

    assert one.display_name == other.display_name == "cifar10/site-1"
    assert one.run_id != other.run_id
    assert one.key == RunKey("job-1", "site-1")


def test_a_folder_option_is_relative_to_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    where = context(tmp_path)

    assert where.folder(None) == where.folder("") == tmp_path / "acme"
    assert where.folder("x/../y") == tmp_path / "y"
    assert where.folder("~/logs") == tmp_path / "home" / "logs"
    assert where.folder("/srv/logs") == Path("/srv/logs")


@pytest.mark.parametrize(
    ("side", "inside", "job"),
    [
        (Side.SERVER, True, "cifar10-job-1"),
        (Side.SERVER, False, "cifar10-job-1"),
        (Side.CLIENT, True, "cifar10-job-1"),
        (Side.CLIENT, False, "cifar10-job-1@client"),
    ],
)
def test_runs_lie_apart_by_job_and_site_and_outside_by_side(tmp_path: Path, side: Side, inside: bool, job: str) -> None:
    where = context(tmp_path / "run", side)
    folder = where.folder("logs" if inside else str(tmp_path / "shared"))

    path = where.run_path(folder, info(where.job, "a/b", side))

    assert path == folder / job / "a%2Fb"


def test_results_lead_to_a_run_also_after_its_folder_was_moved(tmp_path: Path) -> None:
    where = context(tmp_path / "run folder")
    where.workdir.mkdir(parents=True)
    (where.workdir / "data").write_text("found")
    results = Results(path=where.shown(where.workdir / "data"), command="cat acme/data")

    moved = where.run_folder.rename(tmp_path / "moved folder")
    resolved = results.resolved(moved)

    assert resolved.path == str(moved / "acme" / "data")
    assert resolved.command is not None
    assert subprocess.run(resolved.command, shell=True, capture_output=True, check=True, cwd="/").stdout == b"found"


def test_a_command_runs_as_printed_where_no_environment_is_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "an environment").mkdir()
    program = tmp_path / "an environment" / "acme-show"
    program.write_text("#!/bin/sh\nprintf shown:$1")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program.with_name("python")))
    other = tmp_path / "another environment" / "acme-show"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\nprintf wrong")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent), prepend=os.pathsep)

    command = Results(command="acme-show a").resolved(tmp_path).command

    assert command is not None
    assert subprocess.run(command, shell=True, capture_output=True, check=True, cwd="/").stdout == b"shown:a"
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    assert Results(command="acme-show a").resolved(tmp_path).command == f"cd {tmp_path} && acme-show a"


def test_a_page_that_a_command_serves_is_shown_after_the_command() -> None:
    assert Results("http://127.0.0.1:5000/", "store.db", "acme ui\nacme sync").openings() == [
        "acme ui", "acme sync", "http://127.0.0.1:5000/"
    ]  # fmt: skip
    assert Results("https://acme/1", "store.db").openings() == ["https://acme/1"]
    assert Results(path="store.db").openings() == ["store.db"]
    assert Results().openings() == []


def test_a_path_outside_the_run_folder_is_shown_whole(tmp_path: Path) -> None:
    where = context(tmp_path / "run")
    outside = tmp_path / "runs" / "x"  # begins like the run folder's name

    shown = where.shown(outside)

    assert shown == str(outside)
    assert Results(path=shown).resolved(Path(os.sep, "elsewhere")).path == str(outside)


def test_the_weak_answer_is_that_flush_confirms_and_must_be_implemented() -> None:
    class Run(BackendRun):
        pass

    assert Capabilities().confirmed_by is ConfirmedBy.FLUSH
    with pytest.raises(NotImplementedError, match=r"must implement flush\(\).*confirmed_by=ConfirmedBy\.WRITE"):
        Run().flush()
    assert {Confirmation.STORE, Confirmation.CLIENT} == set(Confirmation)


def test_options_come_from_the_brackets_and_a_subclass_may_replace_them() -> None:
    class Options(msgspec.Struct, forbid_unknown_fields=True):
        folder: str = ""

    class MoreOptions(Options, forbid_unknown_fields=True):
        token: str = ""

    class Acme(Backend[Options]):
        spi = 1

    class Other(Acme):
        Options = MoreOptions

    class Plain(Backend):  # type: ignore[type-arg]  # the case under test: no brackets
        spi = 1

    assert (Acme.Options, Other.Options, Plain.Options) == (Options, MoreOptions, NoOptions)
