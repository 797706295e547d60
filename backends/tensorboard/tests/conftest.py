# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trackhub_tensorboard import TensorBoardBackend, TensorBoardOptions
from trackhub_tensorboard.backend import TensorBoardRun

from trackhub.spi import BackendContext, Blob, Entry, JobInfo, Params, Payload, RunInfo, Side, Tags

JOB = JobInfo("6f2c8a10-0000-4000-8000-000000000001", "fedavg lr=0.1")
"""A job whose name differs from its id. A person finds it as `JOB.unique_name`."""

JOB_FOLDER = "fedavg%20lr=0.1-6f2c8a10"
"""The folder of `JOB`."""


class Rig:
    """One receiver's backend and its runs, without a lane."""

    def __init__(self, root: Path, *, side: Side = Side.SERVER, logdir: str | None = None) -> None:
        self.workdir = root / "tensorboard"
        self.blob_dir = root / "blobs"
        self.workdir.mkdir(parents=True)
        self.blob_dir.mkdir()
        self.side = side
        self.backend = TensorBoardBackend(TensorBoardOptions(logdir), BackendContext(self.workdir, JOB, side))

    def info(self, site: str = "site-1", job: JobInfo = JOB) -> RunInfo:
        return RunInfo(job, site, self.side, created=1000.0, resume_from=0, blob_dir=self.blob_dir)

    def open(self, site: str = "site-1", job: JobInfo = JOB) -> TensorBoardRun:
        return self.backend.open_run(self.info(site, job))

    def folder(self, site: str = "site-1") -> Path:
        return self.workdir / JOB_FOLDER / site

    def blob(self, name: str, content: bytes) -> Blob:
        (self.blob_dir / name).write_bytes(content)
        return Blob(name, len(content), hashlib.sha256(content).hexdigest(), "image/png")


def make_entry(position: int, payload: Payload, step: int | None = None, time: float | None = None) -> Entry:
    at = 1000.0 + position / 8 if time is None else time
    if step is None and not isinstance(payload, (Params, Tags)):
        step = position
    return Entry(position, at, step, None, payload, "stream", position)


def read_folder(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(
        str(folder),
        size_guidance=dict.fromkeys(("scalars", "tensors", "images", "histograms", "compressedHistograms", "audio"), 0),
    )
    accumulator.Reload()
    return accumulator


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "run")


@pytest.fixture
def make_rig(tmp_path: Path) -> Callable[..., Rig]:
    def make(name: str, **options: Any) -> Rig:
        return Rig(tmp_path / name, **options)

    return make


@pytest.fixture
def entry() -> Callable[..., Entry]:
    return make_entry


@pytest.fixture
def read() -> Callable[[Path], EventAccumulator]:
    return read_folder
