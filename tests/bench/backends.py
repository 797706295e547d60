# SPDX-License-Identifier: Apache-2.0
"""How fast a backend takes a journal's records, against the bare SDK's own call for the same rows."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.child import in_child
from tests.bench.figures import Arm, Experiment, Figure, Run
from tests.bench.stores import count_event_files, count_mlflow, count_wandb

__all__ = ["experiments"]

_ROWS_PER_CALL = 1000


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    scalars, rows = (20_000, 5_000) if quick else (100_000, 10_000)
    repeat = 1 if quick else 5
    found = [
        _experiment("tensorboard", "tensorboard", scalars, repeat, "SummaryWriter.add_scalar + close", 5,
                    "backends:add_scalars"),
        _experiment("mlflow sqlite", "mlflow", rows, repeat, f"MLflow's log_batch of {_ROWS_PER_CALL}", 0.95,
                    "backends:log_batches"),
        _experiment("wandb offline", "wandb", rows, repeat, "wandb run.log + finish", 0.95, "backends:run_logs"),
    ]  # fmt: skip
    if quick:  # a server takes ten seconds to start
        return found
    alternative = f"log_batch of {_ROWS_PER_CALL} to such a server"
    return [
        *found,
        _experiment("mlflow server", "mlflow", rows, 3, alternative, 0.95, "backends:log_batches", server=True),
    ]


def _experiment(
    name: str, backend: str, rows: int, repeat: int, alternative: str, reach: float, bare: str, server: bool = False
) -> Experiment:
    def arm(function: str) -> Arm:
        def run(folder: Path) -> Run:
            result = in_child(function, folder=str(folder), rows=rows, backend=backend, server=server)
            return Run({"rate": rows / result["seconds"]}, rows, result["stored"])

        return run

    figure = Figure(
        f"{name}: from journal to store", alternative, "rate", "trackhub", "bare", "records/s", "times more", reach
    )
    return Experiment(name, {"trackhub": arm("backends:from_journal"), "bare": arm(bare)}, [figure], repeat)


def from_journal(folder: str, rows: int, backend: str, server: bool) -> dict[str, Any]:
    """Fill a journal, and deliver it."""
    from tests.bench.load import deliver, fill_journal
    from trackhub import registry

    root = Path(folder)
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {},
        "mlflow": {},
        "wandb": {"mode": "offline"},
    }
    registry.load(backend)
    _warm_up(backend, root / "warm")
    fill_journal(root, 1, rows)
    with _mlflow_server(root) if server else contextlib.nullcontext("") as url:
        chosen = {"tracking_uri": url} if server else options[backend]
        seconds, _ = deliver(root, {backend: chosen})
    count = {"tensorboard": count_event_files, "mlflow": count_mlflow, "wandb": count_wandb}[backend]
    stored = count({"tensorboard": root, "mlflow": _database(root, server), "wandb": root}[backend])
    return {"seconds": seconds, "stored": stored}


def _warm_up(backend: str, folder: Path) -> None:
    """Have the SDK imported: the bare arms do not count that either."""
    from tests.bench.load import deliver, fill_journal

    fill_journal(folder, 1, 1)
    deliver(folder, {backend: {"mode": "offline"} if backend == "wandb" else {}})
    shutil.rmtree(folder)


def _database(root: Path, server: bool) -> Path:
    return root / "server.db" if server else root / "mlflow" / "mlflow.db"


def add_scalars(folder: str, rows: int, backend: str, server: bool) -> dict[str, Any]:
    """Write with PyTorch's SummaryWriter."""
    from torch.utils.tensorboard import SummaryWriter

    begin = time.perf_counter()
    writer = SummaryWriter(folder)
    for step in range(rows):
        writer.add_scalar("train/loss", 1.0 / (step + 1), step, walltime=1.75e9 + step)
    writer.close()
    return {"seconds": time.perf_counter() - begin, "stored": count_event_files(Path(folder))}


def log_batches(folder: str, rows: int, backend: str, server: bool) -> dict[str, Any]:
    """Write with MLflow's client, in batches of a thousand, which is as many as it takes."""
    import mlflow
    from mlflow.entities import Metric

    root = Path(folder)
    with _mlflow_server(root) if server else contextlib.nullcontext(f"sqlite:///{root}/bare.db") as url:
        client = mlflow.MlflowClient(url)
        experiment = client.create_experiment("bench", artifact_location=str(root / "artifacts"))
        begin = time.perf_counter()
        run = client.create_run(experiment).info.run_id
        for first in range(0, rows, _ROWS_PER_CALL):
            steps = range(first, min(first + _ROWS_PER_CALL, rows))
            metrics = [Metric("train/loss", 1.0 / (step + 1), 1_750_000_000_000 + step, step) for step in steps]
            client.log_batch(run, metrics=metrics)
        client.set_terminated(run)
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "stored": count_mlflow(root / ("server.db" if server else "bare.db"))}


def run_logs(folder: str, rows: int, backend: str, server: bool) -> dict[str, Any]:
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


@contextlib.contextmanager
def _mlflow_server(root: Path) -> Iterator[str]:
    """Run an MLflow server with one worker on a free port, and yield its URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{root}/server.db", "--artifacts-destination", str(root / "artifacts")],
        cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the MLflow server did not start")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
