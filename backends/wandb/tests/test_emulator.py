# SPDX-License-Identifier: Apache-2.0
"""The emulator is strict: it notes whatever a server would refuse, so the tests that use it can trust it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.wandb_emulator import Emulator, Fault
from tests.support.wandb_emulator.state import Counting

UPSERT = """
mutation UpsertBucket($name: String, $project: String, $config: JSONString) {
    upsertBucket(input: {name: $name, modelName: $project, config: $config}) {
        bucket { id name historyLineCount project { name entity { name } } }
        inserted
    }
}"""
FILES = "wandb-history.jsonl"


@pytest.fixture
def server() -> Iterator[Emulator]:
    with Emulator() as emulator:
        yield emulator


def post(server: Emulator, path: str, body: Any, key: str | None = "k" * 40) -> tuple[int, Any]:
    """Send a request; return status and answer."""
    request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode())
    if key is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"api:{key}".encode()).decode())
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def upsert(server: Emulator) -> None:
    """Make the run ``r``."""
    assert post(server, "/graphql", {"query": UPSERT, "variables": {"name": "r", "project": "p"}})[0] == 200


def stream(server: Emulator, offset: int, rows: list[dict[str, Any]], **more: Any) -> int:
    """Send rows of the run ``r``; return the status."""
    content = [json.dumps(row) for row in rows]
    body = {"files": {FILES: {"offset": offset, "content": content}}, **more}
    return post(server, "/files/emulated-team/p/r/file_stream", body)[0]


def test_request_without_the_key_is_refused(server: Emulator) -> None:
    assert [post(server, "/graphql", {}, key)[0] for key in (None, "x" * 40)] == [401, 401]


def test_fields_are_answered_as_asked(server: Emulator) -> None:
    status, answer = post(server, "/graphql", {"query": UPSERT, "variables": {"name": "r", "project": "p"}})
    bucket = answer["data"]["upsertBucket"]["bucket"]
    assert (status, bucket["name"], bucket["historyLineCount"]) == (200, "r", 0)
    assert bucket["project"] == {"name": "p", "entity": {"name": "emulated-team"}}
    assert server.violations == []


@pytest.mark.parametrize(
    "query",
    [
        "query Unheard { viewer { id } }",
        "query Viewer { viewer { shoeSize } }",
        'query Viewer { viewer(name: "x") { id } }',
        "query Viewer { viewer }",
        "query Viewer { viewer { id { x } } }",
        'mutation UpsertBucket { upsertBucket(input: {colour: "red"}) { inserted } }',
        "nonsense",
    ],
)
def test_what_the_schema_does_not_have_is_a_violation(server: Emulator, query: str) -> None:
    assert post(server, "/graphql", {"query": query})[0] == 400
    assert len(server.violations) == 1


@pytest.mark.parametrize(("name", "status"), [("UpsertBucket", 200), (None, 200), ("", 400), ("Viewer", 400)])
def test_an_operation_name_must_be_that_of_the_document(server: Emulator, name: str | None, status: int) -> None:
    """An empty name is none either. Source: GraphQL specification of October 2021, 6.1."""
    body = {"query": UPSERT, "variables": {"name": "r", "project": "p"}, "operationName": name}
    assert post(server, "/graphql", body)[0] == status
    assert len(server.violations) == (status == 400)


@pytest.mark.parametrize(
    ("counting", "count"), [("right", 3), ("missing", None), ("zero", 0), ("lagging", 0), ("too high", 10)]
)
def test_rows_are_counted_as_asked(counting: Counting, count: int | None) -> None:
    with Emulator(counting=counting) as server:
        upsert(server)
        stream(server, 0, [{"_step": step} for step in range(3)])
        query = (
            "query TrackhubRunState($name: String!) "
            '{ model(name: "p") { bucket(name: $name, missingOk: true) { historyLineCount } } }'
        )
        _, answer = post(server, "/graphql", {"query": query, "variables": {"name": "r"}})

    assert answer["data"]["model"]["bucket"] == {"historyLineCount": count}


def test_offsets_of_the_history_are_enforced(server: Emulator) -> None:
    """Rows may be sent again, which is counted. A gap, other content, or a step that does not rise is a violation."""
    upsert(server)
    stream(server, 0, [{"_step": 0}, {"_step": 1}])
    stream(server, 1, [{"_step": 1}, {"_step": 2}])
    assert (len(server.state.run("r").rows), server.state.run("r").resent, server.violations) == (3, 1, [])
    stream(server, 5, [{"_step": 9}])
    stream(server, 2, [{"_step": 3}])
    stream(server, 3, [{"_step": 3}])
    assert [text.split(":")[0] for text in server.violations] == ["file_stream"] * 3


@pytest.mark.parametrize(("exit_code", "state"), [(0, "finished"), (3, "failed"), (254, "crashed")])
def test_exit_code_decides_the_state_of_an_ended_run(server: Emulator, exit_code: int, state: str) -> None:
    """Source: wandb/wandb pull request 12499."""
    upsert(server)
    stream(server, 0, [], complete=True, exitcode=exit_code)
    assert server.state.run("r").state == state


def test_run_that_has_ended_takes_no_rows_before_it_is_resumed(server: Emulator) -> None:
    upsert(server)
    stream(server, 0, [], complete=True, exitcode=3)
    assert (server.state.run("r").state, server.state.run("r").exit_code) == ("failed", 3)
    stream(server, 0, [{"_step": 0}])
    assert "has ended" in server.violations[0]
    upsert(server)
    assert server.state.run("r").state == "running"


def test_faults_happen_as_often_as_asked(server: Emulator) -> None:
    upsert(server)
    server.fail(Fault("file_stream", status=500, times=2, applied=True))
    assert [stream(server, 0, [{"_step": 0}]) for _ in range(3)] == [500, 500, 200]
    assert (len(server.state.run("r").rows), server.state.run("r").resent) == (1, 2)


def test_it_comes_back_on_the_same_port_with_what_it_held(server: Emulator) -> None:
    upsert(server)
    url = server.url
    server.stop()
    with pytest.raises(urllib.error.URLError):
        upsert(server)
    server.start()
    assert server.url == url
    assert "r" in server.state.runs


def test_it_runs_as_a_process() -> None:
    """It prints its address, and can be read back and made to fail over HTTP."""
    command = [sys.executable, "-m", "tests.support.wandb_emulator"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        about = json.loads(process.stdout.readline())
        fault = {"route": "graphql", "status": 503}
        request = urllib.request.Request(f"{about['url']}/_emulator/fail", json.dumps(fault).encode())
        urllib.request.urlopen(request).close()
        with urllib.request.urlopen(f"{about['url']}/_emulator/state") as answer:
            assert json.load(answer)["runs"] == {}
        process.stdin.close()
        assert process.wait(10) == 0
