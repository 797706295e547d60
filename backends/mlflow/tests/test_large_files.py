# SPDX-License-Identifier: Apache-2.0
"""A large file on a slow way to the server holds up no metrics, and its time limit follows the rate that was seen."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from trackhub_mlflow.upload_time_limit import UploadLimit

from tests.unit.readers_and_bad_backends import STREAM
from tests.unit.rigs import SITE, Bench, run_of
from trackhub.records import Artifact, Blob, Metrics, Record

if TYPE_CHECKING:
    from backends.mlflow.tests.conftest import Rig
    from tests.support.mlflow_server import Server

CONTENT = b"weights" * 100_000


class SlowLine(ThreadingHTTPServer):
    """A buffering proxy: it takes an upload at once, and passes it on when `passing` is set."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port
        self.uploads = 0
        self.passing = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: SlowLine
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "PUT":
            self.server.uploads += 1
            self.server.passing.wait(30)
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name not in ("Host", "Connection")}
        connection.request(self.command, self.path, body, headers)
        reply = connection.getresponse()
        data = reply.read()
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.headers.get("Content-Type", ""))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        connection.close()

    do_GET = do_POST = do_PUT = _pass_on

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def line(server: Server) -> Iterator[SlowLine]:
    slow = SlowLine(server.port)
    thread = threading.Thread(target=slow.serve_forever, daemon=True)
    thread.start()
    yield slow
    slow.passing.set()
    slow.shutdown()
    slow.server_close()


def wait_until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_metrics_are_confirmed_while_a_large_file_is_on_its_way(
    make_rig: Callable[..., Rig], line: SlowLine, server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"http://127.0.0.1:{line.server_address[1]}"
    rig = make_rig(empty=True, job=request.node.name, tracking_uri=url, timeout_s=5.0)
    bench = Bench(tmp_path / "bench", rig.job)
    blob = Blob(f"{STREAM}-5", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "application/octet-stream")
    folder = bench.folder / "blobs" / SITE
    folder.mkdir(parents=True)
    (folder / blob.name).write_bytes(CONTENT)
    metrics = [Record(i, 1_700_000_000.0 + i, i, None, Metrics({"loss": float(i)})) for i in range(11)]
    file = Record(5, 1_700_000_005.0, 5, None, Artifact("model.pt", blob, "model.pt"))
    bench.lane(rig.backend)
    bench.add([*metrics[:5], file, *metrics[6:]])

    # The file is at the proxy, which holds it back, and all metrics are at the server. Either may come first.
    wait_until(lambda: line.uploads and run_of(bench.journal.report(["memory"])).confirmed == 10)
    during = run_of(bench.journal.report(["memory"]))
    uploads = line.uploads
    line.passing.set()
    final = run_of(bench.finish(60.0))

    assert (during.confirmed, during.pending) == (10, 1)
    assert (final.confirmed, final.pending, final.state) == (11, 0, "finished")
    assert (uploads, line.uploads) == (1, 1)  # it was sent once, and not given up
    run_id = server.database.site_run(SITE, rig.job).id
    assert server.artifact(run_id, "model.step-5.pt") == CONTENT
    assert len(server.database.points(run_id)) == 10


def test_the_time_limit_follows_the_rate_that_was_seen() -> None:
    limit = UploadLimit()
    first_s = limit.seconds(8 << 20)
    limit.succeeded(8 << 20, 28.0)
    learned_s = limit.seconds(8 << 20)
    limit.timed_out()
    longer_s = limit.seconds(8 << 20)
    limit.succeeded(1000, 1.0)

    assert first_s > 100
    assert learned_s == pytest.approx(4 * 28.0)
    assert longer_s == pytest.approx(8 * 28.0)
    assert limit.seconds(8 << 20) == longer_s
