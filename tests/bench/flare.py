# SPDX-License-Identifier: Apache-2.0
"""Real FLARE jobs in the simulator: FLARE's own writers and receivers against trackhub's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.bench.arms import NONE, STOCK_TENSORBOARD, STOCK_WANDB, Way, flare_arm, trackhub_into
from tests.bench.child import in_child
from tests.bench.figures import Arm, Experiment, Figure, Run

__all__ = ["experiments"]

_SINK = (
    "the trainers need half a second for their calls; the rest is the sink's work on all records, some 11 us each in "
    "one process, of which TensorBoard's protobuf is the largest part"
)
_SHARED = (
    "the lane shares its process with FLARE, and two cores with the trainers; alone it stores at the bare rate, as the "
    "figures from the journal show"
)


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    if quick:
        return [_calls(False, 300, 1), _calls(True, 300, 1), _whole(1_000, 20_000, 1)]
    return [
        _calls(False, 1_000, 5),
        _calls(True, 1_000, 5),
        _whole(4_000, 100_000, 5),
        _into("mlflow", 20_000, 3),
        _into("wandb", 20_000, 3),
        _processes(),
    ]


def _calls(external: bool, records: int, repeat: int) -> Experiment:
    """What a call costs the training thread, with everything else of the job going on."""
    mode, reach = ("external", 20) if external else ("in process", 200)
    arms = {
        "trackhub": flare_arm(trackhub_into("tensorboard"), records=records, tens=records // 4, external=external),
        "stock": flare_arm(STOCK_WANDB, records=records, tens=records // 4, external=external),
    }
    against = f"FLARE's WandBWriter.log, {mode}"
    figures = []
    for what, prefix in (("one metric", ""), ("ten metrics", "ten_")):
        figures += [
            _less(f"Writer.log in a job, {mode}, {what}: median", against, f"{prefix}median_us", reach),
            _less(f"Writer.log in a job, {mode}, {what}: p99", against, f"{prefix}p99_us", 100),
        ]
    figures.append(_less(f"Writer.log in a job, {mode}: CPU of the thread", against, "thread_cpu_us", 10))
    if external:
        figures.append(
            Figure(f"growth of the trainer's memory, {records:,} records", against, "trainer_mb", "trackhub", "stock",
                   "MB", "at most", 30)
        )  # fmt: skip
    return Experiment(f"calls, {mode}", arms, figures, repeat)


def _less(what: str, against: str, value: str, reach: float) -> Figure:
    return Figure(what, against, value, "trackhub", "stock", "us", "times less", reach)


def _whole(stock_records: int, records: int, repeat: int) -> Experiment:
    """CPU, rate and lag of whole jobs into TensorBoard's files, flat out; stock's own rate does not rise with records.

    From the CPU time is taken off what the round's job without tracking took.
    """
    idle_s = [0.0]

    def idle(folder: Path) -> Run:
        done = flare_arm(NONE, records=records)(folder)
        idle_s[0] = done.values["job_cpu_s"]
        return done

    def tracked(way: Way, records: int) -> Arm:
        def run(folder: Path) -> Run:
            done = flare_arm(way, records=records)(folder)
            cpu_us = (done.values["job_cpu_s"] - idle_s[0]) / (2 * records) * 1e6
            return replace(done, values={**done.values, "cpu_us": cpu_us})

        return run

    arms = {
        "none": idle,
        "stock": tracked(STOCK_TENSORBOARD, stock_records),
        "trackhub": tracked(trackhub_into("tensorboard"), records),
    }
    against = f"FLARE's own, 2 sites x {stock_records:,}"
    what = f"2 sites x {records:,} into TensorBoard"
    figures = [
        Figure(f"{what}: CPU of the job per record", against, "cpu_us", "trackhub", "stock", "us", "times less", 50),
        Figure(f"{what}: rate", against, "rate", "trackhub", "stock", "records/s", "times more", 60),
        Figure(f"{what}: lag", against, "lag_s", "trackhub", "stock", "s", "at most", 2, _SINK),
    ]
    return Experiment("whole job", arms, figures, repeat)


def _into(backend: str, records: int, repeat: int) -> Experiment:
    """Nothing lost into a backend, at the bare SDK's rate."""
    bare = {"mlflow": "backends:log_batches", "wandb": "backends:run_logs"}[backend]

    def run_bare(folder: Path) -> Run:
        result = in_child(bare, folder=str(folder), rows=2 * records, backend=backend, server=False)
        return Run({"rate": 2 * records / result["seconds"]}, 2 * records, result["stored"])

    name = {"mlflow": "MLflow's log_batch of 1000", "wandb": "wandb run.log + finish"}[backend]
    arms = {"trackhub": flare_arm(trackhub_into(backend), records=records), "bare": run_bare}
    figure = Figure(
        f"2 sites x {records:,} into {backend}, end to end, 0 lost", f"bare {name}", "rate", "trackhub", "bare",
        "records/s", "times more", 0.9, _SHARED,
    )  # fmt: skip
    return Experiment(f"into {backend}", arms, [figure], repeat)


def _processes() -> Experiment:
    """How many processes W&B adds; a count, so once is enough."""
    arms = {
        "trackhub": flare_arm(trackhub_into("wandb"), records=50, sites=16, count_processes=True),
        "stock": flare_arm(STOCK_WANDB, records=50, sites=4, count_processes=True, timeout_s=240),
    }
    figure = Figure(
        "processes that 16 W&B sites add", "FLARE's own with 4 sites (with 16 it hangs)", "extra_processes", "trackhub",
        "stock", "processes", "at most", 2,
    )  # fmt: skip
    return Experiment("processes", arms, [figure], repeat=1)
