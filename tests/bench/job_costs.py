# SPDX-License-Identifier: Apache-2.0
"""What tracking costs whole FLARE jobs in the simulator: calls, CPU, rate, processes, and training steps under faults.

The command calls `flare_jobs`, `cifar10_job` and `training_under_faults`. The alternatives are FLARE's own tracking
and the same job without tracking.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from tests.bench.backend_rates import bare, end_to_end
from tests.bench.flare_job import NONE, STOCK_TENSORBOARD, STOCK_WANDB, UNEDITED, Way, flare_arm, trackhub_into
from tests.bench.measured_figures import Arm, Experiment, Figure, Run
from tests.bench.subprocesses import ROOT, children_cpu_s, kept_folder
from tests.faults import training
from tests.integration.harness import simulate

__all__ = ["cifar10_job", "flare_jobs", "training_under_faults", "unedited_scripts"]

_LAG = (
    "the trainers need half a second for their calls; the rest is the receiver's work on all records in one process, "
    "some 7 us each, and TensorBoard's protobuf is the largest part of it"
)
_RUN_ENDED = "END_RUN fired"  # FLARE's server logs it when everything has ended, trackhub's receiver included
_GRID = (
    "FLARE's server looks every 3 s whether its run has ended. With tracking it ends later, when each site has asked "
    "for its next task and learned that there is none; so the simulator ends some 3 s later, or at the same time"
)
_START = "the receiver and the senders start and end once in a job, and this job trains for some seconds only"
_FRAMES = "FLARE's writer makes a dict of its arguments and passes them on, which takes 0.4 us"
_STEP_SITES = 2
_STEPS = 500  # of each site in each round; a step takes some 4 ms


def flare_jobs(quick: bool) -> list[Experiment]:
    """Return the experiments that compare trackhub with FLARE's own writers and receivers."""
    if quick:
        return [_in_process(300, 1_000, 20_000, 0, 1), _external(300, 300, 1)]
    return [_in_process(300, 1_000, 100_000, 300, 5), _external(300, 10_000, 5), _processes()]


def _calls(mode: str, reach: float, against_arm: str) -> list[Figure]:
    """Return the figures on what a call costs the training thread while the whole job runs."""
    against = f"FLARE's WandBWriter.log, {mode}"

    def less(what: str, value: str, reach: float) -> Figure:
        return Figure(what, against, value, "trackhub", against_arm, "us", "times less", reach)

    figures = []
    for what, prefix in (("one metric", ""), ("ten metrics", "ten_")):
        figures += [
            less(f"Writer.log in a job, {mode}, {what}: median", f"{prefix}median_us", reach),
            less(f"Writer.log in a job, {mode}, {what}: p99", f"{prefix}p99_us", 100),
        ]
    return [*figures, less(f"Writer.log in a job, {mode}: CPU of the thread", "thread_cpu_us", 10)]


def _external(calls: int, records: int, repeat: int) -> Experiment:
    """Return the experiment with trainers in processes of their own, into W&B.

    With few records the rate would be that of the start, so this figure is left out.
    """
    arms = {
        "trackhub": flare_arm(trackhub_into("wandb"), records=records, tens=calls, external=True),
        "stock": flare_arm(STOCK_WANDB, records=calls, tens=calls // 4, external=True),
    }
    figures = [
        *_calls("external", 20, "stock"),
        Figure(f"growth of an external trainer's memory, {records + calls:,} calls",
               f"FLARE's WandBWriter.log, {calls + calls // 4:,} calls",
               "trainer_mb", "trackhub", "stock", "MB", "at most", 30),
    ]  # fmt: skip
    if records > calls:
        arms["bare"] = bare("wandb", records, 2)
        figures.append(end_to_end("wandb", records, "trackhub"))
    return Experiment("whole job, external", arms, figures, repeat)


def _in_process(calls: int, stock_records: int, records: int, paced: int, repeat: int) -> Experiment:
    """Return the experiment with trainers in the client's process, into TensorBoard.

    All trainers log as fast as they can. Where calls are compared, ``paced`` calls at the pace of a training come
    first. FLARE's own rate does not rise with the number of records, so its job has fewer. The CPU time of the same
    job without tracking is measured once and taken off.
    """
    idle_s: list[float] = []
    untracked = flare_arm(NONE, records=records)

    def idle(folder: Path) -> Run:
        done = untracked(folder)
        idle_s.append(done.values["job_cpu_s"])
        return done

    def tracked(way: Way, records: int, tens: int = 0, paced: int = 0) -> Arm:
        arm = flare_arm(way, records=records, tens=tens, paced=paced)

        def run(folder: Path) -> Run:
            if not idle_s:
                raise RuntimeError("the job without tracking failed, whose CPU time is to be taken off")
            done = arm(folder)
            cpu_us = (done.values["job_cpu_s"] - idle_s[0]) / (2 * (records + tens)) * 1e6
            return replace(done, values={**done.values, "cpu_us": cpu_us})

        return run

    arms = {
        "none": idle,
        "stock": tracked(STOCK_TENSORBOARD, stock_records),
        "stock wandb": flare_arm(STOCK_WANDB, records=calls, tens=calls // 4, paced=paced),
        "trackhub": tracked(trackhub_into("tensorboard"), records, calls, paced),
    }
    against = f"FLARE's own, 2 sites x {stock_records:,}"
    what = f"2 sites x {records:,} into TensorBoard"
    figures = [
        *_calls("in process", 200, "stock wandb"),
        *(_at_pace(paced) if paced else ()),
        Figure(f"{what}: CPU of the job per record", against, "cpu_us", "trackhub", "stock", "us", "times less", 50),
        Figure(f"{what}: rate", against, "rate", "trackhub", "stock", "records/s", "times more", 60),
        Figure(f"{what}: lag, to 99.5 % of the bytes", against, "lag_s", "trackhub", "stock", "s", "at most", 2, _LAG),
    ]  # fmt: skip
    return Experiment("whole job, in process", arms, figures, repeat, once=frozenset({"none"}))


def _at_pace(calls: int) -> list[Figure]:
    """Return the figures on calls at 100 a second. Here both sides find cold caches and a core that slept."""
    against, what = "FLARE's WandBWriter.log, in process", "Writer.log in a job, in process, 100 calls a second"
    return [
        Figure(f"{what}: median", against, "paced_median_us", "trackhub", "stock wandb", "us", "times less", 10),
        Figure(f"{what}: p99", against, "paced_p99_us", "trackhub", "stock wandb", "us", "times less", 10),
        Figure(f"lost of 2 x {calls} calls, 100 a second", against, "paced_lost", "trackhub", "stock wandb", "records",
               "at most", 0),
    ]  # fmt: skip


def unedited_scripts(quick: bool) -> list[Experiment]:
    """Return the experiments that compare FLARE's ``SummaryWriter`` with trackhub, the same without, and ``Writer``.

    FLARE's own way stores some hundred records a second, so its job has fewer.
    """
    records, stock_records, repeat = (20_000, 1_000, 1) if quick else (100_000, 5_000, 5)
    experiments = []
    for mode, external in (("in process", False), ("external", True)):
        arms = {
            "unedited": flare_arm(UNEDITED, records=records, external=external),
            "stock": flare_arm(STOCK_TENSORBOARD, records=stock_records, external=external),
            "writer": flare_arm(trackhub_into("tensorboard"), records=records, external=external),
        }
        what = f"FLARE's SummaryWriter with trackhub, unedited, {mode}, 2 sites x {records:,}"
        stock, writer = f"without trackhub, 2 sites x {stock_records:,}", "trackhub.Writer"
        figures = [
            Figure(f"{what}: median", stock, "median_us", "unedited", "stock", "us", "times less", 10),
            Figure(f"{what}: p99", stock, "p99_us", "unedited", "stock", "us", "times less", 10),
            Figure(f"{what}: CPU of the thread", stock, "thread_cpu_us", "unedited", "stock", "us", "times less", 5),
            Figure(f"{what}: median", writer, "median_us", "unedited", "writer", "us", "times less", 1 / 1.5, _FRAMES),
            Figure(f"{what}: p99", writer, "p99_us", "unedited", "writer", "us", "times less", 1 / 1.5, _FRAMES),
        ]
        experiments.append(Experiment(f"unedited scripts, {mode}", arms, figures, repeat))
    return experiments


def _processes() -> Experiment:
    """Return the experiment that counts the processes that W&B adds. A count does not vary, so it runs once."""
    arms = {
        "trackhub": flare_arm(trackhub_into("wandb"), records=50, sites=16, count_processes=True),
        "stock": flare_arm(STOCK_WANDB, records=50, sites=4, count_processes=True, timeout_s=240),
    }
    figure = Figure(
        "processes that 16 W&B sites add", "FLARE's own with 4 sites (with 16 it hangs)", "extra_processes", "trackhub",
        "stock", "processes", "at most", 2,
    )  # fmt: skip
    return Experiment("processes", arms, [figure], repeat=1)


def cifar10_job(quick: bool) -> list[Experiment]:
    """Return the experiment that compares the CIFAR-10 job, which logs every step, with ``--backend none``.

    It trains on synthetic images, so that it needs no download.
    """
    samples, repeat = (500, 1) if quick else (2_000, 5)
    arms = {"none": _cifar10("none", samples), "tensorboard": _cifar10("tensorboard", samples)}
    figures = [
        Figure("CIFAR-10 job until its run has ended, 2 s more allowed", "--backend none",
               "run_s", "tensorboard", "none", "s", "times less", 0.98, _GRID, allowance=2.0),
        Figure("CIFAR-10 job until the simulator has ended, 2 s more allowed", "--backend none", "wall_s",
               "tensorboard", "none", "s", "times less", 0.98, _GRID, allowance=2.0),
        Figure("CIFAR-10 job: CPU", "--backend none", "cpu_s", "tensorboard", "none", "s", "times less", 0.98, _START),
    ]  # fmt: skip
    return [Experiment("CIFAR-10 job", arms, figures, repeat)]


def _cifar10(backend: str, samples: int) -> Arm:
    @functools.cache
    def exported() -> Path:
        """Write the job once for all rounds. It is kept until this process ends."""
        folder = kept_folder("cifar10")
        command = [
            sys.executable, str(ROOT / "jobs" / "cifar10_fedavg" / "job.py"), "--dataset", "synthetic",
            "--backend", backend, "--samples_per_site", str(samples), "--num_rounds", "1", "--torch_threads",
            str(max(1, (os.cpu_count() or 1) // 2)), "--export", str(folder),  # as when job.py runs the job
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stdout[-300:] + done.stderr[-300:])
        job = next(path for path in folder.iterdir() if path.is_dir())
        _leave_out_server_evaluation(job)
        return job

    def run(folder: Path) -> Run:
        job = exported()
        before, begin, started = children_cpu_s(), time.perf_counter(), time.time()
        result = simulate(job, folder, n_clients=2)
        wall_s, cpu_s = time.perf_counter() - begin, children_cpu_s() - before
        if result.rc != 0:
            raise RuntimeError(result.log[-500:])
        values = {"wall_s": wall_s, "run_s": _run_ended(folder) - started, "cpu_s": cpu_s}
        if backend == "none":
            return Run(values)
        report = result.report("server")
        confirmed = sum(run["confirmed"] for run in report["lanes"][backend].values())
        # No site counts the server's own records, so what is journaled of them stands for what was logged.
        sites = report["sites"].values()
        logged = sum(site["at_site"]["logged"] if site["at_site"] else site["journaled"] for site in sites)
        return Run(values, logged, confirmed)

    return run


def _leave_out_server_evaluation(job: Path) -> None:
    """Take the evaluation of the last model out of a job. Without tracking, the job has none to compare it with."""
    for path in job.rglob("config_fed_server.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config["components"] = [part for part in config["components"] if part["id"] != "last_model"]
        path.write_text(json.dumps(config), encoding="utf-8")


def _run_ended(folder: Path) -> float:
    """Return when the run ended at the server, in unix seconds, as FLARE logged it."""
    for log in folder.rglob("server/log.txt"):
        for line in log.read_text(encoding="utf-8").splitlines():
            if _RUN_ENDED in line:
                return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    raise RuntimeError(f"no log of the server below {folder} has a line with {_RUN_ENDED!r}")


def training_under_faults(quick: bool) -> list[Experiment]:
    """Return the experiment that compares training steps under faults with the same job without tracking.

    The faults of all backends come at once; each fault of the receiver comes alone.
    """
    faults = {
        "no fault": training.HEALTHY,
        f"{len(training.BACKEND_FAULTS)} faulty backends at once": training.all_at_once(training.BACKEND_FAULTS),
        **{f"a receiver: {fault.name}": fault for fault in training.RECEIVER_FAULTS},
    }
    arms = {"none": _steps(training.NONE), **{name: _steps(fault) for name, fault in faults.items()}}
    figures = [
        Figure(
            f"a training step, {name}: {value}",
            "no tracking",
            f"{value}_ms",
            name,
            "none",
            "ms",
            "times less",
            0.95,
            "lanes, and the servers of faulty backends, run on the cores that also train",
        )
        for name in faults
        for value in ("median", "mean")
    ]
    return [Experiment("training under faults", arms, figures, repeat=1 if quick else 5)]


def _steps(fault: training.Fault) -> Arm:
    def run(folder: Path) -> Run:
        result = training.train(folder, fault, _STEPS)
        steps = training.steps_s(result)
        if result.rc != 0 or len(steps) != _STEP_SITES * training.ROUNDS * _STEPS:
            raise RuntimeError(f"the job failed; its log ends: {result.log[-500:]}")
        return Run({"median_ms": statistics.median(steps) * 1e3, "mean_ms": statistics.fmean(steps) * 1e3})

    return run
