# SPDX-License-Identifier: Apache-2.0
"""How fast a backend takes a journal's records, against the bare SDK's own call for the same rows."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from tests.bench.arms import flare_arm, trackhub_into
from tests.bench.child import in_child
from tests.bench.figures import Arm, Experiment, Figure, Run
from tests.bench.stores import count_event_files, count_mlflow, count_wandb

__all__ = ["experiments"]

_ROWS_PER_CALL = 1000
_SHARED = (
    "the lane shares its process with FLARE, and two cores with the trainers; alone it stores at the bare rate, as the "
    "figure from the journal shows"
)


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    scalars, rows = (20_000, 5_000) if quick else (30_000, 10_000)
    batches = f"MLflow's log_batch of {_ROWS_PER_CALL}"
    found = [
        _experiment("tensorboard", scalars, quick, "SummaryWriter.add_scalar + close", 5, "backends:add_scalars"),
        _experiment("mlflow", rows, quick, batches, 0.95, "backends:log_batches", name="mlflow sqlite", in_job=20_000),
        _experiment("wandb", rows, quick, "wandb run.log + finish", 0.95, "backends:run_logs", name="wandb offline",
                    in_job=10_000),
    ]  # fmt: skip
    if quick:  # a server takes ten seconds to start
        return found
    alternative = f"log_batch of {_ROWS_PER_CALL} to such a server"
    return [
        *found,
        _experiment(
            "mlflow", rows, quick, alternative, 0.95, "backends:log_batches", name="mlflow server", server=True
        ),
    ]


def _experiment(
    backend: str, rows: int, quick: bool, alternative: str, reach: float, bare: str, *, name: str = "",
    server: bool = False, in_job: int = 0,
) -> Experiment:  # fmt: skip
    """From the journal into a store and, unless it must be quick, from ``in_job`` calls at each of two sites."""
    name = name or backend

    def arm(function: str) -> Arm:
        def run(folder: Path) -> Run:
            url = _mlflow_server() if server else ""
            result = in_child(function, folder=str(folder), rows=rows, backend=backend, url=url)
            return Run({"rate": rows / result["seconds"]}, rows, result["stored"])

        return run

    def figure(what: str, arm: str, reach: float, explain: str = "") -> Figure:
        return Figure(what, alternative, "rate", arm, "bare", "records/s", "times more", reach, explain)

    arms = {"trackhub": arm("backends:from_journal"), "bare": arm(bare)}
    figures = [figure(f"{name}: from journal to store", "trackhub", reach)]
    if in_job and not quick:
        arms["job"] = flare_arm(trackhub_into(backend), records=in_job)
        figures.append(figure(f"2 sites x {in_job:,} into {backend}, end to end, 0 lost", "job", 0.9, _SHARED))
    return Experiment(name, arms, figures, repeat=1 if quick else 5)


def from_journal(folder: str, rows: int, backend: str, url: str) -> dict[str, Any]:
    """Fill a journal, and deliver it."""
    from tests.bench.load import deliver, fill_journal
    from trackhub import registry

    root, job = Path(folder), uuid.uuid4().hex
    options: dict[str, Any] = {"mode": "offline"} if backend == "wandb" else {}
    if url:
        options = {"tracking_uri": url}
    registry.load(backend)
    _warm_up(backend, root / "warm")
    fill_journal(root, 1, rows, job=job)
    before = count_mlflow(_database(url)) if url else 0
    seconds, _ = deliver(root, {backend: options}, job)
    count = {"tensorboard": count_event_files, "mlflow": count_mlflow, "wandb": count_wandb}[backend]
    store = _database(url) if url else root / "mlflow" / "mlflow.db" if backend == "mlflow" else root
    return {"seconds": seconds, "stored": count(store) - before}


def _warm_up(backend: str, folder: Path) -> None:
    """Have the SDK imported: the bare arms do not count that either."""
    from tests.bench.load import deliver, fill_journal

    fill_journal(folder, 1, 1)
    deliver(folder, {backend: {"mode": "offline"} if backend == "wandb" else {}})
    shutil.rmtree(folder)


def add_scalars(folder: str, rows: int, backend: str, url: str) -> dict[str, Any]:
    """Write with PyTorch's SummaryWriter."""
    from torch.utils.tensorboard import SummaryWriter

    begin = time.perf_counter()
    writer = SummaryWriter(folder)
    for step in range(rows):
        writer.add_scalar("train/loss", 1.0 / (step + 1), step, walltime=1.75e9 + step)
    writer.close()
    return {"seconds": time.perf_counter() - begin, "stored": count_event_files(Path(folder))}


def log_batches(folder: str, rows: int, backend: str, url: str, runs: int = 1) -> dict[str, Any]:
    """Write so many rows into each run with MLflow's client, in batches of a thousand, which is as many as it takes."""
    import mlflow
    from mlflow.entities import Metric

    root = Path(folder)
    database = _database(url) if url else root / "bare.db"
    before = count_mlflow(database) if url else 0
    client = mlflow.MlflowClient(url or f"sqlite:///{database}")
    experiment = client.create_experiment(f"bench {uuid.uuid4().hex}", artifact_location=str(root / "artifacts"))
    begin = time.perf_counter()
    for _ in range(runs):
        run = client.create_run(experiment).info.run_id
        for first in range(0, rows, _ROWS_PER_CALL):
            steps = range(first, min(first + _ROWS_PER_CALL, rows))
            metrics = [Metric("train/loss", 1.0 / (step + 1), 1_750_000_000_000 + step, step) for step in steps]
            client.log_batch(run, metrics=metrics)
        client.set_terminated(run)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "stored": count_mlflow(database) - before}


def run_logs(folder: str, rows: int, backend: str, url: str) -> dict[str, Any]:
    """Write with W&B's SDK, offline: rows with time stamp, step and round, as trackhub stores them."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    begin = time.perf_counter()
    run = wandb.init(dir=folder, mode="offline", project="bench", settings=settings)
    for step in range(rows):
        run.log({"train/loss": 1.0 / (step + 1), "step": step, "round": 0, "_timestamp": 1.75e9 + step}, step=step)
    run.finish()
    wandb.teardown()
    return {"seconds": time.perf_counter() - begin, "stored": count_wandb(Path(folder))}


@functools.cache
def _mlflow_server() -> str:
    """Run an MLflow server with one worker until this process ends, and return its URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    root = _database(url).parent
    root.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{_database(url)}", "--artifacts-destination", str(root / "artifacts")],
        cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip

    def end() -> None:
        process.terminate()
        process.wait(30)
        shutil.rmtree(root, ignore_errors=True)

    atexit.register(end)
    deadline = time.monotonic() + 120
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the MLflow server did not start")
        time.sleep(0.1)
    return url


def _database(url: str) -> Path:
    """Return the file of the server at this URL; the arms, which are processes of their own, count what is in it."""
    return Path(tempfile.gettempdir(), f"trackhub-bench-mlflow-{url.rpartition(':')[2]}", "server.db")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
