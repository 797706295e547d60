# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 job with per-step logging, against the same job with ``--backend none``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.child import ROOT, children_cpu_s
from tests.bench.figures import Arm, Experiment, Figure, Run
from tests.integration.harness import flare_environment

__all__ = ["experiments"]


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments. Synthetic images, so that the figures need no download."""
    samples, repeat = (500, 1) if quick else (2_000, 5)
    arms = {"none": _job("none", samples), "tensorboard": _job("tensorboard", samples)}
    figures = [
        Figure("CIFAR-10 job, per-step logging: wall, 2 s at the end allowed", "--backend none", "wall_s",
               "tensorboard", "none", "s", "times less", 0.98, allowance=2.0),
        Figure("CIFAR-10 job, per-step logging: CPU", "--backend none", "cpu_s", "tensorboard", "none", "s",
               "times less", 0.98),
    ]  # fmt: skip
    return [Experiment("CIFAR-10 job", arms, figures, repeat)]


def _job(backend: str, samples: int) -> Arm:
    def run(folder: Path) -> Run:
        command = [
            sys.executable, str(ROOT / "jobs" / "cifar10_fedavg" / "job.py"), "--dataset", "synthetic",
            "--backend", backend, "--samples_per_site", str(samples), "--num_rounds", "1", "--workspace",
            str(folder / "run"),
        ]  # fmt: skip
        before, begin = children_cpu_s(), time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=flare_environment(), capture_output=True, check=False)
        wall_s, cpu_s = time.perf_counter() - begin, children_cpu_s() - before
        if done.returncode != 0:
            raise RuntimeError(
                done.stdout.decode(errors="replace")[-300:] + done.stderr.decode(errors="replace")[-300:]
            )
        if backend == "none":
            return Run({"wall_s": wall_s, "cpu_s": cpu_s})
        report = next(folder.rglob("server/**/delivery.json"))
        sites = json.loads(report.read_text(encoding="utf-8"))["lanes"][backend].values()
        confirmed = sum(site["confirmed"] for site in sites)
        logged = confirmed + sum(site["pending"] + sum(site["rejected"].values()) for site in sites)
        return Run({"wall_s": wall_s, "cpu_s": cpu_s}, logged, confirmed)

    return run
