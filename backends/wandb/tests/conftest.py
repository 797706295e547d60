# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PilImage
from trackhub_wandb import WandBBackend, WandBOptions, sdk_start_and_stop
from trackhub_wandb.sdk_start_and_stop import abandon_runs, import_sdk

from tests.support.wandb_emulator import Emulator
from trackhub.spi import BackendContext, Blob, Entry, JobInfo, Metrics, Payload, RunInfo, Side

JOB = JobInfo("6f2c8a10-0000-4000-8000-000000000001", "fedavg lr=0.1")
"""A job whose name differs from its id. A person finds it as `JOB.unique_name`."""

T0 = 1_700_000_000.5


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep every test away from the home folder and the W&B settings of whoever runs it."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.setenv(name, str(home / "netrc" if name == "NETRC" else home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    singleton = import_sdk().sdk.wandb_setup._singleton
    if singleton is not None:
        abandon_runs([*singleton._active_runs, *sdk_start_and_stop._own_runs.get(singleton, ())])


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """A W&B server. The test fails if the client did anything that a server would not accept."""
    with Emulator() as server:
        yield server
    assert server.violations == []


class Rig:
    """One receiver's folder, and what backends in it need."""

    def __init__(self, folder: Path, job: JobInfo = JOB) -> None:
        self.folder = folder
        self.job = job
        self.wandb_dir = folder / "wandb"
        self.blobs = folder / "trackhub" / "blobs"
        self.wandb_dir.mkdir(parents=True)
        self.blobs.mkdir(parents=True)
        self.backends: list[WandBBackend] = []

    def backend(self, **options: Any) -> WandBBackend:
        """Return a backend in this folder."""
        backend = WandBBackend(WandBOptions(**options), BackendContext(self.wandb_dir, self.job, Side.SERVER))
        self.backends.append(backend)
        return backend

    def info(self, site: str = "site-1", resume_from: int = 0) -> RunInfo:
        """Return what identifies a site's run."""
        return RunInfo(self.job, site, Side.SERVER, T0, resume_from, self.blobs)

    def blob(self, content: bytes, media_type: str) -> Blob:
        """Store a blob, as the core does before it hands over the record."""
        name = f"stream-{len(list(self.blobs.iterdir()))}"
        (self.blobs / name).write_bytes(content)
        return Blob(name, len(content), hashlib.sha256(content).hexdigest(), media_type)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A receiver in an empty folder; its backends are closed at the end."""
    made = Rig(tmp_path / "run")
    yield made
    for backend in made.backends:
        backend.close()


@pytest.fixture
def online(emulator: Emulator, rig: Rig) -> Callable[..., WandBBackend]:
    """Make backends that are logged in at the emulator."""

    def make(**options: Any) -> WandBBackend:
        given = {"mode": "online", "base_url": emulator.url, "api_key": emulator.state.api_key, **options}
        return rig.backend(**{"upload_interval_s": 1.0, **given})

    return make


def entry(position: int, payload: Payload, *, step: int | None = None, round: int | None = None) -> Entry:
    """Return an entry that was logged ``position`` seconds after the first."""
    return Entry(position, T0 + position, position if step is None else step, round, payload, "stream", position)


def losses(positions: Sequence[int]) -> list[Entry]:
    """Return one metric at each of these positions."""
    return [entry(position, Metrics({"loss": position / 2})) for position in positions]


def png(width: int = 8, height: int = 6) -> bytes:
    """Return a PNG file."""
    file = io.BytesIO()
    PilImage.new("RGB", (width, height), (200, 10, 10)).save(file, "PNG")
    return file.getvalue()


def services(pid: int | None = None) -> list[str]:
    """Return the SDK's service processes of a process."""
    done = subprocess.run(["ps", "-eo", "ppid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in done.stdout.splitlines()]
    return [row[2] for row in rows if row[0] == str(pid or os.getpid()) and "wandb" in row[2] and row[1][0] != "Z"]
