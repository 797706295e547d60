# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 job with per-step logging, against the same job with ``--backend none``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from tests.bench.child import ROOT, children_cpu_s
from tests.bench.figures import Arm, Experiment, Figure, Run
from tests.integration.harness import flare_environment

__all__ = ["experiments"]

_RUN_ENDED = "END_RUN fired"  # in the server's log: everybody has done what there was to do, trackhub's sink as well
_GRID = (
    "FLARE's server looks every 3 s whether its run has ended. With tracking it ends up to 2 s later, when each site "
    "has asked for its next task and learned that there is none; so the command takes 3 s more, or nothing"
)


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments. Synthetic images, so that the figures need no download."""
    samples, repeat = (500, 1) if quick else (2_000, 5)
    arms = {"none": _job("none", samples), "tensorboard": _job("tensorboard", samples)}
    figures = [
        Figure("CIFAR-10 job until its run has ended, 2 s at the end allowed", "--backend none",
               "run_s", "tensorboard", "none", "s", "times less", 0.98, allowance=2.0),
        Figure("CIFAR-10 job, the whole command, 2 s at the end allowed", "--backend none", "wall_s",
               "tensorboard", "none", "s", "times less", 0.98, _GRID, allowance=2.0),
        Figure("CIFAR-10 job: CPU, 2 s at the end allowed", "--backend none", "cpu_s", "tensorboard", "none", "s",
               "times less", 0.98, allowance=2.0),
    ]  # fmt: skip
    return [Experiment("CIFAR-10 job", arms, figures, repeat)]


def _job(backend: str, samples: int) -> Arm:
    def run(folder: Path) -> Run:
        command = [
            sys.executable, str(ROOT / "jobs" / "cifar10_fedavg" / "job.py"), "--dataset", "synthetic",
            "--backend", backend, "--samples_per_site", str(samples), "--num_rounds", "1", "--workspace",
            str(folder / "run"),
        ]  # fmt: skip
        before, begin, started = children_cpu_s(), time.perf_counter(), time.time()
        done = subprocess.run(command, cwd=ROOT, env=flare_environment(), capture_output=True, check=False)
        wall_s, cpu_s = time.perf_counter() - begin, children_cpu_s() - before
        if done.returncode != 0:
            raise RuntimeError(
                done.stdout.decode(errors="replace")[-300:] + done.stderr.decode(errors="replace")[-300:]
            )
        values = {"wall_s": wall_s, "run_s": _ended(folder) - started, "cpu_s": cpu_s}
        if backend == "none":
            return Run(values)
        report = next(folder.rglob("server/**/delivery.json"))
        sites = json.loads(report.read_text(encoding="utf-8"))["lanes"][backend].values()
        confirmed = sum(site["confirmed"] for site in sites)
        logged = confirmed + sum(site["pending"] + sum(site["rejected"].values()) for site in sites)
        return Run(values, logged, confirmed)

    return run


def _ended(folder: Path) -> float:
    """Return when the run ended at the server, in unix seconds, as FLARE logged it."""
    for log in folder.rglob("server/log.txt"):
        for line in log.read_text(encoding="utf-8").splitlines():
            if _RUN_ENDED in line:
                return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    raise RuntimeError(f"no server's log below {folder} says {_RUN_ENDED!r}")
