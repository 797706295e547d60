# SPDX-License-Identifier: Apache-2.0
"""What starting costs: ``import trackhub`` in a trainer, and the command ``trackhub backends``."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.bench.child import ROOT
from tests.bench.figures import Arm, Experiment, Figure, Run

__all__ = ["experiments"]

_TIMED = "import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    arms = {
        "trackhub": _import("trackhub"),
        "wandb": _import("wandb"),
        "mlflow": _import("mlflow"),
        "trackhub backends": _command([sys.executable, "-m", "trackhub.cli", "backends"]),
    }
    figures = [
        Figure("import trackhub", "import wandb", "ms", "trackhub", "wandb", "ms", "times less", 10),
        Figure("import trackhub", "import mlflow", "ms", "trackhub", "mlflow", "ms", "times less", 10),
        Figure("trackhub backends, the whole command", "python -c 'import mlflow'", "process_ms", "trackhub backends",
               "mlflow", "ms", "times less", 5),
    ]  # fmt: skip
    return [Experiment("startup", arms, figures, repeat=2 if quick else 5, warm_up=0 if quick else 1)]


def _import(module: str) -> Arm:
    """Time the statement alone, in a fresh interpreter, and that interpreter from start to end."""

    def run(folder: Path) -> Run:
        process_ms, out = _timed([sys.executable, "-c", _TIMED.format(module=module)])
        return Run({"ms": float(out.splitlines()[-1]) * 1000, "process_ms": process_ms})

    return run


def _command(command: list[str]) -> Arm:
    return lambda folder: Run({"process_ms": _timed(command)[0]})


def _timed(command: list[str]) -> tuple[float, str]:
    """Run a command; return how many milliseconds it took, and what it printed."""
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return (time.perf_counter() - begin) * 1000, done.stdout
