# SPDX-License-Identifier: Apache-2.0
"""One MLflow run being written: how each kind of record becomes points, params, tags and artifacts.

The lane calls `MLflowRun`. What becomes a metric, param or tag goes to the store in batches, everything else as files.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trackhub.spi import (
    Artifact,
    BackendRun,
    BadImageError,
    Blob,
    Entry,
    Histogram,
    Image,
    Metrics,
    Params,
    Rejection,
    RunInfo,
    RunStatus,
    Summary,
    Table,
    Tags,
    Text,
    WriteReport,
)
from trackhub_mlflow import media_and_table_files
from trackhub_mlflow.flat_params import MAX_PARAM_CHARS, MAX_TAG_CHARS, ParamNames, flatten, pointer, stored_text
from trackhub_mlflow.job_runs import JobRuns
from trackhub_mlflow.naming import SUMMARY_PREFIX, digest, file_part, logged_tag_name
from trackhub_mlflow.points import PointMaker, milliseconds
from trackhub_mlflow.send_batches import Item, send
from trackhub_mlflow.store import Pair, RefusedError, Store, StoredRun
from trackhub_mlflow.unique_artifact_paths import ArtifactPaths

__all__ = ["MLflowRun"]

_MAX_NAMES = 10_000
"""Most params, tags and final values of a run. A store takes some thousand of them a second, and meanwhile all other
runs of the lane wait. One record may have a hundred thousand params, since each key of a nested param is one."""

_HAS_IMAGES = Pair("mlflow.loggedImages", "True")
_TABLES_TAG = "mlflow.loggedArtifacts"


class MLflowRun(BackendRun):
    """Writes one run. When ``write`` returns, the store has everything, so no flush is needed.

    A second thread may write images and artifacts. The other thread uses neither artifact paths nor the tag for images.
    """

    def __init__(self, store: Store, run: StoredRun, info: RunInfo, job_runs: JobRuns) -> None:
        """Continue a run of the store.

        Args:
            store: where the run is.
            run: what ``job_runs`` opened.
            info: what the lane said of the run.
            job_runs: ends the run.
        """
        self._job_runs = job_runs
        self._store = store
        self._run = run
        self._info = info
        self._points = PointMaker()
        self._params = ParamNames(run.params)
        self._names = {("param", name) for name in run.params} | {("tag", name) for name in run.tags}
        self._artifact_paths = ArtifactPaths(store, run, is_new=info.resume_from == 0)
        self._tables: list[dict[str, str]] = _tables_in(run.tags.get(_TABLES_TAG, "[]"))
        self._has_images = _HAS_IMAGES.key in run.tags
        self._last_ms = 0
        self._lock = threading.Lock()

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        """Store these entries. If MLflow refuses a record, only this record is rejected.

        Raises:
            TransientError: the store cannot take them now, or somebody deleted the run.
        """
        self._points.forget_old()
        rejections: dict[int, Rejection] = {}
        items: list[Item] = []
        for entry in batch:
            time_ms = milliseconds(entry.time)
            if time_ms > self._last_ms:
                with self._lock:
                    self._last_ms = max(self._last_ms, time_ms)
            payload = entry.payload
            if isinstance(payload, Metrics):
                self._add_points(entry, payload, time_ms, items)
                continue
            try:
                if isinstance(payload, Params):
                    items += self._limited(self._param_items(entry, payload))
                elif isinstance(payload, Tags):
                    tags = ((logged_tag_name(key), value) for key, value in payload.values.items())
                    items += self._limited(self._tag_items(entry, tags))
                elif isinstance(payload, Summary):
                    tags = ((SUMMARY_PREFIX + key, _json_text(value)) for key, value in payload.values.items())
                    items += self._limited(self._tag_items(entry, tags))
                else:
                    items += self._store_files(entry)
            except _RejectedError as error:
                rejections[entry.position] = Rejection(entry.position, error.reason, str(error))
        for rejection in send(self._store, self._run.id, items):
            rejections.setdefault(rejection.position, rejection)
        self._has_images = self._has_images or any(item.what is _HAS_IMAGES for item in items)
        return WriteReport([rejections[position] for position in sorted(rejections)]) if rejections else None

    def finish(self, status: RunStatus) -> None:
        """End the run at the time of its last record. End the parent run, too, if none of its other runs is running.

        Raises:
            TransientError: the store cannot be used now.
        """
        self._job_runs.close_run(self._run, status, self._last_ms or self._run.end_ms or None)

    def _add_points(self, entry: Entry, payload: Metrics, time_ms: int, items: list[Item]) -> None:
        step, position = entry.step or 0, entry.position
        for key, value in payload.values.items():
            items.append(Item(position, "metric", self._points.point(position, key, value, time_ms, step)))

    def _limited(self, items: Iterable[Item]) -> list[Item]:
        """Return the params or tags of one record, if the run may have all of them.

        Raises:
            _RejectedError: it would have too many.
        """
        found = list(items)
        new = {(item.kind, item.what.key) for item in found} - self._names
        if len(self._names) + len(new) > _MAX_NAMES:
            raise _RejectedError(
                "too_many_keys",
                f"the run would have more than {_MAX_NAMES} params, tags and final values; each key of a nested param "
                "is a param. Log large mappings with log_table or log_artifact",
            )
        self._names |= new
        return found

    def _param_items(self, entry: Entry, payload: Params) -> Iterator[Item]:
        for key, value in payload.values.items():
            for path, text in flatten(key, value):
                name, shown = self._params.place(path, partial(_shown, "params", text, MAX_PARAM_CHARS))
                if shown != text:
                    self._put(_path_of_whole("params", name, text), text.encode())
                yield Item(entry.position, "param", Pair(name, shown))

    def _tag_items(self, entry: Entry, tags: Iterable[tuple[str, str]]) -> Iterator[Item]:
        for name, value in tags:
            text = stored_text(value)
            shown = _shown("tags", text, MAX_TAG_CHARS, name)
            if shown != text:
                self._put(_path_of_whole("tags", name, text), text.encode())
            yield Item(entry.position, "tag", Pair(name, shown))

    def _store_files(self, entry: Entry) -> Iterator[Item]:
        """Store a record that becomes artifacts. Yield the tag that tells the UI about them, if there is one."""
        payload = entry.payload
        if isinstance(payload, Text):
            self._put(*media_and_table_files.text_file(entry, payload))
        elif isinstance(payload, Histogram):
            for path, content in media_and_table_files.histogram_files(entry, payload):
                self._put(path, content)
        elif isinstance(payload, Table):
            path = media_and_table_files.table_path(entry, payload)
            self._put(path, media_and_table_files.table_file(payload))
            if (tag := self._table_tag(path)) is not None:
                yield Item(entry.position, "tag", tag)
        elif isinstance(payload, Image):
            blob = self._blob(payload.blob)
            try:
                for path, content in media_and_table_files.image_files(entry, payload, blob, self._info.run_id):
                    self._put(path, content)
            except BadImageError as error:
                raise _RejectedError("invalid_image", f"{payload.key!r}: {error}") from error
            if not self._has_images:
                yield Item(entry.position, "tag", _HAS_IMAGES)
        elif isinstance(payload, Artifact):
            self._put(self._artifact_paths.path(entry, payload), self._blob(payload.blob))
        else:
            raise _RejectedError("unsupported_kind", f"MLflow cannot store a {type(payload).__name__}")

    def _table_tag(self, path: str) -> Pair | None:
        """Return the tag that lists the run's tables; None once it is full. The UI shows further tables as JSON."""
        listed = [*self._tables, {"path": path, "type": "table"}]
        value = json.dumps(listed)
        if any(table.get("path") == path for table in self._tables):
            value = json.dumps(self._tables)
        elif len(value) > MAX_TAG_CHARS:
            return None
        else:
            self._tables = listed
        return Pair(_TABLES_TAG, value)

    def _blob(self, blob: Blob) -> Path:
        path = self._info.blob_path(blob)
        if not path.exists():
            raise _RejectedError("blob_missing", f"its content is missing: there is no file {path}")
        return path

    def _put(self, path: str, content: bytes | Path) -> None:
        try:
            self._store.put_artifact(self._run, path, content)
        except RefusedError as error:
            raise _RejectedError("refused_by_mlflow", f"artifact {path}: {error}") from error


class _RejectedError(Exception):
    """This record will never be stored."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(folder: str, text: str, limit: int, name: str) -> str:
    return text if len(text) <= limit else pointer(text, _path_of_whole(folder, name, text))


def _path_of_whole(folder: str, name: str, text: str) -> str:
    """Return the path of the artifact for a value that is too long. A new value gets a new path, by its digest."""
    return f"{folder}/{file_part(name)}-{digest(text, 8)}.txt"


def _tables_in(tag: str) -> list[dict[str, str]]:
    """Return the tables that the tag lists; none if somebody has changed the tag to another form."""
    try:
        listed = json.loads(tag)
    except ValueError:
        return []
    return [table for table in listed if isinstance(table, dict)] if isinstance(listed, list) else []
