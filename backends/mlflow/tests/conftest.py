# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from trackhub_mlflow import MLflowBackend, MLflowOptions
from trackhub_mlflow.run import MLflowRun
from trackhub_mlflow.sqlite_store import SqliteStore

from tests.support.mlflow_server import JOB, Database, Server
from trackhub.spi import FEDERATION, BackendContext, Blob, Entry, JobInfo, Payload, RunInfo, RunKey, Side

T0 = 1_700_000_000.0


class Rig:
    """One receiver's backend, its runs and their store, without a lane."""

    def __init__(
        self, root: Path, *, job: str = JOB, job_info: JobInfo | None = None, side: Side = Side.SERVER, **options: Any
    ) -> None:
        self.workdir = root / "mlflow"
        self.blob_dir = root / "blobs"
        for folder in (self.workdir, self.blob_dir):
            folder.mkdir(parents=True, exist_ok=True)
        self.job_info = job_info or JobInfo(job)
        self.job, self.side = self.job_info.id, side
        self.backend = MLflowBackend(MLflowOptions(**options), BackendContext(self.workdir, self.job_info, side))

    @property
    def database(self) -> Database:
        return Database(self.workdir / "mlflow.db")

    def info(self, site: str = "site-1", *, resume_from: int = 0, created: float = T0) -> RunInfo:
        parent = None if site == FEDERATION else RunKey(self.job, FEDERATION)
        return RunInfo(self.job_info, site, self.side, created, resume_from, self.blob_dir, parent)

    def open(self, site: str = "site-1", *, resume_from: int = 0, created: float = T0) -> MLflowRun:
        return self.backend.open_run(self.info(site, resume_from=resume_from, created=created))

    def blob(self, name: str, content: bytes, media_type: str = "image/png") -> Blob:
        (self.blob_dir / name).write_bytes(content)
        return Blob(name, len(content), hashlib.sha256(content).hexdigest(), media_type)

    def artifacts(self, site: str = "site-1") -> dict[str, bytes]:
        """Return path and content of what lies in the run's artifact folder."""
        uri = self.database.site_run(site, self.job).artifact_uri
        root = self.workdir / "mlartifacts" / uri.removeprefix("mlflow-artifacts:/")
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def make_entry(position: int, payload: Payload, step: int | None = None, time: float | None = None) -> Entry:
    at = T0 + position / 8 if time is None else time
    return Entry(position, at, position if step is None else step, None, payload, "stream", position)


@pytest.fixture
def entry() -> Callable[..., Entry]:
    return make_entry


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store to copy, because creating one takes a second."""
    file = tmp_path_factory.mktemp("template") / "mlflow.db"
    store = SqliteStore(file)
    store.experiment("Default")
    store.close()
    return file


@pytest.fixture
def make_rig(tmp_path: Path, template: Path) -> Callable[..., Rig]:
    def make(name: str = "receiver", *, empty: bool = False, **options: Any) -> Rig:
        rig = Rig(tmp_path / name, **options)
        file = rig.workdir / "mlflow.db"
        if not empty and not file.exists():
            shutil.copyfile(template, file)
        return rig

    return make


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(template, folder / "mlflow.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    """The one server of this session, running. A test that kills it need not start it again."""
    yield running_server
    if not running_server.is_running():
        running_server.start()


@pytest.fixture
def make_server() -> Iterator[Callable[[Path, Sequence[str]], Server]]:
    """Starts further servers by a command of MLflow's, in a folder with a store."""
    servers: list[Server] = []

    def make(folder: Path, command: Sequence[str]) -> Server:
        server = Server(folder, command)
        servers.append(server)
        server.start()
        return server

    yield make
    for server in servers:
        server.kill()
