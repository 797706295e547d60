# SPDX-License-Identifier: Apache-2.0
"""Backends of the fault suite: one for each kind of redelivery, and one that talks to `tests.faults.failing_server`.

Receivers and ``trackhub replay`` load them by entry point. Their options say how they fail. A store is a folder with
one file of JSON lines for each run. A batch is appended by one system call. What was written twice is in the file
twice, so that the suite's readers see it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from trackhub.spi import (
    ANY_KEY,
    Artifact,
    Backend,
    BackendContext,
    BackendRun,
    Capabilities,
    Confirmation,
    ConfirmedBy,
    Entry,
    Kind,
    Metrics,
    PermanentError,
    Redelivery,
    Rejection,
    Results,
    RunInfo,
    RunStatus,
    Text,
    TransientError,
    WriteReport,
)

_CAN = Capabilities(
    kinds=frozenset({Kind.METRICS, Kind.TEXT, Kind.ARTIFACT}),
    confirmed_by=ConfirmedBy.WRITE,
    late_steps=True,
    optional_step=True,
    nonfinite=True,
    key_rule=ANY_KEY,
    max_batch=100,
)


def _plain(entry: Entry, info: RunInfo) -> dict[str, Any]:
    """Return an entry as a line of a store. A file is stored as the digest of its bytes."""
    payload = entry.payload
    line: dict[str, Any] = {"position": entry.position, "time": entry.time, "step": entry.step}
    if isinstance(payload, Metrics):
        ((key, value),) = payload.values.items()
        return {**line, "key": key, "value": value}
    if isinstance(payload, Text):
        return {**line, "key": payload.key, "value": payload.text}
    assert isinstance(payload, Artifact)
    digest = hashlib.sha256(info.blob_path(payload.blob).read_bytes()).hexdigest()
    return {**line, "key": payload.key, "value": digest}


class StoreOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of all stores.

    Attributes:
        path: the store's folder; by default the backend's folder.
        down_while: while this file exists, every call fails.
        hang_while: while this file exists, no call returns.
        dies_at: from this write on, every call fails.
        permanent: calls fail with PermanentError in place of TransientError.
        reject_every: reject each position that this number divides; 0 rejects none.
        pause_s: how long the writing of one record takes.
        fail_after_applying: each write whose number this divides stores everything and then fails; 0 for none.
        max_batch: most records in one write.
    """

    path: str = ""
    down_while: str = ""
    hang_while: str = ""
    dies_at: int = 0
    permanent: bool = False
    reject_every: int = 0
    pause_s: float = 0.0
    fail_after_applying: int = 0
    max_batch: int = 100


class StoreRun(BackendRun):
    """A run in a file of lines. ``write`` confirms."""

    def __init__(self, backend: Store, info: RunInfo) -> None:
        self._backend = backend
        self._info = info
        self._path = backend.folder / f"{info.job.id}-{info.site}.jsonl"
        self._known = {json.loads(line)["position"] for line in _lines(self._path)}
        if backend.capabilities.redelivery is Redelivery.REBUILD:
            self._path.unlink(missing_ok=True)
            self._known.clear()

    def next_position(self) -> int:
        return max(self._known, default=-1) + 1

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        options = self._backend.options
        self._backend.writes += 1
        self._backend.behave()
        rejected = [e for e in batch if options.reject_every and e.position % options.reject_every == 0]
        doubles = self._backend.capabilities.redelivery is Redelivery.AT_LEAST_ONCE
        fresh = [e for e in batch if e not in rejected and (doubles or e.position not in self._known)]
        self._store(fresh)
        self._known.update(e.position for e in fresh)
        if options.fail_after_applying and self._backend.writes % options.fail_after_applying == 0:
            raise TransientError("500: the records were stored, but the caller does not know it")
        return WriteReport([Rejection(e.position, "seventh") for e in rejected]) if rejected else None

    def _store(self, entries: Sequence[Entry]) -> None:
        threading.Event().wait(self._backend.options.pause_s * len(entries))
        _append(self._path, [_plain(entry, self._info) for entry in entries])

    def finish(self, status: RunStatus) -> None:
        self._backend.behave()
        self._path.with_suffix(".status").write_text(status)


class BufferedRun(StoreRun):
    """A run that keeps records in memory until ``flush``, which confirms. SIGKILL loses what is in memory."""

    def __init__(self, backend: Store, info: RunInfo) -> None:
        super().__init__(backend, info)
        self._held: list[Entry] = []

    def _store(self, entries: Sequence[Entry]) -> None:
        self._held.extend(entries)

    def flush(self) -> Confirmation:
        self._backend.behave()
        super()._store(self._held)
        self._held = []
        return Confirmation.STORE


class Store(Backend[StoreOptions]):
    """Base class of the stores. The subclasses differ in the redelivery that they claim."""

    spi = 1
    options: StoreOptions
    run: type[StoreRun] = StoreRun

    def __init__(self, options: StoreOptions, context: BackendContext) -> None:
        super().__init__(options, context)
        self.folder = context.workdir if not options.path else Path(options.path)
        self.capabilities = msgspec.structs.replace(type(self).capabilities, max_batch=options.max_batch)
        self.writes = 0

    def behave(self) -> None:
        """Fail or hang, if the options say so.

        Raises:
            TransientError: the store is down.
            PermanentError: the same, with the option ``permanent``.
        """
        options = self.options
        while options.hang_while and os.path.exists(options.hang_while):
            if (path := Path(options.hang_while)).name:  # none of "/", which is always there
                path.with_suffix(".reached").touch()
            threading.Event().wait(0.1)
        if (options.down_while and os.path.exists(options.down_while)) or 0 < options.dies_at <= self.writes:
            raise PermanentError("the store is gone") if options.permanent else TransientError("connection refused")

    def preflight(self) -> None:
        self.behave()

    def open_run(self, info: RunInfo) -> BackendRun:
        self.behave()
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.run(self, info)

    def results(self, info: RunInfo) -> Results:
        return Results(path=str(self.folder))


class Idempotent(Store):
    capabilities = msgspec.structs.replace(_CAN, redelivery=Redelivery.IDEMPOTENT)


class Resumable(Store):
    capabilities = msgspec.structs.replace(_CAN, redelivery=Redelivery.RESUMABLE)


class Rebuild(Store):
    capabilities = msgspec.structs.replace(_CAN, redelivery=Redelivery.REBUILD, confirmed_by=ConfirmedBy.FLUSH)
    run = BufferedRun


class AtLeastOnce(Store):
    capabilities = msgspec.structs.replace(_CAN, redelivery=Redelivery.AT_LEAST_ONCE)


class Buffered(Store):
    capabilities = msgspec.structs.replace(_CAN, redelivery=Redelivery.IDEMPOTENT, confirmed_by=ConfirmedBy.FLUSH)
    run = BufferedRun


class HttpOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of `Http`: the server's address, and the longest wait for a reply."""

    url: str
    timeout_s: float = 1.0


class HttpRun(BackendRun):
    """A run on the failing server."""

    def __init__(self, backend: Http, info: RunInfo) -> None:
        self._backend = backend
        self._info = info

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        lines = [_plain(entry, self._info) for entry in batch]
        reply = self._backend.post("write", {"run": self._info.site, "lines": lines})
        rejected = reply.get("rejected", [])
        return WriteReport([Rejection(position, "seventh") for position in rejected]) if rejected else None

    def finish(self, status: RunStatus) -> None:
        self._backend.post("finish", {"run": self._info.site, "status": status})


class Http(Backend[HttpOptions]):
    """A backend that talks to `tests.faults.failing_server`, which recognises a record by its position."""

    spi = 1
    options: HttpOptions
    capabilities = msgspec.structs.replace(_CAN, redelivery=Redelivery.IDEMPOTENT)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post JSON and return the reply.

        Raises:
            TransientError: the server did not reply, or replied with an error status.
        """
        request = urllib.request.Request(f"{self.options.url}/{path}", json.dumps(body).encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.options.timeout_s) as reply:
                found: dict[str, Any] = json.load(reply)
                return found
        except urllib.error.HTTPError as e:
            with e:
                wait_s = e.headers.get("Retry-After")
            raise TransientError(f"HTTP {e.code}", retry_after_s=float(wait_s) if wait_s else None) from e
        except OSError as e:
            raise TransientError(f"no reply: {e}") from e

    def preflight(self) -> None:
        self.post("ping", {})

    def open_run(self, info: RunInfo) -> BackendRun:
        self.post("ping", {})
        return HttpRun(self, info)


def _lines(path: Path) -> list[str]:
    """Return the file's lines. A line that SIGKILL cut short is removed first."""
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    os.truncate(path, end)
    return data[:end].decode().splitlines()


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        if file.write(data) != len(data):
            os.truncate(path, before)
            raise TransientError("no space left on the device")
