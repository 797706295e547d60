# SPDX-License-Identifier: Apache-2.0
"""The MLflow store behind a server, reached over MLflow's public REST API.

The backend uses it if ``tracking_uri`` names a server. It makes each request once, with the login that MLflow's own
client would use, and the lane retries. MLflow's own client would retry a request 7 times with growing pauses, and wait
120 s for each. Only environment variables change that, and they belong to the whole process (docs/adr/0003).

Source: https://mlflow.org/docs/latest/api_reference/rest-api.html, and ``mlflow.utils.rest_utils``, mlflow 3.17.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import msgspec

from trackhub.spi import TransientError
from trackhub_mlflow.artifact_upload_by_client import put_by_client
from trackhub_mlflow.http_session import open_session
from trackhub_mlflow.options import server_url
from trackhub_mlflow.store import (
    TRAINING_MODE,
    Experiment,
    Pair,
    Point,
    RefusedError,
    SetupError,
    StoredRun,
    root_cause,
)
from trackhub_mlflow.upload_time_limit import UploadLimit

if TYPE_CHECKING:
    import requests

__all__ = ["RestStore"]

_API = "/api/2.0/mlflow"
_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
_CONNECT_S = 3.0
_PAGE = 1000

# Error codes for a request that the store will never accept. They come from the store itself, not from a proxy.
_NEVER = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"})
_TOO_LARGE = frozenset({413, 414, 431})
_LOGIN = frozenset({401, 403, 407})


class _NotFoundError(TransientError):
    """The server does not have what was asked for. Somebody may have deleted it, and may restore it."""


class _TimedOutError(TransientError):
    """The server did not answer in time."""


class RestStore:
    """The store behind an MLflow server.

    It implements `Store`, whose docstrings say what each method does, takes and raises.

    Several threads may use it. Each has connections of its own, since a session of ``requests`` is for one thread.
    """

    def __init__(self, uri: str, *, timeout_s: float) -> None:
        """Keep the address. Nothing is sent yet.

        Args:
            uri: the server's URI. It may hold a user and a password.
            timeout_s: longest time in seconds that one request waits. The upload of an artifact may take longer: its
                limit depends on the rate of earlier uploads.
        """
        self._url, self._login = server_url(uri)
        self._timeout_s = timeout_s
        self._upload_limit = UploadLimit()
        self._own = threading.local()
        self._sessions: set[requests.Session] = set()

    def experiment(self, name: str) -> Experiment:
        """Return the experiment of this name. Create it if there is none."""
        for _ in range(2):
            try:
                found = self._get("/experiments/get-by-name", {"experiment_name": name})["experiment"]
            except _NotFoundError:
                self._create_experiment(name)
            else:
                active = found.get("lifecycle_stage", "active") == "active"
                return Experiment(found["experiment_id"], active, found.get("artifact_location", ""))
        raise TransientError(
            f"MLflow server {self._url} created the experiment {name!r} but does not find it; see its log"
        )

    def is_experiment_deleted(self, experiment_id: str) -> bool:
        """Return whether somebody deleted this experiment."""
        found = self._get("/experiments/get", {"experiment_id": experiment_id})["experiment"]
        return bool(found.get("lifecycle_stage", "active") != "active")

    def create_run(self, experiment_id: str, name: str, start_ms: int, tags: Sequence[Pair]) -> StoredRun:
        """Create a run and return it."""
        body = {"experiment_id": experiment_id, "run_name": name, "start_time": start_ms, "tags": tags}
        return _run(self._post("/runs/create", body)["run"])

    def find_runs(self, experiment_id: str, tag: str, value: str, *, deleted: bool = False) -> list[StoredRun]:
        """Return all runs that have this tag: the active ones, or those that somebody deleted."""
        body: dict[str, Any] = {
            "experiment_ids": [experiment_id],
            "filter": f"tags.`{tag}` = '{value}'",
            "run_view_type": "DELETED_ONLY" if deleted else "ACTIVE_ONLY",
            "max_results": _PAGE,
        }
        runs: list[StoredRun] = []
        while True:
            page = self._post("/runs/search", body)
            runs += map(_run, page.get("runs", ()))
            if not page.get("next_page_token"):
                return runs
            body["page_token"] = page["next_page_token"]

    def run(self, run_id: str) -> StoredRun | None:
        """Return the run, or None if the store has none of this id."""
        try:
            return _run(self._get("/runs/get", {"run_id": run_id})["run"])
        except _NotFoundError:
            return None

    def update_run(self, run_id: str, status: str, end_ms: int | None) -> None:
        """Set a run's status and the time of its end."""
        body: dict[str, Any] = {"run_id": run_id, "status": status}
        self._post("/runs/update", body if end_ms is None else body | {"end_time": end_ms})

    def log_batch(self, run_id: str, points: Sequence[Point], params: Sequence[Pair], tags: Sequence[Pair]) -> None:
        """Store points, params and tags of a run. They must keep MLflow's limits for one batch."""
        metrics: list[Any] = list(points)
        for index, point in enumerate(points):
            if math.isnan(point.value):  # JSON has no NaN; protobuf's JSON form has a string for it
                metrics[index] = msgspec.structs.asdict(point) | {"value": "NaN"}
        self._post("/runs/log-batch", {"run_id": run_id, "metrics": metrics, "params": params, "tags": tags})

    def delete_tag(self, run_id: str, key: str) -> None:
        """Remove a tag. Do nothing if the run does not have it."""
        with contextlib.suppress(_NotFoundError):
            self._post("/runs/delete-tag", {"run_id": run_id, "key": key})

    def delete_run(self, run_id: str) -> None:
        """Mark a run as deleted, as MLflow's UI does."""
        self._post("/runs/delete", {"run_id": run_id})

    def put_artifact(self, run: StoredRun, path: str, content: bytes | Path) -> None:
        """Store one artifact through the server, or by MLflow's own client if the server serves no artifacts."""
        root = urlsplit(run.artifact_uri)
        if root.scheme == "mlflow-artifacts":
            here = urlsplit(self._url)
            base = f"{here.scheme}://{root.netloc}" if root.netloc else self._url
            url = f"{base}{_ARTIFACTS}/{root.path.strip('/')}/{path}"
        elif root.scheme in ("http", "https"):
            url = f"{run.artifact_uri.rstrip('/')}/{path}"
        else:
            put_by_client(run.artifact_uri, path, content)
            return
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        started = time.monotonic()
        try:
            self._upload(quote(url, safe="/:[]@%"), content, self._timeout_s + self._upload_limit.seconds(size))
        except _TimedOutError:
            self._upload_limit.timed_out()
            raise
        self._upload_limit.succeeded(size, time.monotonic() - started)

    def _upload(self, url: str, content: bytes | Path, timeout_s: float) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        if isinstance(content, bytes):
            self._request("PUT", url, timeout_s=timeout_s, data=content, headers=headers)
            return
        with content.open("rb") as file:
            self._request("PUT", url, timeout_s=timeout_s, data=file, headers=headers)

    def artifact_sizes(self, run: StoredRun, folder: str) -> dict[str, int]:
        """Return the names in a folder of a run's artifacts with their sizes in bytes; a folder has the size -1."""
        query = {"run_id": run.id} | ({"path": folder} if folder else {})
        sizes: dict[str, int] = {}
        while True:
            page = self._get("/artifacts/list", query)
            for file in page.get("files", ()):
                name = file["path"].rpartition("/")[2]
                sizes[name] = -1 if file.get("is_dir") else int(file.get("file_size", 0))
            if not page.get("next_page_token"):
                return sizes
            query["page_token"] = page["next_page_token"]

    def artifact_sha256(self, run: StoredRun, path: str) -> str:
        """Return the SHA-256 of an artifact's content, in hex. The content is read with the UI's own request."""
        from requests.exceptions import RequestException

        query = {"run_uuid": run.id, "path": path}
        sha256 = hashlib.sha256()
        try:
            with self._request("GET", f"{self._url}/get-artifact", params=query, stream=True) as response:
                for chunk in response.iter_content(1 << 20):
                    sha256.update(chunk)
        except RequestException as error:
            raise TransientError(
                f"artifact {path} cannot be read from {self._url}: {root_cause(error)}; see the server's log"
            ) from error
        return sha256.hexdigest()

    def run_url(self, run: StoredRun) -> str:
        """Return the address of the run's charts, in the UI's mode for training."""
        return f"{self._url}/#/experiments/{run.experiment_id}/runs/{run.id}/model-metrics?{TRAINING_MODE}"

    def close(self) -> None:
        """Close the connections. The next call opens them again."""
        self._own = threading.local()
        while self._sessions:
            self._sessions.pop().close()

    def _create_experiment(self, name: str) -> None:
        tags = [Pair("mlflow.experimentKind", "custom_model_development")]
        try:
            self._post("/experiments/create", {"name": name, "tags": tags})
        except RefusedError as error:
            if "RESOURCE_ALREADY_EXISTS" not in str(error):  # otherwise another receiver was quicker
                raise SetupError(f"MLflow refuses the experiment {name!r}: {error}") from error

    def _get(self, path: str, query: Mapping[str, str]) -> dict[str, Any]:
        return self._json(self._request("GET", f"{self._url}{_API}{path}", params=query))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        data = msgspec.json.encode(body)
        return self._json(self._request("POST", f"{self._url}{_API}{path}", data=data, headers=headers))

    def _json(self, response: requests.Response) -> dict[str, Any]:
        try:
            reply = response.json()
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise SetupError(f"{self._url} does not answer as an MLflow server does: {_excerpt(response)}")
        return reply

    def _request(self, method: str, url: str, *, timeout_s: float | None = None, **kwargs: Any) -> requests.Response:
        from requests import exceptions

        session = self._session()
        timeout = (min(_CONNECT_S, self._timeout_s), timeout_s or self._timeout_s)
        try:
            response = session.request(method, url, timeout=timeout, verify=session.verify, **kwargs)
        except exceptions.SSLError as error:
            raise SetupError(f"MLflow server {self._url}: TLS fails: {root_cause(error)}") from error
        except (exceptions.InvalidURL, exceptions.InvalidSchema, exceptions.InvalidHeader) as error:
            raise SetupError(f"MLflow server {self._url} cannot be asked: {root_cause(error)}") from error
        except exceptions.ProxyError as error:
            raise TransientError(
                f"the proxy on the way to MLflow server {self._url} cannot be used: {root_cause(error)}. Check "
                "HTTPS_PROXY and HTTP_PROXY in the environment of the receiver, or name the server in NO_PROXY"
            ) from error
        except exceptions.Timeout as error:
            raise _TimedOutError(
                f"MLflow server {self._url} does not answer within {timeout[1]:.4g} s; see whether it is overloaded"
            ) from error
        except exceptions.RequestException as error:
            raise TransientError(
                f"MLflow server {self._url} cannot be reached: {root_cause(error)}; see whether it runs"
            ) from error
        if 200 <= response.status_code < 300:  # `response.ok` holds for a redirect without a target, too
            return response
        raise self._failure(response)

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._own, "session", None)
        if session is None:
            session = self._own.session = open_session(self._login)
            self._sessions.add(session)
        return session

    def _failure(self, response: requests.Response) -> Exception:
        """Return the error that a reply other than 2xx stands for."""
        status = response.status_code
        try:
            reply = response.json()
        except ValueError:
            reply = None
        code = str(reply.get("error_code", "")) if isinstance(reply, dict) else ""
        said = f"{code}: {reply.get('message', '')}"[:500] if isinstance(reply, dict) and code else _excerpt(response)
        if status in _TOO_LARGE or (400 <= status < 500 and code in _NEVER | {"RESOURCE_ALREADY_EXISTS"}):
            return RefusedError(said)
        if status in _LOGIN:
            self.close()  # the next attempt reads the login again: somebody may have changed it
            return SetupError(
                f"MLflow server {self._url} refuses access (HTTP {status}: {said}). Set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment of the receiver"
            )
        if status == 404 and code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            return _NotFoundError(f"MLflow server {self._url}: {said}")
        if 300 <= status < 400 or status in (404, 405, 501):
            return SetupError(f"{self._url} does not answer as an MLflow server does: HTTP {status}: {said}")
        message = f"MLflow server {self._url} answers HTTP {status}: {said}"
        return TransientError(message, retry_after_s=_retry_after_s(response.headers.get("Retry-After")))


def _run(reply: Mapping[str, Any]) -> StoredRun:
    info, data = reply["info"], reply.get("data", {})
    return StoredRun(
        id=info["run_id"],
        experiment_id=info["experiment_id"],
        status=info.get("status", "RUNNING"),
        start_ms=int(info.get("start_time", 0)),
        end_ms=int(info.get("end_time", 0)),
        artifact_uri=info.get("artifact_uri", ""),
        active=info.get("lifecycle_stage", "active") == "active",
        tags={tag["key"]: tag.get("value", "") for tag in data.get("tags", ())},
        params={param["key"]: param.get("value", "") for param in data.get("params", ())},
    )


def _retry_after_s(header: str | None) -> float | None:
    """Parse a Retry-After header: a number of seconds, or a date. Return None for anything else."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _excerpt(response: requests.Response) -> str:
    text = " ".join(response.text[:2000].split())
    return text[:200] or f"an empty reply, HTTP {response.status_code}"
