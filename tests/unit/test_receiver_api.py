# SPDX-License-Identifier: Apache-2.0
"""docs/receiver-api.md: its files carry the records of two sites over HTTP, and its names are the public ones.

Nothing here reads with trackhub's own code: the records come from the backend's files, by the standard library.
"""

from __future__ import annotations

import http.client
import inspect
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import trackhub.delivery
from tests.unit.readers_and_bad_backends import WAIT_S, batch_of, frames_in, metric, new_spool
from trackhub.delivery import MAX_REQUEST_BYTES, Limits, wire
from trackhub.records import MAX_STEP
from trackhub.spool.reading import SpoolReader

PAGE = Path(__file__).resolve().parents[2] / "docs" / "receiver-api.md"
FILE = re.compile(r"```python\n# (?P<name>\w+\.py)\n(?P<code>.*?)```", re.DOTALL)
TOKENS = {"token-of-site-1": "site-1", "token-of-site-2": "site-2"}

# A training script that waits half-way for a line on standard input, so that its sender can be killed meanwhile.
WAITING = """
import sys, trackhub
with trackhub.Writer() as writer:
    for step in range(200):
        if step == 100:
            sys.stdin.readline()
        writer.log({"train/loss": 1 / (step + 1)}, step)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's files, and the training script above."""
    names = []
    for found in FILE.finditer(PAGE.read_text(encoding="utf-8")):
        (tmp_path / found["name"]).write_text(found["code"], encoding="utf-8")
        names.append(found["name"])
    assert names == ["run_receiver.py", "run_site.py", "train.py"]
    (tmp_path / "wait.py").write_text(WAITING, encoding="utf-8")
    return tmp_path


def start(folder: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "no_proxy": "*", **environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


class Server:
    """A process that runs the page's receiver."""

    def __init__(self, folder: Path, port: str = "0") -> None:
        self._folder = folder
        self._process = start(folder, "run_receiver.py", "run", port, SITE_TOKENS=json.dumps(TOKENS))
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        self.port = self.url.rpartition(":")[2]

    def site(self, site: str, *command: str) -> subprocess.Popen[str]:
        """Start the page's sender for a site."""
        token = next(token for token, name in TOKENS.items() if name == site)
        return start(self._folder, "run_site.py", site, site, self.url, sys.executable, *command, SITE_TOKEN=token)

    def post(self, body: bytes, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=WAIT_S)
        try:
            connection.request("POST", "/site-2", body, headers)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def finish(self) -> str:
        """End the job, and return what the receiver printed."""
        printed, _ = self._process.communicate(timeout=4 * WAIT_S)
        assert self._process.returncode == 0
        return printed

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def stored(self, site: str) -> list[dict[str, Any]]:
        path = self._folder / "run" / "jsonl" / "job-1" / f"{site}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["kind"] == "metrics"]

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self._folder / "run" / "trackhub" / "delivery.json").read_text())
        return report


@contextmanager
def running(folder: Path, port: str = "0") -> Iterator[Server]:
    server = Server(folder, port)
    try:
        yield server
    finally:
        server.close()


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what other processes write to a file, which gives no event."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_sites_of_which_one_is_killed_deliver_each_record_once(folder: Path) -> None:
    with running(folder) as server, ExitStack() as ends:
        first = ends.enter_context(server.site("site-1", "train.py", "0", "500"))
        killed = ends.enter_context(server.site("site-2", "wait.py"))
        wait_until(lambda: server.stored("site-2"))
        assert killed.poll() is None

        killed.kill()  # its training goes on, and ends with the pipe that it shares with this test
        killed.communicate("\n", timeout=WAIT_S)
        again = ends.enter_context(server.site("site-2", "train.py", "200", "500"))

        for process, site, count in ((first, "site-1", 500), (again, "site-2", 500)):
            printed, _ = process.communicate(timeout=4 * WAIT_S)
            assert (process.returncode, printed) == (0, f"{site}: {count} of {count} records are at the receiver\n")
        table = server.finish()

        for site in TOKENS.values():
            values = [(line["step"], line["values"]["train/loss"]) for line in server.stored(site)]
            assert values == [(step, 1 / (step + 1)) for step in range(500)]
        report = server.report()
        assert (report["status"], report["balanced"]) == ("finished", True)
        assert [report["sites"][site]["final"] for site in TOKENS.values()] == [True, True]
        assert [report["lanes"]["jsonl"][site]["confirmed"] for site in TOKENS.values()] == [500, 500]
        assert "DO NOT ADD UP" not in table
        assert "site-2" in table


def test_a_receiver_that_is_killed_and_started_again_has_each_record_once(folder: Path) -> None:
    with running(folder) as server:
        site = server.site("site-1", "wait.py")
        wait_until(lambda: server.stored("site-1"))
        server.close()
    with running(folder, server.port) as server, site:
        printed, _ = site.communicate("\n", timeout=4 * WAIT_S)
        server.post(wire.encode(wire.Final(wire.SiteCounts())), Authorization="Bearer token-of-site-2")
        server.finish()

        assert printed == "site-1: 200 of 200 records are at the receiver\n"
        assert [line["step"] for line in server.stored("site-1")] == list(range(200))
        assert server.report()["balanced"]


def test_the_server_takes_the_site_from_the_token_and_from_nothing_else(folder: Path) -> None:
    batch = wire.encode(batch_of([metric(0)]))
    with running(folder) as server:
        claims = {"Site": "site-2", "X-Forwarded-User": "site-2"}

        status, reply = server.post(batch, Authorization="Bearer token-of-site-1", **claims)

        assert (status, wire.decode_reply(reply)) == (200, wire.Accepted())
        for authorization in ("", "Bearer ", "Bearer site-2", "token-of-site-2x"):
            assert server.post(batch, Authorization=authorization, **claims)[0] == 401
        assert server.post(batch, **claims)[0] == 401
        for token in TOKENS:
            server.post(wire.encode(wire.Final(wire.SiteCounts())), Authorization=f"Bearer {token}")
        server.finish()
        assert (len(server.stored("site-1")), len(server.stored("site-2"))) == (1, 0)


def test_the_server_answers_a_body_that_no_sender_makes_with_an_error(folder: Path) -> None:
    with running(folder) as server:
        for length in (str(MAX_REQUEST_BYTES + 1), "-1"):
            headers = {"Authorization": "Bearer token-of-site-1", "Content-Length": length}
            assert server.post(b"", **headers)[0] == 413


def test_no_request_is_larger_than_the_limit_that_servers_are_told(tmp_path: Path) -> None:
    limits = Limits(batch_bytes=8 << 20, batch_records=100_000)
    spool = new_spool(tmp_path / "spool")
    with trackhub.Writer(spool) as writer:
        for i in range(12):
            writer.log_text("note", "x" * ((1 << 20) - 200), i)

    reader = SpoolReader(spool, "server")
    batch = reader.next_batch(limits.batch_records, limits.batch_bytes, final=True)

    assert batch is not None
    assert len(frames_in(batch.frames)) < 12
    assert len(batch.frames) > 7 << 20
    stream, largest = "f" * 32, bytes(limits.batch_bytes)
    requests: list[wire.Request] = [
        wire.Batch(stream, 0, MAX_STEP, limits.batch_records, batch.frames),
        wire.Batch(stream, 0, MAX_STEP, limits.batch_records, largest),
        wire.Chunk(f"{stream}-{MAX_STEP}", 1 << 50, "f" * 64, 1 << 50, largest),
    ]
    assert all(len(wire.encode(request)) <= MAX_REQUEST_BYTES for request in requests)


def test_a_refusal_is_a_reply_that_a_sender_understands() -> None:
    reply = trackhub.delivery.refusal("no_receiver", "none was configured")

    assert wire.decode_reply(reply) == wire.Refused("no_receiver", "none was configured")


def test_the_public_names_are_those_in_all_and_each_is_there() -> None:
    names = trackhub.delivery.__all__

    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(trackhub.delivery._MODULE_OF)
    assert [name for name in names if getattr(trackhub.delivery, name, None) is None] == []
    assert dir(trackhub.delivery) == sorted(names)
    with pytest.raises(AttributeError, match="nonsense"):
        trackhub.delivery.nonsense  # noqa: B018


def test_every_public_name_says_what_it_is() -> None:
    public = {name: getattr(trackhub.delivery, name) for name in trackhub.delivery.__all__}

    callables = {name: value for name, value in public.items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert len(callables) > 15
    assert [name for name, value in callables.items() if not value.__doc__] == []


def test_a_site_loads_neither_the_receiver_nor_a_database() -> None:
    code = "import sys; from trackhub.delivery import Sender; print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=True)

    loaded = set(done.stdout.split())
    assert "trackhub.delivery.sender" in loaded
    assert loaded.isdisjoint({"sqlite3", "trackhub.delivery.receiver", "trackhub.registry"})
