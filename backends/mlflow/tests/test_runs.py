# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from trackhub_mlflow.group import NESTING_TAG, PARENT_TAG, PENDING_TAG, RUN_TAG
from trackhub_mlflow.sqlite import SqliteStore
from trackhub_mlflow.store import Pair

from trackhub.spi import ConfigError, Entry, Metrics, RunStatus, Side, TransientError

if TYPE_CHECKING:
    from backends.mlflow.tests.conftest import Sink

MakeEntry = Callable[..., Entry]


def test_each_site_has_a_run_below_the_jobs_parent_run(sink: Sink) -> None:
    for site in ("site-1", "site-2", "server"):
        sink.open(site)

    database = sink.database
    (parent,) = database.parents()
    assert sorted(run.name for run in database.runs()) == ["job-1", "server", "site-1", "site-2"]
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


def test_options_name_the_experiment_and_describe_the_runs(make_sink: Callable[..., Sink]) -> None:
    sink = make_sink(experiment_name="cifar", run_tags={"team": "blue", "site": "x"}, note="**first** try")
    sink.open()

    database = sink.database
    for run in database.runs():
        tags = database.tags(run.id)
        assert run.experiment == "cifar"
        assert tags["team"] == "blue"
        assert tags["mlflow.note.content"] == "**first** try"
    assert database.tags(database.site_run().id)["site"] == "site-1"


def test_the_same_run_is_found_again_by_another_process(make_sink: Callable[..., Sink], entry: MakeEntry) -> None:
    first = make_sink()
    first.open().write([entry(0, Metrics({"x": 0.0}))])

    make_sink().open(resume_from=1, created=1.0).write([entry(1, Metrics({"x": 1.0}))])

    database = first.database
    assert len(database.runs()) == 2
    assert [value for _, _, value, _ in database.points(database.site_run().id)] == [0.0, 1.0]


def test_jobs_sites_and_sides_in_one_store_are_kept_apart(make_sink: Callable[..., Sink], entry: MakeEntry) -> None:
    uri = "sqlite:///shared.db"
    sinks = [
        make_sink(job=job, side=side, tracking_uri=uri)
        for job in ("job-1", "job's 2")
        for side in (Side.SERVER, Side.CLIENT)
    ]

    for value, sink in enumerate(sinks):
        sink.open().write([entry(0, Metrics({"x": float(value)}))])

    database = type(sinks[0].database)(sinks[0].workdir.parent / "shared.db")
    runs = [run for run in database.runs() if run.name == "site-1"]
    assert sorted(database.points(run.id)[0][2] for run in runs) == [0.0, 1.0, 2.0, 3.0]
    assert len(database.parents("job-1")) == len(database.parents("job's 2")) == 1


@pytest.mark.parametrize(
    ("status", "stored"),
    [(RunStatus.FINISHED, "FINISHED"), (RunStatus.FAILED, "FAILED"), (RunStatus.ABORTED, "KILLED")],
)
def test_a_run_ends_as_it_ended_at_the_time_of_its_last_record(
    sink: Sink, entry: MakeEntry, status: RunStatus, stored: str
) -> None:
    run = sink.open()
    run.write([entry(8, Metrics({"x": 0.0})), entry(9, Metrics({"x": 0.0}), time=1_700_000_000.5)])

    run.finish(status)

    (parent,) = sink.database.parents()
    ended = sink.database.site_run()
    assert (ended.status, ended.end) == (stored, 1_700_000_001_000)
    assert (parent.status, parent.end) == (stored, 1_700_000_001_000)


def test_the_parent_run_ends_with_the_last_of_its_runs(make_sink: Callable[..., Sink]) -> None:
    """Whichever sink that is, and failed if one of them failed."""
    one, two = make_sink(), make_sink()
    first, second = one.open("site-1"), two.open("site-2")

    first.finish(RunStatus.FAILED)
    assert one.database.parents()[0].status == "RUNNING"
    second.finish(RunStatus.FINISHED)
    assert one.database.parents()[0].status == "FAILED"


def test_a_run_that_was_created_though_its_reply_was_lost_is_withdrawn_at_the_end(sink: Sink, entry: MakeEntry) -> None:
    run, other = sink.open("site-1"), sink.open("site-2")
    run.write([entry(0, Metrics({"x": 0.0}))])
    stored, (parent,) = sink.database.site_run("site-1"), sink.database.parents()
    store = SqliteStore(sink.workdir / "mlflow.db")
    tags = [Pair(RUN_TAG, sink.info("site-1").run_id), Pair(NESTING_TAG, parent.id), Pair(PENDING_TAG, "true")]
    late = store.create_run("1", "site-1", 1, tags)
    store.close()

    run.finish(RunStatus.FINISHED)
    other.finish(RunStatus.FINISHED)

    assert [run.id for run in sink.database.runs(deleted=True)] == [late.id]
    assert {run.status for run in sink.database.runs()} == {"FINISHED"}
    assert sink.database.site_run("site-1").id == stored.id


def test_sinks_with_different_parent_runs_end_with_one(make_sink: Callable[..., Sink]) -> None:
    """As they have if they create one at once, and one waits in vain for the other's to settle."""
    one, two = make_sink(), make_sink()
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


def test_a_late_site_or_a_replay_sets_the_runs_running_again(sink: Sink) -> None:
    sink.open().finish(RunStatus.FAILED)

    again = sink.open(resume_from=3)
    assert {run.status for run in sink.database.runs()} == {"RUNNING"}
    again.finish(RunStatus.FINISHED)
    assert {run.status for run in sink.database.runs()} == {"FINISHED"}


def test_records_for_a_run_that_somebody_deleted_wait(sink: Sink, entry: MakeEntry) -> None:
    run = sink.open()
    run_id = sink.database.site_run().id
    with contextlib.closing(sqlite3.connect(sink.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (run_id,))

    with pytest.raises(TransientError, match=f"mlflow runs restore --run-id {run_id}"):
        run.write([entry(0, Metrics({"x": 0.0}))])
    with contextlib.closing(sqlite3.connect(sink.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE runs SET lifecycle_stage = 'active' WHERE run_uuid = ?", (run_id,))
    assert run.write([entry(0, Metrics({"x": 0.0}))]) is None


def test_a_deleted_run_is_not_begun_anew_in_its_middle(
    make_sink: Callable[..., Sink], entry: MakeEntry, caplog: pytest.LogCaptureFixture
) -> None:
    sink = make_sink()
    sink.open().write([entry(0, Metrics({"x": 0.0}))])
    run_id = sink.database.site_run().id
    file = sink.workdir / "mlflow.db"
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = ?", (run_id,))

    with pytest.raises(TransientError, match=f"mlflow runs restore --run-id {run_id}"):
        make_sink().open(resume_from=1)
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("DELETE FROM tags WHERE run_uuid = ?", (run_id,))
    make_sink().open(resume_from=1)

    assert "a new one begins at record 1" in caplog.text
    make_sink().open()
    assert len(sink.database.runs()) == 2


def test_a_deleted_experiment_is_a_wrong_configuration(sink: Sink) -> None:
    sink.backend.preflight()
    with contextlib.closing(sqlite3.connect(sink.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE experiments SET lifecycle_stage = 'deleted'")

    with pytest.raises(ConfigError, match="mlflow experiments restore --experiment-id 1"):
        sink.backend.preflight()
    with pytest.raises(TransientError, match="restore"):
        sink.open()


def test_the_store_is_created_whole_by_the_preflight(make_sink: Callable[..., Sink]) -> None:
    sink = make_sink(empty=True)

    sink.backend.preflight()

    assert os.listdir(sink.workdir) == ["mlflow.db"]
    assert sink.database.rows("SELECT name FROM experiments ORDER BY 1") == [("Default",), ("trackhub",)]
    assert sink.database.rows("PRAGMA integrity_check") == [("ok",)]


def test_a_file_that_is_no_store_is_a_wrong_configuration(sink: Sink) -> None:
    (sink.workdir / "mlflow.db").write_bytes(b"something else, which is longer than the header of an SQLite file" * 40)

    with pytest.raises(ConfigError, match="not an SQLite file"):
        sink.backend.preflight()


def test_a_store_of_another_mlflow_is_a_wrong_configuration(sink: Sink) -> None:
    with contextlib.closing(sqlite3.connect(sink.workdir / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '000000000000'")

    with pytest.raises(ConfigError, match="mlflow db upgrade"):
        sink.backend.preflight()


def test_nothing_is_held_once_the_backend_is_closed(sink: Sink, entry: MakeEntry) -> None:
    sink.backend.preflight()
    sink.backend.close()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    runs = [sink.open(f"site-{n}") for n in range(3)]

    for run in runs:
        run.write([entry(0, Metrics({"x": 0.0}))])
        run.finish(RunStatus.FINISHED)

    sink.backend.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)


def test_the_results_name_the_store_and_the_command_that_shows_it(make_sink: Callable[..., Sink]) -> None:
    sink = make_sink("a sink")
    sink.open()

    results = sink.backend.results(sink.info())

    assert results is not None
    assert results.url is None
    assert results.path == str(sink.workdir / "mlflow.db")
    folder, _, command = str(results.command).partition(" && ")
    assert folder == f"cd '{sink.workdir}'"
    assert command == "mlflow ui --backend-store-uri sqlite:///mlflow.db --artifacts-destination ./mlartifacts"
