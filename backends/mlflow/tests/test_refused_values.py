# SPDX-License-Identifier: Apache-2.0
"""A value that the database refuses costs its own record, also where MLflow calls the refusal an internal error."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from backends.mlflow.tests.conftest import make_entry
from tests.unit.rigs import SITE, Bench, run_of
from trackhub.records import Record
from trackhub.spi import Entry, Metrics, Params, Payload, RunStatus, Summary, Tags, Text, TransientError

if TYPE_CHECKING:
    from backends.mlflow.tests.conftest import Rig
    from tests.support.mlflow_server import Database, Server

_TRIGGER = (
    "CREATE TRIGGER refuse_{0} BEFORE INSERT ON {0} WHEN NEW.value LIKE '%poison%' "
    "BEGIN SELECT abs(-9223372036854775808); END"  # it overflows; after RAISE, MLflow tries again for minutes
)


def execute(file: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(file, timeout=20)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


@contextlib.contextmanager
def refusing(file: Path) -> Iterator[None]:
    """Have a database refuse params and tags that hold the word "poison", as PostgreSQL refuses a NUL."""
    execute(file, _TRIGGER.format("params"), _TRIGGER.format("tags"))
    try:
        yield
    finally:
        execute(file, "DROP TRIGGER refuse_params", "DROP TRIGGER refuse_tags")


@pytest.fixture(params=["file", "server"])
def place(request: pytest.FixtureRequest, make_rig: Callable[..., Rig]) -> tuple[Rig, Database, Path]:
    """A receiver's backend, its database, and the database's file: the job's own, or that of a server."""
    if request.param == "file":
        rig = make_rig()
        return rig, rig.database, rig.workdir / "mlflow.db"
    server: Server = request.getfixturevalue("server")
    rig = make_rig(empty=True, job=request.node.name, tracking_uri=server.url)
    return rig, server.database, server.folder / "mlflow.db"


def records(*payloads: Payload) -> list[Record]:
    return [Record(i, 1_700_000_000.0 + i, i, None, payload) for i, payload in enumerate(payloads)]


@pytest.mark.parametrize("first", [True, False], ids=["first records", "last records"])
def test_params_and_tags_that_the_database_refuses_are_rejected_by_name(
    place: tuple[Rig, Database, Path], tmp_path: Path, first: bool
) -> None:
    rig, database, file = place
    bad: list[Payload] = [Tags({"note": "poison"}), Params({"name": "poison", "lr": 0.1})]
    good: list[Payload] = [Metrics({"loss": float(i)}) for i in range(60)]
    bench = Bench(tmp_path / "bench", rig.job)
    bench.add(records(*(bad + good if first else good + bad)), SITE)
    with refusing(file):
        bench.lane(rig.backend)
        report = run_of(bench.finish(60.0))

    run = database.site_run(SITE, rig.job)
    assert (report.rejected, report.confirmed, report.pending) == ({"backend_error": 2}, 60, 0)
    assert sorted(value for _, _, value, _ in database.points(run.id)) == [float(i) for i in range(60)]
    assert (run.status, "note" in database.tags(run.id)) == ("FINISHED", False)


def test_a_nul_is_stored_as_its_symbol(place: tuple[Rig, Database, Path], tmp_path: Path) -> None:
    rig, database, _ = place
    bench = Bench(tmp_path / "bench", rig.job)
    payloads: list[Payload] = [
        Params({"p": {"q": "a\0b"}, "list": ["a\0b"]}),
        Tags({"t": "a\0b"}),
        Text("x", "a\0b"),
    ]
    bench.add(records(*payloads), SITE)
    bench.lane(rig.backend)
    report = run_of(bench.finish(60.0))

    run = database.site_run(SITE, rig.job)
    params, tags = database.params(run.id), database.tags(run.id)
    assert (report.rejected, report.confirmed) == ({}, 3)
    assert params["p.q"] == "a␀b"
    assert tags["t"] == "a␀b"
    assert not any("\0" in value for value in (*params.values(), *tags.values()))


def test_the_advice_for_a_deleted_experiment_restores_it_and_its_runs(make_rig: Callable[..., Rig]) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    rig = make_rig()
    run = rig.open()
    entries = [make_entry(0, Metrics({"a": 1.0}))]
    run.write(entries)
    held = rig.database.site_run()
    store = SqlAlchemyStore(f"sqlite:///{rig.workdir}/mlflow.db", "mlflow-artifacts:/")
    experiment = store.get_experiment_by_name("trackhub").experiment_id
    store.delete_experiment(experiment)

    with pytest.raises(TransientError, match=f"mlflow experiments restore --experiment-id {experiment}"):
        run.write(entries)
    store.restore_experiment(experiment)
    run.write(entries)
    run.finish(RunStatus.FINISHED)

    assert rig.database.site_run().status == "FINISHED"
    assert rig.database.site_run().id == held.id


def test_a_dead_proxy_is_named_as_a_proxy(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    rig = make_rig(empty=True, tracking_uri="http://mlflow.example.org:5000")

    with pytest.raises(TransientError, match=r"the proxy on the way to MLflow server .* HTTPS_PROXY"):
        rig.backend.preflight()


@pytest.mark.parametrize(
    "many",
    [
        Params({f"p{i}": {f"k{j}": j for j in range(100)} for i in range(101)}),
        Tags({f"t{i}": "" for i in range(10_001)}),
        Summary({f"s{i}": 1.0 for i in range(10_001)}),
    ],
    ids=["params", "tags", "final values"],
)
def test_a_record_with_more_names_than_a_run_may_have_is_rejected(
    rig: Rig, entry: Callable[..., Entry], many: Payload
) -> None:
    """400,000 params of one site held up all runs for minutes."""
    rig.backend.preflight()
    run = rig.open()
    batch = [entry(0, Params({"lr": 0.1})), entry(1, many), entry(2, Tags({"stage": "pilot"}))]

    reports = [run.write(batch), run.write(batch)]  # the second time as after an outage

    for report in reports:
        assert report is not None
        assert [(one.position, one.reason) for one in report.rejected] == [(1, "too_many_keys")]
    run.finish(RunStatus.FINISHED)
    with contextlib.closing(sqlite3.connect(rig.workdir / "mlflow.db")) as store:
        assert store.execute("SELECT key FROM params").fetchall() == [("lr",)]
        assert store.execute("SELECT count(*) FROM tags WHERE key = 'stage'").fetchone() == (1,)
