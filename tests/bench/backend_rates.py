# SPDX-License-Identifier: Apache-2.0
"""How fast each backend stores a journal's records, against the bare SDK's own call for the same rows.

The command calls `experiments`; `job_costs` and `growth` call `bare` and `end_to_end`. Every arm runs in a process of
its own.
"""

from __future__ import annotations

import atexit
import functools
import gc
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.flare_job import flare_arm, trackhub_into
from tests.bench.measured_figures import Arm, Experiment, Figure, Run
from tests.bench.store_counts import count_event_files, count_mlflow, count_wandb
from tests.bench.subprocesses import in_child, kept_folder
from tests.support.mlflow_server import Server

__all__ = ["bare", "end_to_end", "experiments"]

_ROWS_PER_CALL = 1000
_BARE = {
    "tensorboard": ("SummaryWriter.add_scalar + close", "backend_rates:add_scalars"),
    "mlflow": (f"MLflow's log_batch of {_ROWS_PER_CALL}", "backend_rates:log_batches"),
    "wandb": ("wandb run.log + finish", "backend_rates:run_logs"),
}
_COUNT: dict[str, Callable[[Path], int]] = {
    "tensorboard": count_event_files,
    "mlflow": count_mlflow,
    "wandb": count_wandb,
}
_SHARED = (
    "the lane shares its process with FLARE, and two cores with the trainers; the figure from the journal shows what "
    "the lane stores alone"
)
_LANE = (
    "most of the time is the SDK's own call; in the rest, trackhub reads the journal and its frames, makes entries of "
    "them, and looks for the run before it makes one"
)


def experiments(quick: bool) -> list[Experiment]:
    """Return all experiments. For MLflow, the whole job and its alternatives have two equal runs."""
    scalars, rows = (20_000, 5_000) if quick else (30_000, 20_000)
    repeat = 1 if quick else 5
    tensorboard = _experiment("tensorboard", "tensorboard", scalars, 1, repeat, 5)
    mlflow = _experiment("mlflow sqlite", "mlflow", rows, 2, repeat, 0.95)
    wandb = _experiment("wandb offline", "wandb", 5_000, 1, repeat, 0.95)
    if quick:  # a job takes half a minute, a server ten seconds to start
        return [tensorboard, mlflow, wandb]
    job = {"job": flare_arm(trackhub_into("mlflow"), records=rows)}
    mlflow = replace(mlflow, arms={**mlflow.arms, **job}, figures=[*mlflow.figures, end_to_end("mlflow", rows, "job")])
    return [tensorboard, mlflow, wandb, _experiment("mlflow server", "mlflow", 20_000, 1, repeat, 0.95, server=True)]


def end_to_end(backend: str, records: int, arm: str) -> Figure:
    """Return the figure that compares a whole job of two sites with the bare SDK.

    Args:
        backend: where the job stores its records.
        records: records from each site.
        arm: the arm that runs the job. The bare SDK's arm must be called ``bare``.
    """
    what = f"2 sites x {records:,} into {backend}, end to end, 0 lost"
    return Figure(what, _BARE[backend][0], "rate", arm, "bare", "records/s", "times more", 0.9, _SHARED)


def bare(backend: str, rows: int, runs: int, *, server: bool = False) -> Arm:
    """Return an arm that stores rows with the SDK alone.

    Args:
        backend: which SDK.
        rows: rows in each run.
        runs: how many runs, one after the other.
        server: whether MLflow stores on a server in place of an SQLite file.
    """
    return _arm(_BARE[backend][1], backend, rows, runs, server)


def _experiment(
    name: str, backend: str, rows: int, runs: int, repeat: int, reach: float, *, server: bool = False
) -> Experiment:
    """Return the experiment that compares the way from the journal into a store with the bare SDK."""
    alternative = _BARE[backend][0] + (" to such a server" if server else "")
    arms = {
        "trackhub": _arm("backend_rates:from_journal", backend, rows, runs, server),
        "bare": bare(backend, rows, runs, server=server),
    }
    what = f"{name}: from journal to store"
    figure = Figure(what, alternative, "rate", "trackhub", "bare", "records/s", "times more", reach, _LANE)
    return Experiment(name, arms, [figure], repeat)


@functools.cache
def _new_mlflow_store() -> Path:
    """Let MLflow make a store, once for all rounds: this takes two seconds."""
    folder = kept_folder("mlflow")
    store = folder / "mlflow.db"
    arguments = {"folder": str(folder), "rows": 0, "runs": 0, "backend": "mlflow", "url": "", "store": str(store)}
    in_child("backend_rates:log_batches", **arguments)
    return store


def _arm(function: str, backend: str, rows: int, runs: int, server: bool) -> Arm:
    def run(folder: Path) -> Run:
        url, store = "", folder
        if server:
            url, store = _mlflow_server().url, _mlflow_server().database.file
        elif backend == "mlflow":
            store = Path(shutil.copy(_new_mlflow_store(), folder))
        arguments = {"folder": str(folder), "rows": rows, "runs": runs, "backend": backend, "url": url}
        result = in_child(function, store=str(store), **arguments)
        return Run({"rate": runs * rows / result["seconds"]}, runs * rows, result["stored"])

    return run


# Each of these functions stores one row first, so that no arm's first call is counted. It then takes all that is
# imported out of garbage collection, as FLARE's server does (docs/adr/0006): the collector costs all arms the same.


def from_journal(folder: str, rows: int, runs: int, backend: str, url: str, store: str) -> dict[str, Any]:
    """Fill a journal, and deliver it with trackhub."""
    from tests.bench.load import deliver, fill_journal

    root, count = Path(folder), _COUNT[backend]
    options = {"wandb": {"mode": "offline"}, "mlflow": {"tracking_uri": url or f"sqlite:///{store}"}}.get(backend, {})
    warm, job = uuid.uuid4().hex, uuid.uuid4().hex
    fill_journal(root / "warm", 1, 1, job=warm)
    deliver(root / "warm", {backend: options}, warm)
    fill_journal(root, runs, rows, job=job)
    before = count(Path(store))
    seconds, _ = deliver(root, {backend: options}, job)
    return {"seconds": seconds, "stored": count(Path(store)) - before}


def add_scalars(folder: str, rows: int, runs: int, backend: str, url: str, store: str) -> dict[str, Any]:
    """Write with PyTorch's SummaryWriter."""
    from torch.utils.tensorboard import SummaryWriter

    def write(run: str, rows: int) -> None:
        writer = SummaryWriter(f"{folder}/{run}")
        for step in range(rows):
            writer.add_scalar("train/loss", 1.0 / (step + 1), step, walltime=1.75e9 + step)
        writer.close()

    seconds = _timed(write, rows, runs)
    return {"seconds": seconds, "stored": count_event_files(Path(folder)) - 1}


def log_batches(folder: str, rows: int, runs: int, backend: str, url: str, store: str) -> dict[str, Any]:
    """Write with MLflow's client, in batches of a thousand: the largest that it takes."""
    import mlflow
    from mlflow.entities import Metric

    root, database = Path(folder), Path(store)
    before = count_mlflow(database) if database.exists() else 0
    client = mlflow.MlflowClient(url or f"sqlite:///{database}")
    experiment = client.create_experiment(f"bench {uuid.uuid4().hex}", artifact_location=str(root / "artifacts"))

    def write(_: str, rows: int) -> None:
        run = client.create_run(experiment).info.run_id
        for first in range(0, rows, _ROWS_PER_CALL):
            steps = range(first, min(first + _ROWS_PER_CALL, rows))
            metrics = [Metric("train/loss", 1.0 / (step + 1), 1_750_000_000_000 + step, step) for step in steps]
            client.log_batch(run, metrics=metrics)
        client.set_terminated(run)

    seconds = _timed(write, rows, runs)
    return {"seconds": seconds, "stored": count_mlflow(database) - before - 1}


def run_logs(folder: str, rows: int, runs: int, backend: str, url: str, store: str) -> dict[str, Any]:
    """Write with W&B's SDK, offline: rows with time, step and round, and the settings that trackhub uses."""
    import wandb
    from trackhub_wandb.sdk_start_and_stop import QUIET_SETTINGS

    def write(_: str, rows: int) -> None:
        run = wandb.init(dir=folder, mode="offline", project="bench", settings=wandb.Settings(**QUIET_SETTINGS))
        for step in range(rows):
            run.log({"train/loss": 1.0 / (step + 1), "step": step, "round": 0, "_timestamp": 1.75e9 + step}, step=step)
        run.finish()

    seconds = _timed(write, rows, runs, wandb.teardown)
    return {"seconds": seconds, "stored": count_wandb(Path(folder)) - 1}


def _timed(
    write: Callable[[str, int], None], rows: int, runs: int, end: Callable[[], None] = lambda: None
) -> float:  # fmt: skip
    """Return the seconds that it takes to write all runs, one after the other, and to end.

    Args:
        write: writes a run of this name with this many rows.
        rows: rows in each run.
        runs: how many runs.
        end: stops processes that the SDK started. trackhub's backends stop and start them as well.
    """
    write("warm", 1)
    end()
    gc.collect()
    gc.freeze()
    begin = time.perf_counter()
    for number in range(runs):
        write(f"run-{number}", rows)
    end()
    return time.perf_counter() - begin


@functools.cache
def _mlflow_server() -> Server:
    """Start an MLflow server that runs until this process ends. Return it as soon as it answers."""
    server = Server(kept_folder("mlflow-server"))
    atexit.register(server.kill)
    server.start()
    return server
