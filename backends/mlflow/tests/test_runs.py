# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from trackhub_mlflow.job_runs import NESTING_TAG, PARENT_TAG, RUN_TAG
from trackhub_mlflow.shared_parent_run import PENDING_TAG
from trackhub_mlflow.sqlite_store import SqliteStore
from trackhub_mlflow.store import Pair

from trackhub.spi import ConfigError, Entry, JobInfo, Metrics, Params, RunStatus, Side, Tags, TransientError

if TYPE_CHECKING:
    from pathlib import Path

    from backends.mlflow.tests.conftest import Rig

MakeEntry = Callable[..., Entry]


def test_each_site_has_a_run_below_the_jobs_parent_run(rig: Rig) -> None:
    for site in ("site-1", "site-2", "server"):
        rig.open(site)

    database = rig.database
    (parent,) = database.parents()
    assert sorted(run.name for run in database.runs()) == [
        "job-1",
        "server · job-1",
        "site-1 · job-1",
        "site-2 · job-1",
    ]
    for site in ("site-1", "site-2", "server"):
        run = database.site_run(site)
        tags = database.tags(run.id)
        assert (tags["mlflow.parentRunId"], tags["job"], tags["site"], tags["side"]) == (
            parent.id,
            "job-1",
            site,
            "server",
        )
        assert (run.experiment, run.status, run.start) == ("trackhub", "RUNNING", 1_700_000_000_000)


def test_options_name_the_experiment_and_describe_the_runs(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(experiment_name="cifar", run_tags={"team": "blue", "site": "x"}, note="**first** try")
    rig.open()

    database = rig.database
    for run in database.runs():
        tags = database.tags(run.id)
        assert run.experiment == "cifar"
        assert tags["team"] == "blue"
        assert tags["mlflow.note.content"] == "**first** try"
    assert database.tags(database.site_run().id)["site"] == "site-1"


JOB_A = JobInfo("3f2a9c1e-5b1d-4c3e-8f00-000000000001", "fedavg", "**first** try", ("baseline", "team/blue", "site"))
JOB_B = JobInfo("b07d55aa-5b1d-4c3e-8f00-000000000002", "fedavg")


def test_a_person_reads_the_jobs_name_notes_and_tags(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(job_info=JOB_A)
    rig.open()

    database = rig.database
    (parent,), run = database.parents(JOB_A.id), database.site_run("site-1", JOB_A.id)
    assert (parent.name, run.name) == ("fedavg", "site-1 · fedavg-3f2a9c1e")
    for tags in (database.tags(parent.id), database.tags(run.id)):
        assert (tags["job"], tags["job_name"]) == (JOB_A.id, "fedavg")
        assert tags["mlflow.note.content"] == "**first** try"
        assert (tags["baseline"], tags["team/blue"], tags["_x0073_ite"]) == ("", "", "")
    assert database.tags(run.id)["site"] == "site-1"


def test_two_jobs_of_one_name_are_two_and_show_their_ids(make_rig: Callable[..., Rig]) -> None:
    """The run table shows a run's source beside its name. The charts show the names of the sites' runs."""
    for job in (JOB_A, JOB_B):
        make_rig(job_info=job).open()

    database = make_rig().database
    parents = [database.parents(job.id)[0] for job in (JOB_A, JOB_B)]
    assert [parent.name for parent in parents] == ["fedavg", "fedavg"]
    assert [database.tags(parent.id)["mlflow.source.name"] for parent in parents] == ["3f2a9c1e", "b07d55aa"]
    children = [run.name for run in database.runs() if run.name != "fedavg"]
    assert sorted(children) == ["site-1 · fedavg-3f2a9c1e", "site-1 · fedavg-b07d55aa"]


def test_the_option_note_wins_over_the_jobs_notes(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(job_info=JOB_A, note="of the option", run_tags={"baseline": "yes"})
    rig.open()

    tags = rig.database.tags(rig.database.site_run("site-1", JOB_A.id).id)
    assert (tags["mlflow.note.content"], tags["baseline"]) == ("of the option", "yes")


def test_a_site_may_describe_its_own_run(make_rig: Callable[..., Rig], entry: MakeEntry) -> None:
    rig = make_rig(job_info=JOB_A)

    rig.open().write([entry(0, Tags({"_x006D_lflow.note.content": "of the site"}))])  # as the core escapes it

    tags = rig.database.tags(rig.database.site_run("site-1", JOB_A.id).id)
    assert tags["mlflow.note.content"] == "of the site"


def test_names_and_notes_too_long_for_mlflow_are_cut(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(job_info=JobInfo("id", "n" * 400, "x" * 9000, ("t" * 400,)))
    rig.open()

    database = rig.database
    (parent,), run = database.parents("id"), database.site_run("site-1", "id")
    assert len(parent.name) == len(run.name) == 250
    assert run.name.startswith("site-1 · nnn")
    assert len(database.tags(run.id)["mlflow.note.content"]) == 8000


def test_the_federation_run_is_the_parent_run(rig: Rig, entry: MakeEntry) -> None:
    site = rig.open("site-1")
    federation = rig.open("federation")
    federation.write([entry(0, Metrics({"mean/loss": 0.5})), entry(1, Params({"sites": 2}))])

    federation.finish(RunStatus.FINISHED)
    (parent,) = rig.database.parents()
    assert parent.status == "RUNNING"
    site.finish(RunStatus.FINISHED)

    (parent,) = rig.database.parents()
    assert (parent.name, parent.status, parent.end) == ("job-1", "FINISHED", 1_700_000_000_125)
    assert [key for key, *_ in rig.database.points(parent.id)] == ["mean/loss"]
    assert rig.database.params(parent.id) == {"sites": "2"}
    assert rig.database.tags(parent.id)["site"] == "federation"
    assert len(rig.database.runs()) == 2


def test_the_parent_run_ends_with_the_federation_run_if_that_is_last(rig: Rig, entry: MakeEntry) -> None:
    federation, site = rig.open("federation"), rig.open("site-1")
    federation.write([entry(8, Metrics({"mean/loss": 0.5}))])

    site.finish(RunStatus.FINISHED)
    assert rig.database.parents()[0].status == "RUNNING"
    federation.finish(RunStatus.FAILED)

    (parent,) = rig.database.parents()
    assert (parent.status, parent.end) == ("FAILED", 1_700_000_001_000)
    assert rig.database.site_run().status == "FINISHED"


def test_a_federation_run_goes_on_in_its_parent_run(make_rig: Callable[..., Rig], entry: MakeEntry) -> None:
    first = make_rig()
    first.open("federation").write([entry(0, Params({"a.b": 1}))])

    again = make_rig()
    run = again.open("federation", resume_from=1)
    run.write([entry(1, Params({"a": {"b": 2}}))])
    run.finish(RunStatus.FINISHED)

    (parent,) = again.database.parents()
    assert again.database.runs() == [parent]
    assert sorted(again.database.params(parent.id).values()) == ["1", "2"]


def test_a_deleted_federation_run_is_not_begun_anew_in_its_middle(
    make_rig: Callable[..., Rig], entry: MakeEntry
) -> None:
    rig = make_rig()
    rig.open("federation").write([entry(0, Metrics({"x": 0.0}))])
    (parent,) = rig.database.parents()
    with contextlib.closing(sqlite3.connect(rig.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE runs SET lifecycle_stage = 'deleted'")

    with pytest.raises(TransientError, match=f"mlflow runs restore --run-id {parent.id}"):
        make_rig().open("federation", resume_from=1)


def test_the_same_run_is_found_again_by_another_process(make_rig: Callable[..., Rig], entry: MakeEntry) -> None:
    first = make_rig()
    first.open().write([entry(0, Metrics({"x": 0.0}))])

    make_rig().open(resume_from=1, created=1.0).write([entry(1, Metrics({"x": 1.0}))])

    database = first.database
    assert len(database.runs()) == 2
    assert [value for _, _, value, _ in database.points(database.site_run().id)] == [0.0, 1.0]


def test_jobs_sites_and_sides_in_one_store_are_kept_apart(make_rig: Callable[..., Rig], entry: MakeEntry) -> None:
    uri = "sqlite:///shared.db"
    rigs = [
        make_rig(job=job, side=side, tracking_uri=uri)
        for job in ("job-1", "job's 2")
        for side in (Side.SERVER, Side.CLIENT)
    ]

    for value, rig in enumerate(rigs):
        rig.open().write([entry(0, Metrics({"x": float(value)}))])

    database = type(rigs[0].database)(rigs[0].workdir.parent / "shared.db")
    runs = [run for run in database.runs() if run.name.startswith("site-1 ")]
    assert sorted(database.points(run.id)[0][2] for run in runs) == [0.0, 1.0, 2.0, 3.0]
    assert len(database.parents("job-1")) == len(database.parents("job's 2")) == 1


@pytest.mark.parametrize(
    ("status", "stored"),
    [
        (RunStatus.FINISHED, "FINISHED"),
        (RunStatus.FAILED, "FAILED"),
        (RunStatus.ABORTED, "KILLED"),
        (RunStatus.KILLED, "KILLED"),
    ],
)
def test_a_run_ends_as_it_ended_at_the_time_of_its_last_record(
    rig: Rig, entry: MakeEntry, status: RunStatus, stored: str
) -> None:
    run = rig.open()
    run.write([entry(8, Metrics({"x": 0.0})), entry(9, Metrics({"x": 0.0}), time=1_700_000_000.5)])

    run.finish(status)

    (parent,) = rig.database.parents()
    ended = rig.database.site_run()
    assert (ended.status, ended.end) == (stored, 1_700_000_001_000)
    assert (parent.status, parent.end) == (stored, 1_700_000_001_000)


def test_the_parent_run_ends_with_the_last_of_its_runs(make_rig: Callable[..., Rig]) -> None:
    """Any receiver can be the last one. The parent run failed if one of its runs failed."""
    one, two = make_rig(), make_rig()
    first, second = one.open("site-1"), two.open("site-2")

    first.finish(RunStatus.FAILED)
    assert one.database.parents()[0].status == "RUNNING"
    second.finish(RunStatus.FINISHED)
    assert one.database.parents()[0].status == "FAILED"


def test_a_run_that_was_created_though_its_reply_was_lost_is_withdrawn_at_the_end(rig: Rig, entry: MakeEntry) -> None:
    run, other = rig.open("site-1"), rig.open("site-2")
    run.write([entry(0, Metrics({"x": 0.0}))])
    stored, (parent,) = rig.database.site_run("site-1"), rig.database.parents()
    store = SqliteStore(rig.workdir / "mlflow.db")
    tags = [Pair(RUN_TAG, rig.info("site-1").run_id), Pair(NESTING_TAG, parent.id), Pair(PENDING_TAG, "true")]
    late = store.create_run("1", "site-1", 1, tags)
    store.close()

    run.finish(RunStatus.FINISHED)
    other.finish(RunStatus.FINISHED)

    assert [run.id for run in rig.database.runs(deleted=True)] == [late.id]
    assert {run.status for run in rig.database.runs()} == {"FINISHED"}
    assert rig.database.site_run("site-1").id == stored.id


def test_receivers_with_different_parent_runs_end_with_one(make_rig: Callable[..., Rig]) -> None:
    """This happens if they create one at once, and one waits in vain for the other to settle its own."""
    one, two = make_rig(), make_rig()
    first = one.open("site-1")
    with contextlib.closing(sqlite3.connect(one.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE tags SET key = 'hidden' WHERE key = ?", (PARENT_TAG,))
    second = two.open("site-2", created=1_600_000_000.0)
    with contextlib.closing(sqlite3.connect(one.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE tags SET key = ? WHERE key = 'hidden'", (PARENT_TAG,))

    first.finish(RunStatus.FAILED)
    second.finish(RunStatus.FINISHED)

    database = one.database
    parent = database.parents()[0]
    assert [database.tags(database.site_run(site).id)[NESTING_TAG] for site in ("site-1", "site-2")] == [parent.id] * 2
    assert parent.status == "FAILED"


def test_a_late_site_or_a_replay_sets_the_runs_running_again(rig: Rig) -> None:
    rig.open().finish(RunStatus.FAILED)

    again = rig.open(resume_from=3)
    assert {run.status for run in rig.database.runs()} == {"RUNNING"}
    again.finish(RunStatus.FINISHED)
    assert {run.status for run in rig.database.runs()} == {"FINISHED"}


def test_records_for_a_run_that_somebody_deleted_wait(rig: Rig, entry: MakeEntry) -> None:
    run = rig.open()
    run_id = rig.database.site_run().id
    with contextlib.closing(sqlite3.connect(rig.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (run_id,))

    with pytest.raises(TransientError, match=f"mlflow runs restore --run-id {run_id}"):
        run.write([entry(0, Metrics({"x": 0.0}))])
    with contextlib.closing(sqlite3.connect(rig.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE runs SET lifecycle_stage = 'active' WHERE run_uuid = ?", (run_id,))
    assert run.write([entry(0, Metrics({"x": 0.0}))]) is None


def test_a_deleted_run_is_not_begun_anew_in_its_middle(
    make_rig: Callable[..., Rig], entry: MakeEntry, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig()
    rig.open().write([entry(0, Metrics({"x": 0.0}))])
    run_id = rig.database.site_run().id
    file = rig.workdir / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (run_id,))

    with pytest.raises(TransientError, match=f"mlflow runs restore --run-id {run_id}"):
        make_rig().open(resume_from=1)
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("DELETE FROM tags WHERE run_uuid = ?", (run_id,))
    make_rig().open(resume_from=1)

    assert "a new one begins at record 1" in caplog.text
    make_rig().open()
    assert len(rig.database.runs()) == 2


def test_a_deleted_experiment_is_a_wrong_configuration(rig: Rig) -> None:
    rig.backend.preflight()
    with contextlib.closing(sqlite3.connect(rig.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE experiments SET lifecycle_stage = 'deleted'")

    with pytest.raises(ConfigError, match="mlflow experiments restore --experiment-id 1"):
        rig.backend.preflight()
    with pytest.raises(TransientError, match="restore"):
        rig.open()


def test_the_store_is_created_whole_by_the_preflight(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(empty=True)

    rig.backend.preflight()

    assert os.listdir(rig.workdir) == ["mlflow.db"]
    assert rig.database.rows("SELECT name FROM experiments ORDER BY 1") == [("Default",), ("trackhub",)]
    assert rig.database.rows("PRAGMA integrity_check") == [("ok",)]


def test_a_file_that_is_no_store_is_a_wrong_configuration(rig: Rig) -> None:
    (rig.workdir / "mlflow.db").write_bytes(b"something else, which is longer than the header of an SQLite file" * 40)

    with pytest.raises(ConfigError, match="not an SQLite file"):
        rig.backend.preflight()


def test_a_store_of_another_mlflow_is_a_wrong_configuration(rig: Rig) -> None:
    with contextlib.closing(sqlite3.connect(rig.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '000000000000'")

    with pytest.raises(ConfigError, match="mlflow db upgrade"):
        rig.backend.preflight()


def test_nothing_is_held_once_the_backend_is_closed(rig: Rig, entry: MakeEntry) -> None:
    rig.backend.preflight()
    rig.backend.close()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    runs = [rig.open(f"site-{n}") for n in range(3)]

    for run in runs:
        run.write([entry(0, Metrics({"x": 0.0}))])
        run.finish(RunStatus.FINISHED)

    rig.backend.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)


def test_the_results_name_the_store_and_the_command_that_shows_it(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig("a receiver")
    rig.open()

    results = rig.backend.results(rig.info())

    assert results is not None
    assert results.url == (
        "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART"
    )
    assert results.path == "mlflow/mlflow.db"
    assert results.command == (
        "cd mlflow && mlflow ui --backend-store-uri sqlite:///mlflow.db --artifacts-destination ./mlartifacts"
    )


def test_the_stores_of_several_sites_can_be_looked_at_at_once(make_rig: Callable[..., Rig]) -> None:
    """A client's command lets MLflow take a free port, since the others' may be open on the same machine."""
    rig = make_rig("site-1", side=Side.CLIENT)
    rig.open()

    results = rig.backend.results(rig.info())

    assert results is not None
    assert str(results.command).endswith(" --port 0")
    assert results.url is None


def test_the_results_of_a_store_elsewhere_name_its_folder(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    beside, away = make_rig(tracking_uri="sqlite:///all.db"), make_rig(tracking_uri=f"sqlite:///{tmp_path}/a b/x.db")

    in_run_folder, outside = beside.backend.results(beside.info()), away.backend.results(away.info())

    assert in_run_folder is not None
    assert outside is not None
    assert in_run_folder.path == "all.db"
    assert str(in_run_folder.command).startswith("mlflow ui --backend-store-uri sqlite:///all.db ")
    assert outside.path == f"{tmp_path}/a b/x.db"
    assert str(outside.command).startswith(f"cd '{tmp_path}/a b' && mlflow ui --backend-store-uri sqlite:///x.db ")
