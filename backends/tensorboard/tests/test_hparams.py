# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, get_experiment, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

from backends.tensorboard.tests.conftest import JOB_FOLDER
from trackhub.spi import Entry, Metrics, Params, RunStatus, Side

if TYPE_CHECKING:
    from backends.tensorboard.tests.conftest import Rig

MakeEntry = Callable[..., Entry]


def hparams_tab(logdir: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return what TensorBoard's plugin sends to the HPARAMS tab: its columns, and each row by its run's name."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(logdir)), logdir=str(logdir)))
    request = RequestContext()
    experiment = get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest(include_metrics=True)).run()
    columns = [column.name for column in experiment.hparam_infos]
    columns += [column.name.tag for column in experiment.metric_infos]
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
    groups = list_session_groups.Handler(
        request, context, "", api_pb2.ListSessionGroupsRequest(allowed_statuses=statuses, slice_size=100)
    ).run()
    rows = {}
    for group in groups.session_groups:
        (session,) = group.sessions
        rows[session.name] = {
            "trial": group.name,
            "params": {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()},
            "metrics": {metric.name.tag: metric.value for metric in session.metric_values},
            "status": api_pb2.Status.Name(session.status),
            "start": session.start_time_secs,
        }
    return columns, rows


def test_the_hparams_tab_shows_a_row_per_site_with_params_and_last_metrics(rig: Rig, entry: MakeEntry) -> None:
    for site, rate in (("site-1", 0.1), ("site-2", 0.2)):
        run = rig.open(site)
        params = {"lr": rate, "batch": 32, "flag": True, "name": "sgd", "none": None, "sizes": [1, {"a": 2}]}
        params |= {"big": 2**60, "nan": math.nan, "huge": 1e300}
        run.write([entry(0, Params(params)), entry(1, Metrics({"loss": 2.0})), entry(2, Metrics({"loss": 1.0}))])
        run.finish(RunStatus.FINISHED)

    columns, rows = hparams_tab(rig.workdir)

    assert {"lr", "batch", "flag", "name", "none", "sizes", "big", "nan", "huge", "loss"} == set(columns)
    assert set(rows) == {f"{JOB_FOLDER}/site-1", f"{JOB_FOLDER}/site-2"}
    assert rows[f"{JOB_FOLDER}/site-2"] == {
        "trial": "site-2 (fedavg lr=0.1-6f2c8a10)",
        "params": {
            "lr": 0.2,
            "batch": 32.0,
            "flag": True,
            "name": "sgd",
            "none": "null",
            "sizes": '[1, {"a": 2}]',
            "big": str(2**60),
            "nan": "NaN",
            "huge": 1e300,
        },
        "metrics": {"loss": 1.0},
        "status": "STATUS_SUCCESS",
        "start": 1000.0,
    }


def test_params_of_several_calls_are_one_row_with_the_last_values(rig: Rig, entry: MakeEntry) -> None:
    """Also if the run is reopened between two of these calls."""
    run = rig.open()
    run.write([entry(0, Params({"a": 1, "b": "x"})), entry(1, Metrics({"loss": 1.0}))])
    run.write([entry(2, Params({"c": True}))])
    run.finish(RunStatus.FAILED)

    rig.open().write([entry(3, Params({"a": "one"}))])

    _, rows = hparams_tab(rig.workdir)
    assert rows[f"{JOB_FOLDER}/site-1"]["params"] == {"a": "one", "b": "x", "c": True}


def test_params_of_many_records_are_written_once(rig: Rig, entry: MakeEntry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole file is written each time. Thousands of records of large params held up all runs of the lane."""
    written: list[Path] = []
    replace = Path.replace

    def note(path: Path, target: Path) -> Path:
        written.append(target)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", note)
    run = rig.open()

    run.write([entry(i, Params({f"p{i}": "x" * 3000})) for i in range(1000)])

    assert len(written) == 1
    run.finish(RunStatus.FINISHED)
    _, rows = hparams_tab(rig.workdir)
    (row,) = rows.values()
    assert row["params"] == {f"p{i}": "x" * 3000 for i in range(1000)}


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        (RunStatus.FINISHED, "STATUS_SUCCESS"),
        (RunStatus.FAILED, "STATUS_FAILURE"),
        (RunStatus.ABORTED, "STATUS_FAILURE"),
        (RunStatus.KILLED, "STATUS_FAILURE"),
        (None, "STATUS_UNKNOWN"),
    ],
)
def test_the_hparams_tab_shows_how_a_run_ended(
    rig: Rig, entry: MakeEntry, status: RunStatus | None, shown: str
) -> None:
    run = rig.open()
    run.write([entry(0, Params({"a": 1}))])
    if status is not None:
        run.finish(status)

    _, rows = hparams_tab(rig.workdir)

    assert rows[f"{JOB_FOLDER}/site-1"]["status"] == shown


def test_server_and_client_runs_of_one_site_are_two_rows(make_rig: Callable[..., Rig], entry: MakeEntry) -> None:
    """TensorBoard makes one row of all sessions that share a trial's name."""
    trials = []
    for side in (Side.SERVER, Side.CLIENT):
        rig = make_rig(side.value, side=side)
        rig.open().write([entry(0, Params({"lr": 0.1}))])
        _, rows = hparams_tab(rig.workdir)
        trials.append(rows[f"{JOB_FOLDER}/site-1"]["trial"])

    assert trials == ["site-1 (fedavg lr=0.1-6f2c8a10)", "site-1 (fedavg lr=0.1-6f2c8a10 at the client)"]


def test_keys_of_the_hparams_tab_itself_hide_neither_params_nor_metrics(rig: Rig, entry: MakeEntry) -> None:
    key = "_hparams_/session_start_info"
    run = rig.open()
    run.write([entry(0, Metrics({key: 1.0})), entry(1, Params({"lr": 0.1, key: 2}))])

    _, rows = hparams_tab(rig.workdir)

    assert rows[f"{JOB_FOLDER}/site-1"]["params"] == {"lr": 0.1, key: 2.0}
    assert rows[f"{JOB_FOLDER}/site-1"]["metrics"] == {f"{key} (metrics)": 1.0}


def test_a_run_without_params_has_no_row(rig: Rig, entry: MakeEntry) -> None:
    run = rig.open()
    run.write([entry(0, Metrics({"loss": 1.0}))])
    run.finish(RunStatus.FINISHED)

    assert hparams_tab(rig.workdir) == ([], {})
    assert [path.suffix for path in rig.folder().iterdir()] == [".trackhub"]


def test_params_are_not_written_through_a_link(rig: Rig, entry: MakeEntry, tmp_path: Path) -> None:
    """Somebody else may put one into a shared folder."""
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    run = rig.open("site-1")
    folder = rig.workdir / JOB_FOLDER / "site-1"
    (folder / ".hparams.part").symlink_to(mine)

    run.write([entry(0, Params({"lr": 0.1}))])

    assert mine.read_text() == "mine"
    assert "lr" in hparams_tab(rig.workdir)[0]
