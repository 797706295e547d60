# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import hashlib
import io
import json
import math
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image as Pillow

from trackhub.spi import (
    Artifact,
    ConfigError,
    Entry,
    Histogram,
    Image,
    Metrics,
    Params,
    Payload,
    RunStatus,
    Table,
    Tags,
    Text,
    TransientError,
)

if TYPE_CHECKING:
    from pathlib import Path

    from backends.mlflow.tests.conftest import Rig
    from tests.support.mlflow_server import Server

MakeEntry = Callable[..., Entry]
T0_MS = 1_700_000_000_000


@pytest.fixture
def remote(make_rig: Callable[..., Rig], server: Server, request: pytest.FixtureRequest) -> Callable[..., Rig]:
    """Makes receivers on the server, in a job of the test's own."""

    def make(**options: Any) -> Rig:
        return make_rig(empty=True, job=request.node.name, tracking_uri=server.url, **options)

    return make


def run_of(server: Server, rig: Rig, site: str = "site-1") -> Any:
    """Return a site's run as the REST API gives it."""
    return server.call(f"runs/get?run_id={server.database.site_run(site, rig.job).id}")["run"]


def history(server: Server, run: Any, key: str) -> list[tuple[int, Any, int]]:
    reply = server.call(f"metrics/get-history?run_id={run['info']['run_id']}&metric_key={key}")
    return [(metric["step"], metric["value"], metric["timestamp"]) for metric in reply["metrics"]]


def test_a_server_stores_every_kind(remote: Callable[..., Rig], server: Server, entry: MakeEntry) -> None:
    rig = remote(note="a note")
    buffer = io.BytesIO()
    Pillow.new("L", (8, 8)).save(buffer, "PNG")
    payloads: list[Payload] = [
        Metrics({"train/loss": 0.25, "größe: a b": 3.0}),
        Metrics({"odd": math.nan}),
        Metrics({"odd": math.inf}),
        Params({"opt": {"lr": 0.1}, "long": "ü" * 6001}),
        Tags({"phase": "one", "site": "x"}),
        Text("val/größe: a", "# hello"),
        Image("val/grid", rig.blob("image", buffer.getvalue()), 8, 8),
        Histogram("h", [0.0, 1.0], [1.0]),
        Table("t", ["a"], [[1]]),
        Artifact("models: é/best 1.pt", rig.blob("artifact", b"content"), "best.pt"),
    ]
    rig.backend.preflight()
    run = rig.open()

    assert run.write([entry(n, payload, 2**60 + n) for n, payload in enumerate(payloads)]) is None
    run.finish(RunStatus.FINISHED)

    stored = run_of(server, rig)
    data, run_id = stored["data"], stored["info"]["run_id"]
    tags = {tag["key"]: tag["value"] for tag in data["tags"]}
    params = {param["key"]: param["value"] for param in data["params"]}
    assert history(server, stored, "train/loss") == [(2**60, 0.25, T0_MS)]
    assert [value for _, value, _ in history(server, stored, "odd")] == ["NaN", 1.7976931348623157e308]
    assert params["opt.lr"] == "0.1"
    assert (tags["phase"], tags["site"], tags["mlflow.note.content"]) == ("one", "site-1", "a note")
    assert (stored["info"]["run_name"], stored["info"]["status"]) == (f"site-1 · {rig.job}", "FINISHED")
    step = f"step-{2**60 + 5:08d}"
    assert server.artifact(run_id, f"text/val~größe_x003A_ a/{step}-p5.md") == b"# hello"
    assert server.artifact(run_id, f"models_x003A_ é/best 1.step-{2**60 + 9}.pt") == b"content"
    assert server.artifact(run_id, params["long"].rpartition("artifact ")[2].rstrip(")")).decode() == "ü" * 6001
    files = server.call(f"artifacts/list?run_id={run_id}&path=images")["files"]
    assert len(files) == 2
    parent = server.call(f"runs/get?run_id={tags['mlflow.parentRunId']}")["run"]["info"]
    assert (parent["run_name"], parent["status"]) == (rig.job, "FINISHED")
    results = rig.backend.results(rig.info())
    assert results is not None
    assert (
        results.url == f"{server.url}/#/experiments/{stored['info']['experiment_id']}/runs/{run_id}/model-metrics"
        "?workflowType=machine_learning"
    )


def test_redelivery_to_a_server_changes_nothing(remote: Callable[..., Rig], server: Server, entry: MakeEntry) -> None:
    def batch(rig: Rig) -> list[Entry]:
        payloads: list[Payload] = [Metrics({"x": value}) for value in (1.0, math.nan, math.inf, 1.0)]
        payloads += [Params({"a": {"b": 1}}), Tags({"t": "1"}), Tags({"t": "2"}), Table("t", ["a"], [[1]])]
        payloads += [Artifact("m.pt", rig.blob(f"b{n}", bytes([n % 2])), "m.pt") for n in range(3)]
        return [entry(n, payload, 1, 1_700_000_000.0) for n, payload in enumerate(payloads)]

    def state(rig: Rig) -> object:
        run = server.database.site_run(job=rig.job)
        files = server.call(f"artifacts/list?run_id={run.id}")["files"]
        database = server.database
        return run, database.points(run.id), database.params(run.id), database.tags(run.id), files

    first = remote()
    first.open().write(batch(first))
    before = state(first)
    for resume_from in (0, 5, 9):
        rig = remote()
        assert rig.open(resume_from=resume_from).write(batch(rig)[resume_from:]) is None

    assert state(first) == before


def test_an_outage_is_met_at_once_and_costs_nothing(
    remote: Callable[..., Rig], server: Server, entry: MakeEntry
) -> None:
    rig = remote()
    run = rig.open()
    batch = [entry(n, Metrics({"x": float(n)})) for n in range(1500)]
    run.write(batch[:500])
    server.kill()

    began = time.monotonic()
    with pytest.raises(TransientError, match="cannot be reached"):
        run.write(batch[400:])
    with pytest.raises(TransientError, match="cannot be reached"):
        run.finish(RunStatus.FINISHED)
    with pytest.raises(TransientError, match="cannot be reached"):
        remote().open("site-2")
    with pytest.raises(TransientError, match="cannot be reached"):
        remote().backend.preflight()
    waited_s = time.monotonic() - began
    server.start()
    run.write(batch[400:])
    run.finish(RunStatus.FINISHED)

    assert waited_s < 15
    points = server.database.points(server.database.site_run(job=rig.job).id)
    assert sorted((step, value, ms) for _, step, value, ms in points) == [
        (n, float(n), T0_MS + n * 125) for n in range(1500)
    ]


def test_a_server_that_hangs_is_given_up_after_the_timeout(
    make_rig: Callable[..., Rig], httpserver: Any, entry: MakeEntry
) -> None:
    """The user's settings for MLflow's own client stay as they are, and play no part."""
    release = threading.Event()
    httpserver.expect_request("/api/2.0/mlflow/experiments/get-by-name").respond_with_handler(
        lambda _: release.wait(30) and None
    )
    rig = make_rig(tracking_uri=httpserver.url_for(""), timeout_s=0.3)
    environment = dict(os.environ)

    began = time.monotonic()
    with pytest.raises(TransientError, match=r"does not answer within 0\.3 s"):
        rig.open()
    release.set()

    assert time.monotonic() - began < 10
    assert dict(os.environ) == environment


EXPERIMENT = {"experiment": {"experiment_id": "1", "name": "trackhub", "lifecycle_stage": "active"}}


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, "You are not authenticated", "MLFLOW_TRACKING_TOKEN"),
        (403, {"error_code": "PERMISSION_DENIED", "message": "no"}, "refuses access"),
        (404, "<html>nothing here</html>", "as an MLflow server does"),
        (200, "<html>a login page</html>", "as an MLflow server does"),
        (200, "[]", "as an MLflow server does"),
        (304, json.dumps({"experiment": {"experiment_id": "1", "name": "trackhub"}}), "as an MLflow server does"),
    ],
)
def test_what_only_a_person_can_mend_stops_the_job_before_training(
    make_rig: Callable[..., Rig], httpserver: Any, status: int, body: Any, said: str
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    httpserver.expect_request("/api/2.0/mlflow/experiments/get-by-name").respond_with_data(text, status)
    rig = make_rig(tracking_uri=httpserver.url_for(""))

    with pytest.raises(ConfigError, match=said):
        rig.backend.preflight()
    with pytest.raises(TransientError, match=said):
        rig.open()


@pytest.mark.parametrize(
    ("status", "retry_after", "expected"),
    [(429, "7", 7.0), (503, "Wed, 21 Oct 2015 07:28:00 GMT", 0.0), (500, None, None), (502, "soon", None)],
)
def test_an_overloaded_server_is_given_the_time_that_it_asks_for(
    make_rig: Callable[..., Rig], httpserver: Any, status: int, retry_after: str | None, expected: float | None
) -> None:
    headers = {"Retry-After": retry_after} if retry_after else {}
    request = httpserver.expect_request("/api/2.0/mlflow/experiments/get-by-name")
    request.respond_with_data("busy", status, headers)
    rig = make_rig(tracking_uri=httpserver.url_for(""))

    with pytest.raises(TransientError, match=f"HTTP {status}: busy") as caught:
        rig.backend.preflight()

    assert caught.value.retry_after_s == expected
    assert len(httpserver.log) == 1


def test_the_login_is_that_of_mlflows_client(
    make_rig: Callable[..., Rig], httpserver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    httpserver.expect_request("/api/2.0/mlflow/experiments/get-by-name").respond_with_json(EXPERIMENT)
    url = httpserver.url_for("")

    def authorization(uri: str = url) -> str | None:
        make_rig(tracking_uri=uri).backend.preflight()
        header: str | None = httpserver.log[-1][0].headers.get("Authorization")
        return header

    assert authorization() is None
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-1")
    monkeypatch.setenv("MLFLOW_WORKSPACE", "lab")
    assert authorization() == "Bearer token-1"
    assert httpserver.log[-1][0].headers["X-MLFLOW-WORKSPACE"] == "lab"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pass")
    assert authorization() == "Basic bWU6cGFzcw=="
    assert authorization(url.replace("://", "://you:p%40ss@")) == "Basic eW91OnBAc3M="


def test_what_a_server_refuses_is_narrowed_down_to_its_record(
    make_rig: Callable[..., Rig], httpserver: Any, entry: MakeEntry
) -> None:
    """As an older server may, which allows less than this client knows of."""
    from werkzeug import Request, Response

    stored: list[str] = []

    def log_batch(request: Request) -> Response:
        keys = [metric["key"] for metric in json.loads(request.data)["metrics"]]
        if any(":" in key for key in keys):
            reply = {"error_code": "INVALID_PARAMETER_VALUE", "message": "Names may only contain …"}
            return Response(json.dumps(reply), 400, content_type="application/json")
        stored.extend(keys)
        return Response("{}", content_type="application/json")

    run = {"info": {"run_id": "r", "experiment_id": "1", "artifact_uri": "mlflow-artifacts:/1/r"}}
    api = "/api/2.0/mlflow"
    httpserver.expect_request(f"{api}/experiments/get-by-name").respond_with_json(EXPERIMENT)
    found = {"runs": [run | {"data": {"tags": [{"key": "mlflow.parentRunId", "value": "r"}]}}]}
    httpserver.expect_request(f"{api}/runs/search").respond_with_json(found)
    httpserver.expect_request(f"{api}/runs/get").respond_with_json({"run": run})
    httpserver.expect_request(f"{api}/runs/log-batch").respond_with_handler(log_batch)
    opened = make_rig(tracking_uri=httpserver.url_for("")).open()

    report = opened.write([entry(n, Metrics({f"k{n}": 0.0, f"a:{n}": 0.0} if n in (3, 8) else {f"k{n}": 0.0}))
                           for n in range(20)])  # fmt: skip

    assert report is not None
    assert [(r.position, r.reason) for r in report.rejected] == [(3, "refused_by_mlflow"), (8, "refused_by_mlflow")]
    assert "'a:3'" in report.rejected[0].detail
    assert sorted(stored) == sorted(f"k{n}" for n in range(20))


def test_artifacts_on_another_machine_are_a_wrong_configuration(
    make_rig: Callable[..., Rig], httpserver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trackhub_mlflow.backend._LOOPBACK", frozenset[str]())
    experiment = EXPERIMENT["experiment"] | {"artifact_location": "/home/server/mlruns/1"}
    request = httpserver.expect_request("/api/2.0/mlflow/experiments/get-by-name")
    request.respond_with_json({"experiment": experiment})

    with pytest.raises(ConfigError, match="--serve-artifacts"):
        make_rig(tracking_uri=httpserver.url_for("")).backend.preflight()


def test_artifacts_in_a_shared_folder_are_written_there(
    remote: Callable[..., Rig], server: Server, entry: MakeEntry, tmp_path: Path
) -> None:
    root = tmp_path / "shared"
    server.call("experiments/create", {"name": "shared", "artifact_location": str(root)})
    rig = remote(experiment_name="shared")

    rig.open().write([entry(0, Artifact("a/b.bin", rig.blob("b", b"content"), "b.bin"), 0), entry(1, Text("t", "x"))])

    run_id = server.database.site_run(job=rig.job).id
    digest = hashlib.sha256(b"content").hexdigest()
    assert hashlib.sha256((root / run_id / "artifacts" / "a" / "b.bin").read_bytes()).hexdigest() == digest
    assert server.artifact(run_id, "a/b.bin") == b"content"


def test_no_connection_is_held_once_the_backend_is_closed(remote: Callable[..., Rig], entry: MakeEntry) -> None:
    rig = remote()
    rig.backend.preflight()
    rig.backend.close()
    gc.collect()  # what other tests left open is not closed meanwhile
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    run = rig.open()

    run.write([entry(0, Metrics({"x": 0.0}))])
    run.finish(RunStatus.FINISHED)

    rig.backend.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
