# SPDX-License-Identifier: Apache-2.0
r"""The backend ``jsonl``: one text file for each run, one line of JSON for each record. It needs nothing but the core.

Read it before you write a backend of your own. It has all that a backend needs: options, capabilities, a check before
training, runs, and the place of each run's results. Its ``write`` returns only when the entries are stored.

A run's file is ``<job>/<site>.jsonl``, where ``<job>`` is the job's unique name. Beside it, ``job.json`` has the job's
id, name, notes and tags. The files that images and artifacts bring are in ``<site>.files/``::

    {"position":0,"time":1764000000.2,"step":1,"round":0,"stream":"9f…","seq":0,"kind":"metrics","values":{"loss":0.5}}
    {"position":1,…,"kind":"image","file":"site-1.files/1.png",…,"key":"samples","width":32,"height":32,"caption":""}
    {"position":1,"time":1764000009.5,"kind":"end","status":"finished"}

``kind`` is the record's kind, and the fields of its payload follow. The end of a run is a line of kind ``end``, which
is not a record. JSON has no NaN and no infinities:

- In metrics and histograms, where only numbers can stand, they are the strings ``"NaN"``, ``"Infinity"`` and
  ``"-Infinity"``.
- In params, summaries and tables, where a logged string may look the same, they are ``{"$float": "NaN"}`` and so on. A
  key in params and summaries that begins with ``$`` gets a second ``$``.
"""

from __future__ import annotations

import errno
import math
import mimetypes
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from trackhub.spi import (
    ANY_KEY,
    Artifact,
    Backend,
    BackendContext,
    BackendRun,
    Capabilities,
    ConfigError,
    ConfirmedBy,
    Entry,
    Histogram,
    Image,
    JobInfo,
    Kind,
    Metrics,
    OptionMark,
    Params,
    PermanentError,
    Redelivery,
    Results,
    RunInfo,
    RunStatus,
    Summary,
    Table,
    Tags,
    Text,
    TransientError,
    make_folder,
    open_file,
    path_component,
)

__all__ = ["JsonlBackend", "JsonlOptions", "JsonlRun"]

_KIND_NAMES: dict[type[msgspec.Struct], str] = {
    Metrics: "metrics",
    Params: "params",
    Tags: "tags",
    Text: "text",
    Image: "image",
    Histogram: "histogram",
    Table: "table",
    Artifact: "artifact",
    Summary: "summary",
}
_encode = msgspec.json.Encoder().encode
_PROBE_BYTES = 1 << 16


class JsonlOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of ``jsonl``.

    Attributes:
        path: folder for the files of all jobs, absolute or relative to the job's run folder; by default ``jsonl`` in
            the run folder. Outside the run folder, what a client writes goes to ``<job>@client/``, since the server may
            write there as well.
    """

    path: Annotated[str | None, OptionMark.PATH] = None


class JsonlBackend(Backend[JsonlOptions]):
    """Writes each run to a file of JSON lines."""

    spi = 1
    contract = 1
    # The core rejects or changes whatever is not claimed here, before it reaches this backend. The kinds are written
    # out, since a later trackhub may have more, which this code does not know.
    capabilities = Capabilities(
        kinds=frozenset(
            {
                Kind.METRICS,
                Kind.PARAMS,
                Kind.TAGS,
                Kind.TEXT,
                Kind.IMAGE,
                Kind.HISTOGRAM,
                Kind.TABLE,
                Kind.ARTIFACT,
                Kind.SUMMARY,
            }
        ),
        redelivery=Redelivery.RESUMABLE,
        confirmed_by=ConfirmedBy.WRITE,
        nonfinite=True,
        late_steps=True,
        optional_step=True,
        changing_params=True,
        probe=True,
        key_rule=ANY_KEY,
    )

    def __init__(self, options: JsonlOptions, context: BackendContext) -> None:
        """Work out the folder, and create nothing yet."""
        super().__init__(options, context)
        self._folder = context.folder(options.path)

    def preflight(self) -> None:
        """Make the folder before training starts.

        Raises:
            ConfigError: it cannot be made or written to.
        """
        try:
            make_folder(self._folder)
            if not os.access(self._folder, os.W_OK):
                raise PermissionError("no permission to write there")
        except OSError as error:
            raise ConfigError(f"jsonl cannot use the folder {self._folder}: {error}; give another `path`") from error

    def open_run(self, info: RunInfo) -> JsonlRun:
        """Open the run's file.

        Raises:
            TransientError: the file system refuses.
            PermanentError: the file's last line is not one that this backend wrote.
        """
        return JsonlRun(self._file(info), info)

    def results(self, info: RunInfo) -> Results:
        """Return the path of the run's file."""
        return Results(path=self.context.shown(self._file(info)))

    def _file(self, info: RunInfo) -> Path:
        run_path = self.context.run_path(self._folder, info)
        return run_path.with_name(f"{run_path.name}.jsonl")


class JsonlRun(BackendRun):
    """A file to which lines are appended. When ``write`` returns, they survive the death of this process.

    No file stays open between two calls.
    """

    def __init__(self, path: Path, info: RunInfo) -> None:
        """Find out where the run stands.

        Raises:
            TransientError: the file system refuses.
            PermanentError: the file's last line is not one that this backend wrote.
        """
        self._path = path
        self._info = info
        self._next = 0
        self._torn = True  # the file may end in a part of a line
        try:
            make_folder(path.parent)
            _store_job(path.with_name("job.json"), info.job)
            self._recover()
        except OSError as error:
            raise TransientError(f"cannot open {path}: {error}; give write access and free space") from error

    def next_position(self) -> int:
        """Return the position after that of the last line."""
        return self._next

    def write(self, batch: Sequence[Entry]) -> None:
        """Append one line for each entry, all of them by one system call.

        Raises:
            TransientError: the file system refuses.
            PermanentError: an entry can never be stored. Then nothing of the batch is stored.
        """
        try:
            # Entries that the file holds already come again after a write that failed half-way.
            self._append(self._line(entry) for entry in batch if entry.position >= self._next)
        except OSError as error:
            raise TransientError(f"cannot write to {self._path}: {error}") from error
        self._next = batch[-1].position + 1

    def probe(self, entry: Entry) -> None:
        """Append a part of a line to the run's file, and cut it off again.

        Raises:
            TransientError: the file system refuses.
        """
        try:
            if self._torn:
                self._recover()
            self._torn = True
            self._append_bytes(b" " * _PROBE_BYTES)
            self._recover()
        except OSError as error:
            raise TransientError(f"cannot write to {self._path}: {error}") from error

    def finish(self, status: RunStatus) -> None:
        """Append the line that says how the run ended.

        Raises:
            TransientError: the file system refuses.
        """
        try:
            self._append([{"position": self._next - 1, "time": time.time(), "kind": "end", "status": status}])
        except OSError as error:
            raise TransientError(f"cannot finish {self._path}: {error}") from error

    def _append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines. Reads ``lines`` after it has cut off an unfinished line: only then ``_next`` is right."""
        if self._torn:
            self._recover()
        content = b"".join(_encode(line) + b"\n" for line in lines)
        self._torn = True
        self._append_bytes(content)
        self._torn = False

    def _append_bytes(self, content: bytes) -> None:
        with open(self._path, "ab", buffering=0, opener=open_file) as file:
            written = file.write(content)
        if written != len(content):
            raise OSError(errno.ENOSPC, f"only {written} of {len(content)} bytes could be written")

    def _recover(self) -> None:
        """Cut off a last line that a crash or a full disk left unfinished, and find out where the run stands."""
        if self._path.exists():
            os.close(open_file(self._path, os.O_RDWR))
            end, self._next = _whole_lines(self._path)
            os.truncate(self._path, end)
        self._torn = False

    def _line(self, entry: Entry) -> dict[str, Any]:
        """Return the entry as JSON can hold it. Copies its blob.

        Raises:
            PermanentError: the payload is of a class that this backend does not know, or its blob is missing.
        """
        payload = entry.payload
        kind = _KIND_NAMES.get(type(payload))
        if kind is None:
            raise PermanentError(f"jsonl does not know payloads of the type {type(payload).__name__}")
        line: dict[str, Any] = {"position": entry.position, "time": entry.time, "step": entry.step}
        line |= {"round": entry.round, "stream": entry.stream, "seq": entry.seq, "kind": kind}
        fields = msgspec.structs.asdict(payload)
        if isinstance(payload, (Image, Artifact)):
            blob = fields.pop("blob")
            line["file"] = self._copy_blob(entry.position, payload)
            line |= {"size": blob.size, "sha256": blob.sha256, "media_type": blob.media_type}
        line.update(_plain(fields, tagged=isinstance(payload, (Params, Summary, Table))))
        return line

    def _copy_blob(self, position: int, payload: Image | Artifact) -> str:
        """Copy the blob to a file named by the position. Return the path to it from the run's file."""
        source = self._info.blob_path(payload.blob)
        if not source.is_file():
            raise PermanentError(f"the content of {payload.key!r} is missing: there is no file {source}")
        name = payload.filename if isinstance(payload, Artifact) else ""
        suffix = Path(name).suffix or mimetypes.guess_extension(payload.blob.media_type) or ""
        target = self._path.with_suffix(".files") / path_component(f"{position}{suffix}")
        make_folder(target.parent)
        with source.open("rb") as content, open(target, "wb", opener=open_file) as copy:
            shutil.copyfileobj(content, copy)
        return f"{target.parent.name}/{target.name}"


def _store_job(path: Path, job: JobInfo) -> None:
    """Store what a person reads of the job. Several receivers may do so at the same time, with the same content."""
    content = msgspec.json.format(_encode(job), indent=2) + b"\n"
    if not path.exists() or path.read_bytes() != content:
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        with open(partial, "wb", opener=open_file) as file:
            file.write(content)
        partial.replace(path)


def _plain(value: Any, *, tagged: bool) -> Any:
    """Return the value with NaN and infinities as strings. With ``tagged``, logged strings never look the same."""
    if isinstance(value, dict):
        return {"$" * (tagged and key[:1] == "$") + key: _plain(item, tagged=tagged) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, tagged=tagged) for item in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return {"$float": name} if tagged else name


def _whole_lines(path: Path) -> tuple[int, int]:
    """Return the length of the file up to its last line feed, and the position after that of its last line.

    Raises:
        PermanentError: the last line is not one that this backend wrote.
    """
    if path.stat().st_size == 0:
        return 0, 0
    # Mapped, not read: a run's file may be larger than the memory.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
        if end == 0:
            return 0, 0
        last = content[content.rfind(b"\n", 0, end - 1) + 1 : end]
    try:
        return end, msgspec.json.decode(last)["position"] + 1
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise PermanentError(f"the last line of {path} is not a record; move the file away to start anew") from error
