# SPDX-License-Identifier: Apache-2.0
"""What the emulated server holds, and which of the client's requests a real server would not accept.

`tests.support.wandb_emulator.http_server` calls it for each request.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.support.wandb_emulator.graphql import Call, GraphQLError

__all__ = ["ENTITY", "OPERATIONS", "SDK_UNNAMED", "Artifact", "Counting", "Run", "State"]

ENTITY = "emulated-team"
"""The default entity of the server's only account."""

Counting = Literal["right", "missing", "zero", "lagging", "too high"]
"""What ``historyLineCount`` is: the number of rows; null; always 0; the number of a minute ago; 7 too many.

A client that resumes a run writes at the offset that this number gives. A server whose number is wrong cannot go by
the offset. So it appends what comes, as openwandb 0.5 does. Where the number is null, the SDK refuses to resume; the
emulator then says 0 to the SDK.
"""

LAG_S = 60.0

HISTORY = "wandb-history.jsonl"
EVENTS = "wandb-events.jsonl"
SUMMARY = "wandb-summary.json"
OUTPUT = "output.log"

OPERATIONS = frozenset(
    {
        "ArtifactType",
        "ClientIDMapping",
        "CommitArtifact",
        "CreateArtifact",
        "CreateArtifactFiles",
        "CreateArtifactManifest",
        "CreateRunFiles",
        "RunResumeStatus",
        "RunStoppedStatus",
        "ServerFeaturesQuery",
        "TrackhubRunFiles",
        "TrackhubRunState",
        "UpsertBucket",
        "Viewer",
    }
)
"""The GraphQL operations that the client is known to send. Any other one fails the test."""

SDK_UNNAMED = frozenset({"ArtifactType", "ClientIDMapping"})
"""Those of them that the SDK sends with an empty ``operationName``."""

_UPSERT = frozenset(
    """
    id name groupName modelName entityName description displayName notes config commit host debug jobProgram jobRepo
    jobType state sweep tags summaryMetrics
    """.split()  # noqa: SIM905  # a list with one name a line would be longer and no clearer
)
_CREATE_ARTIFACT = frozenset(
    """
    entityName projectName artifactTypeName artifactCollectionName artifactCollectionNames runName digest
    digestAlgorithm description aliases tags labels metadata ttlDurationSeconds historyStep enableDigestDeduplication
    distributedID clientID sequenceClientID clientMutationId storageRegion
    """.split()  # noqa: SIM905
)


@dataclass
class Run:
    """A run on the server.

    Attributes:
        rows: the lines of the history, in order.
        config: the run's config as the client sent it: name to ``{"value": ...}``.
        state: ``running``, ``finished``, ``crashed`` or ``failed``.
        files: uploaded files by name.
        resent: how many lines of the history came again after they had been stored.
    """

    storage_id: str
    entity: str
    project: str
    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    summary: str = "{}"
    output: dict[int, str] = field(default_factory=dict)
    state: str = "running"
    exit_code: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    resent: int = 0
    opened: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)

    def history(self) -> list[dict[str, Any]]:
        """Return the rows as dicts, NaN and infinities as floats."""
        return [json.loads(row) for row in self.rows]

    def params(self) -> dict[str, Any]:
        """Return the values of the config, without the SDK's own entry."""
        return {name: item["value"] for name, item in self.config.items() if name != "_wandb"}


@dataclass
class Artifact:
    """One artifact version."""

    artifact_id: str
    collection: str
    artifact_type: str
    digest: str
    run_name: str | None
    metadata: dict[str, Any]
    state: str = "PENDING"
    files: dict[str, bytes] = field(default_factory=dict)


class State:
    """Everything that the server holds. The caller of a method holds ``lock``."""

    def __init__(self, api_key: str, counting: Counting = "right") -> None:
        self.api_key = api_key
        self.counting: Counting = counting
        self.lock = threading.RLock()
        self.url = ""
        self.runs: dict[str, Run] = {}
        self.artifacts: list[Artifact] = []
        self.violations: list[str] = []
        self.requests: list[str] = []
        self._uploads: dict[str, tuple[dict[str, bytes], str]] = {}
        self._ids = itertools.count(1)

    def run(self, name: str) -> Run:
        """Return the run with this id."""
        with self.lock:
            return self.runs[name]

    def _find(self, entity: str, project: str, name: str) -> Run | None:
        run = self.runs.get(name)
        return run if run is not None and (run.entity, run.project) == (entity, project) else None

    def violation(self, text: str) -> None:
        """Note a request that a real server would not accept, or that this emulator does not know."""
        self.violations.append(text)

    def _id(self, kind: str) -> str:
        return base64.b64encode(f"{kind}:{next(self._ids)}".encode()).decode()

    def root(self) -> dict[str, Any]:
        """Return the root of the GraphQL schema, with queries and mutations together."""
        scope = frozenset({"name", "entityName"})
        return {
            "viewer": self._viewer(),
            "serverInfo": {"features": []},
            "model": Call(self._model, scope),
            "project": Call(self._project, scope),
            "clientIDMapping": Call(lambda given: None, frozenset({"clientID"})),
            "upsertBucket": Call(lambda given: self._upsert(given["input"]), frozenset({"input"})),
            "createRunFiles": Call(lambda given: self._create_run_files(given["input"]), frozenset({"input"})),
            "createArtifact": Call(lambda given: self._create_artifact(given["input"]), frozenset({"input"})),
            "createArtifactManifest": Call(lambda given: self._create_manifest(given["input"]), frozenset({"input"})),
            "createArtifactFiles": Call(lambda given: self._artifact_files(given["input"]), frozenset({"input"})),
            "commitArtifact": Call(lambda given: self._commit(given["input"]), frozenset({"input"})),
        }

    def _viewer(self) -> dict[str, Any]:
        return {
            "id": "VXNlcjox",
            "entity": ENTITY,
            "username": "emulated-user",
            "email": "user@example.org",
            "flags": "{}",
            "teams": {"edges": [{"node": {"name": ENTITY}}]},
        }

    def _model(self, given: dict[str, Any]) -> dict[str, Any]:
        entity = given.get("entityName") or ENTITY

        def bucket(asked: dict[str, Any]) -> dict[str, Any] | None:
            run = self._find(entity, given["name"], asked["name"])
            return None if run is None else self._bucket(run)

        return {
            "id": f"project:{given['name']}",
            "name": given["name"],
            "entity": {"id": f"entity:{entity}", "name": entity},
            "bucket": Call(bucket, frozenset({"name", "missingOk"})),
        }

    def _project(self, given: dict[str, Any]) -> dict[str, Any]:
        def find(asked: dict[str, Any]) -> dict[str, Any] | None:
            run = self._find(given.get("entityName") or ENTITY, given["name"], asked["name"])
            if run is None:
                return None
            return {"stopped": False, "files": Call(lambda some: _files(run, some), frozenset({"names", "first"}))}

        def artifact(asked: dict[str, Any]) -> dict[str, Any] | None:
            collection = asked["name"].partition(":")[0]
            held = next((one for one in self.artifacts if one.collection == collection), None)
            return None if held is None else {"artifactType": {"name": held.artifact_type}}

        return {"run": Call(find, frozenset({"name"})), "artifact": Call(artifact, frozenset({"name"}))}

    def _bucket(self, run: Run) -> dict[str, Any]:
        def wandb_config(asked: dict[str, Any]) -> str:
            held = run.config.get("_wandb", {}).get("value", {})
            return json.dumps({key: held[key] for key in asked["keys"] if key in held})

        entity = {"id": f"entity:{run.entity}", "name": run.entity}
        return {
            "id": run.storage_id,
            "name": run.name,
            "displayName": run.fields.get("displayName"),
            "description": None,
            "notes": run.fields.get("notes"),
            "tags": list(run.tags),
            "config": json.dumps(run.config),
            "sweepName": None,
            "summaryMetrics": run.summary,
            "historyLineCount": self._row_count(run),  # the last name in `requests` is the one of the caller
            "eventsLineCount": len(run.events),
            "logLineCount": len(run.output),
            "historyTail": json.dumps(run.rows[-1:]),
            "eventsTail": json.dumps(run.events[-1:]),
            "wandbConfig": Call(wandb_config, frozenset({"keys"})),
            "project": {"id": f"project:{run.project}", "name": run.project, "entity": entity},
        }

    def _row_count(self, run: Run) -> int | None:
        match self.counting:
            case "missing":
                return None if self.requests[-1:] == ["TrackhubRunState"] else 0
            case "zero":
                return 0
            case "lagging":
                before = time.monotonic() - LAG_S
                return max((count for at, count in run.arrivals if at <= before), default=0)
            case "too high":
                return len(run.rows) + 7 if run.rows else 0
            case _:
                return len(run.rows)

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        _check("upsertBucket", given, _UPSERT)
        name = given["name"]
        entity = given.get("entityName") or ENTITY
        run = self._find(entity, given["modelName"], name)
        inserted = run is None
        if run is None:
            if name in self.runs:
                self.violation(
                    f"upsertBucket: run {name} exists in another project; run ids are unique in this emulator"
                )
            run = self.runs[name] = Run(self._id("Run"), entity, given["modelName"], name)
        if given.get("id") not in (None, run.storage_id):
            self.violation(f"upsertBucket: id {given['id']} belongs to another run than {name}")
        if run.state != "running":
            run.state, run.exit_code = "running", None
        run.opened += 1
        run.fields.update({key: value for key, value in given.items() if value is not None and key != "config"})
        if given.get("tags") is not None:
            run.tags = list(given["tags"])
        if any(not 1 <= len(tag) <= 64 for tag in run.tags):
            self.violation(f"upsertBucket: a tag of {name} is empty or longer than 64 characters")
        if given.get("config") is not None:
            # A real server accepts strict JSON only.
            run.config = json.loads(given["config"], parse_constant=lambda text: self.violation(f"config: {text}"))
        return {"bucket": self._bucket(run), "inserted": inserted}

    def _create_run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        _check("createRunFiles", given, frozenset({"entityName", "projectName", "runName", "files"}))
        run = self._find(given["entityName"], given["projectName"], given["runName"])
        if run is None:
            raise GraphQLError(f"createRunFiles: no run {given['runName']}")
        files = [{"name": name, "uploadUrl": self._upload_url(run.files, name)} for name in given["files"]]
        return {"runID": run.storage_id, "uploadHeaders": [], "files": files}

    def _create_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        _check("createArtifact", given, _CREATE_ARTIFACT)
        collection, digest = given["artifactCollectionName"], given["digest"]
        same = [one for one in self.artifacts if one.collection == collection]
        artifact = next((one for one in same if one.digest == digest), None)
        if artifact is None:
            metadata = json.loads(given.get("metadata") or "{}")
            artifact = Artifact(
                self._id("Artifact"), collection, given["artifactTypeName"], digest, given.get("runName"), metadata
            )
            self.artifacts.append(artifact)
        committed = [one for one in same if one.state == "COMMITTED"]
        latest = {"id": committed[-1].artifact_id} if committed else None
        sequence = {"latestArtifact": latest}
        return {"artifact": {"id": artifact.artifact_id, "state": artifact.state, "artifactSequence": sequence}}

    def _create_manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(given["artifactID"])
        url = self._upload_url(artifact.files, given["name"])
        file = {"id": self._id("File"), "uploadUrl": url, "uploadHeaders": []}
        return {"artifactManifest": {"id": self._id("Manifest"), "file": file}}

    def _artifact_files(self, given: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for spec in given["artifactFiles"]:
            artifact = self._artifact(spec["artifactID"])
            node: dict[str, Any] = {
                "storagePath": f"wandb_artifacts/{artifact.artifact_id}/{spec['name']}",
                "uploadUrl": self._upload_url(artifact.files, spec["name"]),
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": artifact.artifact_id},
            }
            edges.append({"node": node})
        return {"files": {"edges": edges}}

    def _commit(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(given["artifactID"])
        artifact.state = "COMMITTED"
        return {"artifact": {"id": artifact.artifact_id, "digest": artifact.digest}}

    def _artifact(self, artifact_id: str) -> Artifact:
        return next(one for one in self.artifacts if one.artifact_id == artifact_id)

    def _upload_url(self, target: dict[str, bytes], name: str) -> str:
        token = hashlib.sha256(f"{next(self._ids)}:{name}".encode()).hexdigest()[:24]
        self._uploads[token] = (target, name)
        return f"{self.url}/upload/{token}"

    def upload(self, token: str, data: bytes) -> bool:
        """Store an uploaded file. Return False if the server gave no URL with this token."""
        if token not in self._uploads:
            return False
        target, name = self._uploads[token]
        target[name] = data
        return True

    def file_stream(self, entity: str, project: str, name: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Apply a ``file_stream`` request. Return the reply, or None if there is no such run."""
        run = self._find(entity, project, name)
        if run is None:
            self.violation(f"file_stream: no run {name}")
            return None
        if extra := set(body) - {"files", "uploaded", "preempting", "complete", "exitcode"}:
            self.violation(f"file_stream: fields {sorted(extra)} are not known")
        if run.state != "running":
            self.violation(f"file_stream: run {name} has ended, and the client did not resume it")
        for file, chunk in (body.get("files") or {}).items():
            offset, content = chunk["offset"], chunk["content"]
            if file == HISTORY:
                self._append(run, "history", run.rows, offset, content)
                self._check_rows(run)
            elif file == EVENTS:
                self._append(run, "events", run.events, offset, content)
            elif file == SUMMARY:
                run.summary = content[-1]
            elif file == OUTPUT:
                run.output.update({offset + number: line for number, line in enumerate(content)})
            else:
                self.violation(f"file_stream: file {file} is not known")
        if body.get("complete"):
            run.exit_code = body.get("exitcode", 0)
            run.state = {0: "finished", 254: "crashed"}.get(run.exit_code, "failed")
        return {"exitcode": None, "limits": {}}

    def _append(self, run: Run, what: str, lines: list[str], offset: int, content: list[str]) -> None:
        if what == "history" and self.counting != "right" and run.opened > 1:
            offset = len(lines)  # what the client was told of the rows before was wrong
        if offset > len(lines):
            self.violation(
                f"file_stream: {what} of {run.name} has {len(lines)} lines; the client writes at line {offset}"
            )
            return
        if what == "history":
            run.arrivals.append((time.monotonic(), max(len(lines), offset + len(content))))
        held = lines[offset : offset + len(content)]
        if held != content[: len(held)]:
            self.violation(
                f"file_stream: the client overwrites {what} of {run.name} from line {offset} with other content"
            )
        if what == "history":
            run.resent += len(held)
        lines[offset : offset + len(content)] = content

    def _check_rows(self, run: Run) -> None:
        steps = [int(row["_step"]) for row in run.history() if isinstance(row.get("_step"), int)]
        if len(steps) < len(run.rows) or any(later <= step for step, later in itertools.pairwise(steps)):
            self.violation(f"file_stream: _step of {run.name} does not rise in every row")


def _files(run: Run, given: dict[str, Any]) -> dict[str, Any]:
    names = given.get("names") or list(run.files)
    edges = []
    for name in names[: int(given.get("first") or 50)]:
        data = run.files.get(name)
        if data is not None:
            digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
            edges.append({"node": {"name": name, "sizeBytes": str(len(data)), "md5": digest}})
    return {"edges": edges}


def _check(where: str, given: dict[str, Any], known: frozenset[str]) -> None:
    if extra := set(given) - known:
        raise GraphQLError(f"{where}: no such input fields {sorted(extra)}")
