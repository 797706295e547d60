# SPDX-License-Identifier: Apache-2.0
"""The emulator's HTTP server: routes, login and injected faults.

Tests use `Emulator` and `Fault`. It answers from `State`.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from tests.support.wandb_emulator.graphql import GraphQLError, parse
from tests.support.wandb_emulator.state import OPERATIONS, SDK_UNNAMED, Counting, State

__all__ = ["Emulator", "Fault", "Route"]

Route = Literal["graphql", "file_stream", "upload"]


@dataclass
class Fault:
    """How the next requests of one route fail.

    Attributes:
        route: which requests fail.
        times: how many of them.
        status: the HTTP status of the reply. 0 resets the connection, 200 replies as usual.
        retry_after_s: value of the ``Retry-After`` header; None sends no such header.
        applied: whether the server carries the request out before the fault hides the reply.
        delay_s: how long the server waits before the reply.
        operation: for ``graphql``, the name of the operations that fail; None for all.
    """

    route: Route
    times: int = 1
    status: int = 500
    retry_after_s: float | None = None
    applied: bool = False
    delay_s: float = 0.0
    operation: str | None = None


class Emulator:
    """A W&B server on loopback, as strict as the protocol allows.

    It answers the GraphQL operations that the client is known to send, and checks the offsets of ``file_stream``. A
    request that a real server would refuse, or that the emulator does not know, is noted in ``violations``; a test
    must end without any. It is a context manager. ``stop`` and ``start`` end the server and start it again on the same
    port, with all that it held.
    """

    def __init__(
        self, api_key: str = "k" * 40, port: int = 0, *, accept_any_key: bool = False, counting: Counting = "right"
    ) -> None:
        """Prepare a server.

        Args:
            api_key: the key that the server accepts.
            port: on 127.0.0.1; 0 chooses a free one.
            accept_any_key: whether the server accepts every well-formed key. It never accepts a request without one.
            counting: how the server counts the rows of a run; see `Counting`.
        """
        self.state = State(api_key, counting)
        self.accept_any_key = accept_any_key
        self._faults: list[Fault] = []
        self._port = port
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The server's address, for ``base_url``."""
        return self.state.url

    @property
    def violations(self) -> list[str]:
        """What the client did that a real server would not accept."""
        with self.state.lock:
            return list(self.state.violations)

    def fail(self, fault: Fault) -> None:
        """Let the next requests fail in this way, after those that earlier calls named."""
        with self.state.lock:
            self._faults.append(fault)

    def faults_left(self) -> int:
        """Return how many requests will still fail."""
        with self.state.lock:
            return sum(fault.times for fault in self._faults)

    def start(self) -> Emulator:
        """Start to listen. The first call chooses a free port, unless one was given."""
        server = _Server(("127.0.0.1", self._port), _Handler)
        server.emulator = self
        self._port = server.server_address[1]
        self.state.url = f"http://127.0.0.1:{self._port}"
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening and reset the open connections. The server keeps all that it holds."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._server.cut()
        self._server.server_close()
        self._thread.join()
        self._server = None

    def __enter__(self) -> Emulator:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def take_fault(self, route: str, operation: str | None) -> Fault | None:
        """Return the fault for this request, or None, and count it."""
        with self.state.lock:
            for fault in self._faults:
                if fault.route == route and fault.operation in (None, operation):
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                    return fault
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    emulator: Emulator

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        with self._open_lock:
            for connection in self._open:
                reset(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a broken connection; any other error fails the test."""
        import sys

        error = sys.exception()
        if not isinstance(error, OSError):
            self.emulator.state.violation(f"the emulator failed: {error!r}")


def reset(connection: socket.socket) -> None:
    """Close a connection so that the other end sees a reset."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        """Log nothing: tests look at the state."""

    def do_POST(self) -> None:
        body = self._body()
        emulator = self.server.emulator
        state = emulator.state
        parts = self.path.strip("/").split("/")
        if parts[0] == "_emulator":
            self._control(parts[1], body)
        elif not self._logged_in():
            self._answer(HTTPStatus.UNAUTHORIZED, {"errors": [{"message": "not logged in"}]})
        elif parts == ["graphql"]:
            self._graphql(json.loads(body))
        elif len(parts) == 5 and parts[0] == "files" and parts[4] == "file_stream":
            data = json.loads(body)

            def apply() -> tuple[int, Any]:
                with state.lock:
                    state.requests.append("file_stream")
                    answer = state.file_stream(parts[1], parts[2], parts[3], data)
                return (HTTPStatus.OK, answer) if answer is not None else (HTTPStatus.NOT_FOUND, {})

            self._with_faults("file_stream", None, apply)
        else:
            self._unknown()

    def do_PUT(self) -> None:
        body = self._body()
        state = self.server.emulator.state
        parts = self.path.strip("/").split("/")
        if len(parts) != 2 or parts[0] != "upload":
            self._unknown()
            return

        def apply() -> tuple[int, Any]:
            with state.lock:
                state.requests.append("upload")
                known = state.upload(parts[1], body)
            return (HTTPStatus.OK, {}) if known else (HTTPStatus.FORBIDDEN, {})

        self._with_faults("upload", None, apply)

    def do_GET(self) -> None:
        if self.path == "/_emulator/state":
            self._answer(HTTPStatus.OK, _dump(self.server.emulator))
        else:
            self._unknown()

    def _graphql(self, request: Mapping[str, Any]) -> None:
        state = self.server.emulator.state
        try:
            operation = parse(request["query"])
            if operation.name not in OPERATIONS:
                raise GraphQLError(f"operation {operation.name} is not known")
        except GraphQLError as error:
            self._refuse(str(error))
            return
        # GraphQL, October 2021, 6.1: a name that is given must be that of an operation in the document. The SDK's own
        # questions about artifacts have an empty one (wandb 0.31). It goes on when they are refused.
        if (chosen := request.get("operationName")) is not None and chosen != operation.name:
            text = f"operationName is {chosen!r}, but the document holds {operation.name}"
            self._refuse(text, is_violation=operation.name not in SDK_UNNAMED)
            return

        def apply() -> tuple[int, Any]:
            with state.lock:
                state.requests.append(operation.name)
                try:
                    data = operation.execute(state.root(), request.get("variables") or {})
                except (GraphQLError, LookupError, StopIteration) as error:
                    state.violation(f"graphql: {error!r}")
                    return HTTPStatus.BAD_REQUEST, {"errors": [{"message": str(error)}]}
            return HTTPStatus.OK, {"data": data}

        self._with_faults("graphql", operation.name, apply)

    def _refuse(self, text: str, *, is_violation: bool = True) -> None:
        if is_violation:
            with self.server.emulator.state.lock:
                self.server.emulator.state.violation(f"graphql: {text}")
        self._answer(HTTPStatus.BAD_REQUEST, {"errors": [{"message": text}]})

    def _with_faults(self, route: str, operation: str | None, apply: Any) -> None:
        fault = self.server.emulator.take_fault(route, operation)
        if fault is None:
            self._answer(*apply())
            return
        if fault.applied:
            apply()
        time.sleep(fault.delay_s)
        if fault.status == HTTPStatus.OK:
            self._answer(*apply())
        elif fault.status == 0:
            self.close_connection = True
            reset(self.connection)
        else:
            headers = {} if fault.retry_after_s is None else {"Retry-After": f"{fault.retry_after_s:g}"}
            self._answer(fault.status, {"error": "injected"}, headers)

    def _control(self, what: str, body: bytes) -> None:
        if what == "fail":
            self.server.emulator.fail(Fault(**json.loads(body)))
            self._answer(HTTPStatus.OK, {})
        else:
            self._unknown()

    def _logged_in(self) -> bool:
        emulator = self.server.emulator
        scheme, _, given = (self.headers.get("Authorization") or "").partition(" ")
        user, _, key = base64.b64decode(given).decode().partition(":")
        right = len(key) >= 40 if emulator.accept_any_key else key == emulator.state.api_key
        return (scheme, user) == ("Basic", "api") and right

    def _unknown(self) -> None:
        with self.server.emulator.state.lock:
            self.server.emulator.state.violation(f"http: {self.command} {self.path} is not known")
        self._answer(HTTPStatus.NOT_FOUND, {})

    def _body(self) -> bytes:
        size = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionResetError("the client was killed while it sent the body")
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _answer(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


def _dump(emulator: Emulator) -> dict[str, Any]:
    state = emulator.state
    with state.lock:
        runs = {
            name: {
                "fields": run.fields,
                "tags": run.tags,
                "config": run.params(),
                "history": run.rows,
                "summary": run.summary,
                "state": run.state,
                "exit_code": run.exit_code,
                "files": {file: len(data) for file, data in run.files.items()},
                "texts": {file: data.decode() for file, data in run.files.items() if file.endswith(".html")},
                "resent": run.resent,
            }
            for name, run in state.runs.items()
        }
        artifacts = [
            {
                "collection": one.collection,
                "type": one.artifact_type,
                "state": one.state,
                "files": sorted(one.files),
                "metadata": one.metadata,
                "sha256": {file: hashlib.sha256(data).hexdigest() for file, data in one.files.items()},
            }
            for one in state.artifacts
        ]
        return {"runs": runs, "artifacts": artifacts, "violations": state.violations, "requests": state.requests}
