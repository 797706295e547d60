# SPDX-License-Identifier: Apache-2.0
"""A tracking server on loopback that fails as told: ``python -m tests.faults.failing_server PORT FOLDER``.

``FOLDER/mode`` says how it fails. It keeps each record once, by its position, in ``FOLDER/<run>.jsonl``. For each
request it writes one line into ``FOLDER/requests``: monotonic time, path and status. `Http` in
`tests.faults.faulty_backends` is its client.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

__all__: list[str] = []


class Handler(BaseHTTPRequestHandler):
    folder: Path
    writes = 0
    known: dict[str, set[int]] = {}
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mode, _, number = (self.folder / "mode").read_text().partition(" ")
        with self.lock:
            status, reply = self._decide(mode, int(number or 0), body)
            with (self.folder / "requests").open("a") as file:
                file.write(f"{time.monotonic()} {self.path} {status}\n")
        if status == 0:
            threading.Event().wait()
        data = json.dumps(reply).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _decide(self, mode: str, number: int, body: dict[str, object]) -> tuple[int, dict[str, object]]:
        """Return the status and the reply. Status 0 means that the request is never replied to."""
        if self.path == "/finish":
            (self.folder / f"{body['run']}.status").write_text(str(body["status"]))
        if self.path != "/write":
            return 200, {}
        type(self).writes += 1
        now = number and self.writes % number == 0
        if mode == "busy" and now:
            return 429, {}
        if mode == "hang" and now:
            return 0, {}
        lines = body["lines"]
        assert isinstance(lines, list)
        rejected = [line["position"] for line in lines if mode == "reject" and line["position"] % number == 0]
        self._store(str(body["run"]), [line for line in lines if line["position"] not in rejected])
        if mode == "slow":
            time.sleep(len(lines) * number / 1000)
        if mode == "fail" and now:
            return 500, {}
        return 200, {"rejected": rejected}

    def _store(self, run: str, lines: list[dict[str, int]]) -> None:
        path = self.folder / f"{run}.jsonl"
        if run not in self.known:
            self.known[run] = set()
            if path.exists():
                self.known[run] = {json.loads(line)["position"] for line in path.read_text().splitlines()}
        known = self.known[run]
        with path.open("a") as file:
            for line in lines:
                if line["position"] not in known:
                    file.write(json.dumps(line) + "\n")
        known.update(line["position"] for line in lines)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the file has all requests."""


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[2])
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.daemon_threads = True
    (Handler.folder / "port").write_text(str(server.server_port))
    print(json.dumps("ready"), flush=True)
    server.serve_forever()
