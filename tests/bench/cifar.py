# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 job with per-step logging, against the same job with ``--backend none``, in the simulator."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from tests.bench.child import ROOT, children_cpu_s, kept_folder
from tests.bench.figures import Arm, Experiment, Figure, Run
from tests.integration.harness import simulate

__all__ = ["experiments"]

_RUN_ENDED = (
    "END_RUN fired"  # in the server's log: everybody has done what there was to do, trackhub's receiver as well
)
_GRID = (
    "FLARE's server looks every 3 s whether its run has ended. With tracking it ends later, when each site has asked "
    "for its next task and learned that there is none; so the simulator ends some 3 s later, or at the same time"
)
_START = "what the receiver and the senders take to start and end is there once in a job, and this job trains for some seconds"


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments. Synthetic images, so that the figures need no download."""
    samples, repeat = (500, 1) if quick else (2_000, 5)
    arms = {"none": _job("none", samples), "tensorboard": _job("tensorboard", samples)}
    figures = [
        Figure("CIFAR-10 job until its run has ended, 2 s more allowed", "--backend none",
               "run_s", "tensorboard", "none", "s", "times less", 0.98, _GRID, allowance=2.0),
        Figure("CIFAR-10 job until the simulator has ended, 2 s more allowed", "--backend none", "wall_s",
               "tensorboard", "none", "s", "times less", 0.98, _GRID, allowance=2.0),
        Figure("CIFAR-10 job: CPU", "--backend none", "cpu_s", "tensorboard", "none", "s", "times less", 0.98, _START),
    ]  # fmt: skip
    return [Experiment("CIFAR-10 job", arms, figures, repeat)]


def _job(backend: str, samples: int) -> Arm:
    @functools.cache
    def exported() -> Path:
        """Write the job once for all rounds; it is kept until this process ends."""
        folder = kept_folder("cifar10")
        command = [
            sys.executable, str(ROOT / "jobs" / "cifar10_fedavg" / "job.py"), "--dataset", "synthetic",
            "--backend", backend, "--samples_per_site", str(samples), "--num_rounds", "1", "--torch_threads",
            str(max(1, (os.cpu_count() or 1) // 2)), "--export", str(folder),  # as job.py has it when it runs the job
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stdout[-300:] + done.stderr[-300:])
        return next(path for path in folder.iterdir() if path.is_dir())

    def run(folder: Path) -> Run:
        job = exported()
        before, begin, started = children_cpu_s(), time.perf_counter(), time.time()
        result = simulate(job, folder, n_clients=2)
        wall_s, cpu_s = time.perf_counter() - begin, children_cpu_s() - before
        if result.rc != 0:
            raise RuntimeError(result.log[-500:])
        values = {"wall_s": wall_s, "run_s": _ended(folder) - started, "cpu_s": cpu_s}
        if backend == "none":
            return Run(values)
        report = result.report("server")
        confirmed = sum(run["confirmed"] for run in report["lanes"][backend].values())
        # The server's own records, of which nobody says how many they were, are journaled as they are made.
        logged = sum(
            site["at_site"]["logged"] if site["at_site"] else site["journaled"] for site in report["sites"].values()
        )
        return Run(values, logged, confirmed)

    return run


def _ended(folder: Path) -> float:
    """Return when the run ended at the server, in unix seconds, as FLARE logged it."""
    for log in folder.rglob("server/log.txt"):
        for line in log.read_text(encoding="utf-8").splitlines():
            if _RUN_ENDED in line:
                return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    raise RuntimeError(f"no server's log below {folder} says {_RUN_ENDED!r}")
