# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trackhub_tensorboard import TensorBoardBackend, TensorBoardOptions

from backends.tensorboard.tests.conftest import JOB_FOLDER
from trackhub.registry import option_marks
from trackhub.spi import (
    ConfigError,
    Entry,
    JobInfo,
    Metrics,
    OptionMark,
    Params,
    RunStatus,
    Side,
    Text,
    TransientError,
)

if TYPE_CHECKING:
    from backends.tensorboard.tests.conftest import Rig

Read = Callable[[Path], EventAccumulator]
MakeEntry = Callable[..., Entry]


def folders_with_events(root: Path) -> set[str]:
    return {str(path.parent.relative_to(root)) for path in root.rglob("*tfevents*")}


def test_the_backend_is_found_by_its_name() -> None:
    (found,) = [point for point in entry_points(group="trackhub.backends") if point.name == "tensorboard"]

    assert found.load() is TensorBoardBackend


def test_neither_torch_nor_tensorflow_is_loaded() -> None:
    code = "import sys, trackhub_tensorboard; sys.exit(bool({'torch', 'tensorflow'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="log_dir"):
        msgspec.convert({"log_dir": "x"}, TensorBoardOptions)


def test_the_log_folder_is_marked_as_a_path() -> None:
    assert option_marks(TensorBoardBackend) == {"logdir": {OptionMark.PATH}}


@pytest.mark.parametrize(("shared", "folder", "file"), [(0o700, 0o700, 0o600), (0o755, 0o755, 0o644)])
def test_what_is_made_is_for_those_who_may_use_the_folder(
    rig: Rig, entry: MakeEntry, shared: int, folder: int, file: int
) -> None:
    rig.workdir.chmod(shared)

    run = rig.open()
    run.write([entry(0, Metrics({"loss": 1.0})), entry(1, Params({"lr": 0.1}))])
    run.finish(RunStatus.FINISHED)

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in rig.workdir.rglob("*")}
    assert modes == {
        JOB_FOLDER: folder,
        "site-1": folder,
        "events.out.tfevents.000000000000.trackhub": file,
        "events.out.tfevents.000000000000.hparams": file,
    }


def test_each_run_has_a_folder_of_its_own(rig: Rig, entry: MakeEntry, read: Read) -> None:
    """Two jobs of one name are two folders, and a person finds each by the name."""
    first, second = JobInfo("3f2a", "fedavg"), JobInfo("9c1b", "fedavg")

    for value, (site, job) in enumerate([("site-1", first), ("site-2", first), ("site-1", second)]):
        rig.open(site, job).write([entry(0, Metrics({"loss": float(value)}))])

    assert folders_with_events(rig.workdir) == {"fedavg-3f2a/site-1", "fedavg-3f2a/site-2", "fedavg-9c1b/site-1"}
    assert read(rig.workdir / "fedavg-9c1b" / "site-1").Scalars("loss")[0].value == 2.0


def test_a_uuid_is_shown_by_its_first_digits(rig: Rig, entry: MakeEntry) -> None:
    rig.open().write([entry(0, Metrics({"loss": 0.0}))])

    assert folders_with_events(rig.workdir) == {f"{JOB_FOLDER}/site-1"}


@pytest.mark.parametrize("name", ["../x", "..", "/etc", "a/b", "a%2Fb", ".", "", "s" * 400, "Zürich"])
def test_no_site_or_job_name_leads_out_of_its_folder(rig: Rig, entry: MakeEntry, name: str) -> None:
    rig.open(name).write([entry(0, Metrics({"x": 0.0}))])
    rig.open("a_b").write([entry(0, Metrics({"x": 0.0}))])
    rig.open(job=JobInfo("0", name)).write([entry(0, Metrics({"x": 0.0}))])

    jobs = {path.parent.parent for path in rig.workdir.parent.rglob("*tfevents*")}
    assert {path.parent for path in jobs} == {rig.workdir}
    assert len(jobs) == 2
    assert len(folders_with_events(rig.workdir)) == 3


def test_a_relative_logdir_lies_in_the_run_folder(make_rig: Callable[..., Rig], entry: MakeEntry) -> None:
    rig = make_rig("run", logdir="curves", side=Side.CLIENT)

    rig.open().write([entry(0, Metrics({"x": 0.0}))])

    assert folders_with_events(rig.workdir.parent) == {f"curves/{JOB_FOLDER}/site-1"}


def test_server_and_client_with_one_log_folder_do_not_meet(
    make_rig: Callable[..., Rig], entry: MakeEntry, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    for name, side in (("server", Side.SERVER), ("client", Side.CLIENT)):
        make_rig(name, side=side, logdir=str(shared)).open().write([entry(0, Metrics({"x": 0.0}))])

    assert folders_with_events(shared) == {f"{JOB_FOLDER}/site-1", f"{JOB_FOLDER}@client/site-1"}


def test_results_are_relative_to_the_run_folder(rig: Rig) -> None:
    results = rig.backend.results(rig.info())

    assert results.path == f"tensorboard/{JOB_FOLDER}/site-1"
    assert results.command == "tensorboard --logdir tensorboard"


@pytest.mark.parametrize(
    ("calls", "late"),
    [
        ([({"a": 1.0}, 0), ({"a": 1.0}, 1), ({"a": 1.0}, 5)], False),
        ([({"a": 1.0}, 7), ({"b": 1.0}, 0), ({"a": 1.0}, 8), ({"b": 1.0}, 1)], False),
        ([({"a": 1.0}, 5), ({"a": 1.0, "b": 1.0}, 6), ({"a": 1.0}, 7)], False),
        ([({"a": 1.0}, 0), ({"a": 1.0}, 0)], True),
        ([({"a": 1.0}, 3), ({"a": 1.0}, 2)], True),
        ([({"a": 1.0}, 3), ({"a": 1.0, "b": 1.0}, 2)], True),
        ([({"a": 1.0}, 3), ({"b": 1.0}, 1), ({"a": 1.0, "b": 1.0}, 4), ({"b": 1.0}, 4)], True),
        ([({"a": 1.0}, 3), ({"b": 1.0}, 1), ({"a": 1.0, "b": 1.0}, 4), ({"a": 1.0}, 5), ({"b": 1.0}, 5)], False),
        ([({"a": 1.0}, 1), ({"b": 1.0}, 3), ({"c": 1.0, "a": 1.0, "b": 1.0}, 3)], True),
        ([({"a": 1.0}, 1), ({"c": 1.0, "a": 1.0}, 3), ({"c": 1.0}, 3)], True),
    ],
)
def test_the_command_turns_the_fast_loader_off_where_it_would_hide_points(
    rig: Rig, entry: MakeEntry, calls: list[tuple[dict[str, float], int]], late: bool
) -> None:
    run = rig.open()

    run.write([entry(position, Metrics(values), step) for position, (values, step) in enumerate(calls)])

    assert ("--load_fast=false " in str(rig.backend.results(rig.info()).command)) is late


def test_the_command_turns_the_fast_loader_off_for_a_text_of_an_earlier_step(rig: Rig, entry: MakeEntry) -> None:
    rig.open().write([entry(0, Text("note", "x"), 1), entry(1, Text("note", "y"), 0)])

    assert rig.backend.results(rig.info()).command == "tensorboard --load_fast=false --logdir tensorboard"


def test_of_a_run_that_is_opened_again_the_last_steps_are_not_known(rig: Rig, entry: MakeEntry) -> None:
    rig.open().write([entry(0, Metrics({"a": 1.0}), 9)])

    again = TensorBoardBackend(TensorBoardOptions(), rig.backend.context)
    again.open_run(rig.info())

    assert "--load_fast=false" in str(again.results(rig.info()).command)


def test_results_outside_the_run_folder_are_absolute(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig = make_rig("run", logdir=str(tmp_path / "all curves"))

    results = rig.backend.results(rig.info())

    assert results.path == str(tmp_path / "all curves" / JOB_FOLDER / "site-1")
    assert results.command == f"tensorboard --logdir '{tmp_path}/all curves'"


def test_a_log_folder_that_cannot_be_is_found_before_training(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rig = make_rig("run", logdir=str(tmp_path / "file" / "logs"))

    with pytest.raises(ConfigError, match="logdir"):
        rig.backend.preflight()
    with pytest.raises(TransientError, match="cannot open"):
        rig.open()


def test_preflight_makes_the_log_folder(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("run", logdir="new/logs")

    rig.backend.preflight()

    assert (rig.workdir.parent / "new" / "logs").is_dir()
