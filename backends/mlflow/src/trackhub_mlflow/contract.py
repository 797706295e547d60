# SPDX-License-Identifier: Apache-2.0
"""The contract kit's hooks for this backend: how to read a store back, and the canonical form of what it holds.

The tests and ``trackhub check mlflow`` use `MLflowContract`. It reads an SQLite store by plain SQL, and a server by
MLflow's own client.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import sqlite3
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlencode
from urllib.request import urlopen

from trackhub.spi import FEDERATION
from trackhub.testing import (
    ArtifactItem,
    BackendContract,
    HistogramItem,
    ImageItem,
    Kind,
    Point,
    ReadBack,
    RunInfo,
    RunStatus,
    StoreContext,
    TableItem,
    TextItem,
)
from trackhub_mlflow.backend import MLflowBackend
from trackhub_mlflow.flat_params import stored_text
from trackhub_mlflow.naming import artifact_path, cut_name, escape_name, file_part, logged_tag_name
from trackhub_mlflow.options import sqlite_path
from trackhub_mlflow.sqlite_store import SqliteStore

__all__ = ["MLflowContract"]

_FILE = re.compile(r"(?P<folder>text|histograms|tables)/(?P<key>[^/]+)/step-(?P<step>\d+)-p\d+\.(?P<suffix>\w+)")
_IMAGE = re.compile(r"images/(?P<key>.+)\+step\+(?P<step>\d+)\+timestamp\+(?P<ms>\d+)\+[0-9a-f-]{36}\.png")
_POSITION = re.compile(r"\.p\d+(?P<suffix>(?:\.[^./]*)?)$")
_OWN_TAGS = frozenset({"job", "job_name", "site", "side"})
_STATUS = {
    RunStatus.FINISHED: "FINISHED",
    RunStatus.FAILED: "FAILED",
    RunStatus.ABORTED: "KILLED",
    RunStatus.KILLED: "KILLED",
}


class Stored(NamedTuple):
    """A run as MLflow has it. Points are (key, step, value, milliseconds); files are path -> content."""

    status: str
    points: list[tuple[str, int, float, int]]
    params: dict[str, str]
    tags: dict[str, str]
    files: dict[str, bytes]


class MLflowContract(BackendContract):
    """What the kit must know of `MLflowBackend`, with a store of the job's own or one that several jobs share."""

    backend = MLflowBackend
    name = "mlflow"
    cannot_tell: ClassVar[Mapping[str, str]] = {
        "texts.time": "a text is a file among the run's artifacts",
        "tables.time": "a table is a file among the run's artifacts",
        "artifacts.time": "MLflow keeps an artifact's path and content",
        "artifacts.step": "MLflow keeps an artifact's path and content",
        "artifacts.filename": "MLflow keeps an artifact's path and content",
        "artifacts.artifact_type": "MLflow keeps an artifact's path and content",
    }

    def shared_options(self, tmp_path: Path) -> Mapping[str, Any]:
        """Return options with which receivers write to one SQLite store."""
        return {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}

    def prepare(self, context: StoreContext) -> None:
        """Copy an empty store to its place, because creating one takes a second."""
        if (file := _database(context)) is not None and not file.exists():
            shutil.copyfile(_template(), file)

    def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack:
        """Return what the store holds of this run, read by SQL and from files, or by MLflow's client."""
        file = _database(context)
        found = _ask(str(context.options["tracking_uri"]), run) if file is None else _query(file, run)
        items: dict[str, list[Any]] = defaultdict(list)
        for path, content in found.files.items():
            _add_file(items, path, content, found.files)
        return ReadBack(
            points=[Point(key, step, value, ms / 1000) for key, step, value, ms in found.points],
            params=dict(found.params),
            tags=_logged(found.tags, context.job.tags),
            summary={key[8:]: value for key, value in found.tags.items() if key.startswith("summary.")},
            texts=items["text"],
            images=items["image"],
            histograms=items["histograms"],
            tables=items["tables"],
            artifacts=items["artifact"],
            status=found.status,
        )

    def canonical_value(self, value: float) -> float:
        """Return the value as MLflow keeps it: infinity as the largest finite number, and no negative zero."""
        return math.copysign(sys.float_info.max, value) if math.isinf(value) else value + 0.0

    def canonical_time(self, time: float) -> float:
        """Return the time in whole milliseconds, rounded down."""
        return int(time * 1000 + 0.0005) / 1000

    def canonical_key(self, kind: Kind, key: str) -> str:
        """Return the key as MLflow has it: as it is for a metric or param, as a path for what becomes a file."""
        if kind is Kind.ARTIFACT:
            return artifact_path(key)
        if kind is Kind.TAGS:
            return logged_tag_name(key)
        return key if kind in (Kind.METRICS, Kind.PARAMS, Kind.SUMMARY) else file_part(key)

    def canonical_params(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Return the params as text, nested ones joined by dots."""
        return dict(_flatten(params, ""))

    def canonical_summary(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Return the final values as text."""
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}

    def canonical_status(self, status: RunStatus) -> str:
        """Return MLflow's word for a status."""
        return _STATUS[status]


@cache
def _template() -> Path:
    """Return an empty store to copy."""
    file = Path(tempfile.mkdtemp(prefix="trackhub-mlflow-")) / "mlflow.db"
    store = SqliteStore(file)
    store.experiment("Default")
    store.close()
    return file


def _database(context: StoreContext) -> Path | None:
    """Return the file of an SQLite store; None for a server."""
    uri = str(context.options.get("tracking_uri", ""))
    if not uri:
        return context.workdir / "mlflow.db"
    return None if uri.startswith("http") else sqlite_path(uri, context.workdir.parent)


def _query(file: Path, run: RunInfo) -> Stored:
    with contextlib.closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=20)) as database:

        def rows(query: str, *values: Any) -> list[Any]:
            return database.execute(query, values).fetchall()

        wanted = _identity_tags(run)
        ids = set.intersection(
            *(
                {i for (i,) in rows("SELECT run_uuid FROM tags WHERE key = ? AND value = ?", *item)}
                for item in wanted.items()
            )
        )
        (run_id,) = ids
        ((status, uri),) = rows("SELECT status, artifact_uri FROM runs WHERE run_uuid = ?", run_id)
        points = rows(
            "SELECT key, step, value, timestamp, is_nan FROM metrics WHERE run_uuid = ? ORDER BY timestamp, step",
            run_id,
        )
        return Stored(
            status,
            [(key, step, math.nan if is_nan else value, ms) for key, step, value, ms, is_nan in points],
            dict(rows("SELECT key, value FROM params WHERE run_uuid = ?", run_id)),
            dict(rows("SELECT key, value FROM tags WHERE run_uuid = ?", run_id)),
            _files(file.parent / "mlartifacts" / uri.removeprefix("mlflow-artifacts:/")),
        )


def _logged(tags: Mapping[str, str], of_job: Sequence[str]) -> dict[str, str]:
    """Return the tags that a site logged, without tags of the backend, of MLflow and of the job."""
    of_site = {key: value for key, value in tags.items() if value or key not in of_job}
    return {
        key: value
        for key, value in of_site.items()
        if key not in _OWN_TAGS and not key.startswith(("mlflow.", "trackhub.", "summary."))
    }


def _identity_tags(run: RunInfo) -> dict[str, str]:
    """Return the tags by which a run is found. The federation run is the parent run, which both sides share."""
    tags = {"job": run.key.job, "site": run.key.site}
    return tags if run.site == FEDERATION else tags | {"side": run.side.value}


def _files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _ask(uri: str, run: RunInfo) -> Stored:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    job = run.key.job.replace("'", "\\'")
    runs = client.search_runs(experiments, f"tags.job = '{job}'")
    (found,) = [one for one in runs if one.data.tags.items() >= _identity_tags(run).items()]
    run_id = found.info.run_id
    points = [
        (metric.key, metric.step, metric.value, metric.timestamp)
        for key in found.data.metrics
        for metric in client.get_metric_history(run_id, key)
    ]
    files = {path: _download(uri, run_id, path) for path in _listed(client, run_id, None)}
    return Stored(found.info.status, points, found.data.params, found.data.tags, files)


def _listed(client: Any, run_id: str, folder: str | None) -> Iterator[str]:
    for item in client.list_artifacts(run_id, folder):
        if item.is_dir:
            yield from _listed(client, run_id, item.path)
        else:
            yield item.path


def _download(uri: str, run_id: str, path: str) -> bytes:
    query = urlencode({"run_uuid": run_id, "path": path})
    with urlopen(f"{uri.rstrip('/')}/get-artifact?{query}", timeout=20) as reply:
        content: bytes = reply.read()
        return content


def _add_file(items: dict[str, list[Any]], path: str, content: bytes, files: Mapping[str, bytes]) -> None:
    if (match := _IMAGE.fullmatch(path)) is not None:
        caption = files.get(path.removesuffix(".png") + ".txt", b"").decode()
        time = int(match["ms"]) / 1000
        items["image"].append(ImageItem(match["key"], int(match["step"]), content, caption, time))
        return
    if path.startswith("images/"):
        return  # a thumbnail or a caption
    if (match := _FILE.fullmatch(path)) is None:
        items["artifact"].append(ArtifactItem(_artifact_key(path), content))
        return
    key, step = match["key"], int(match["step"])
    if match["folder"] == "text":
        items["text"].append(TextItem(key, step, content.decode()))
    elif match["suffix"] == "json":
        data = json.loads(content)
        if match["folder"] == "tables":
            items["tables"].append(TableItem(key, step, data["columns"], data["data"]))
        else:
            items["histograms"].append(HistogramItem(key, step, data["edges"], data["counts"], data["time"]))


def _artifact_key(path: str) -> str:
    """Return the key of an artifact.

    The path holds the record's position if another artifact had the path of the key alone.
    """
    key, had_position = _POSITION.subn(r"\g<suffix>", path)
    return key.replace("~", "/") if had_position else key


def _flatten(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = prefix + (escape_name(key) if prefix else key)  # the core has fitted only the outer keys
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{name}.")
        else:
            yield cut_name(name), stored_text(json.dumps(value) if isinstance(value, list | Mapping) else str(value))
