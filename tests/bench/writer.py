# SPDX-License-Identifier: Apache-2.0
"""What a log call costs the trainer: ``trackhub.Writer.log`` against the bare SDKs' calls, one process each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.child import in_child, own_cpu_s
from tests.bench.figures import Experiment, Figure, Run
from tests.bench.stores import count_event_files, count_spool, count_wandb

__all__ = ["experiments"]

_TEN = {f"train/metric_{i}": 0.5 for i in range(10)}
_EXPLAIN = "the call is one write(2), some 40 % of its time; encoding and the lock are the next two"


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    calls, rows = (10_000, 1_000) if quick else (50_000, 2_000)
    arms = {
        "trackhub": lambda folder: _run("writer:trackhub_calls", folder, calls),
        "SummaryWriter": lambda folder: _run("writer:tensorboard_calls", folder, max(calls // 50, 500)),
        "wandb": lambda folder: _run("writer:wandb_calls", folder, rows),
    }
    figures = []
    for what, key in (("one metric", "one"), ("ten metrics", "ten")):
        figures += [
            _figure(f"Writer.log, {what}: median", "SummaryWriter.add_scalar", f"{key}_median_us", "SummaryWriter", 8),
            _figure(f"Writer.log, {what}: CPU of the process, without delivery", "SummaryWriter.add_scalar",
                    f"{key}_cpu_us", "SummaryWriter", 8),
            _figure(f"Writer.log, {what}: median", "wandb run.log, offline", f"{key}_median_us", "wandb", 40),
        ]  # fmt: skip
    return [Experiment("writer", arms, figures, repeat=1 if quick else 5)]


def _figure(what: str, alternative: str, value: str, against: str, reach: float) -> Figure:
    return Figure(what, alternative, value, "trackhub", against, "us", "times less", reach, _EXPLAIN)


def _run(function: str, folder: Path, calls: int) -> Run:
    result = in_child(function, folder=str(folder), calls=calls)
    return Run(result["values"], result["logged"], result["stored"])


def trackhub_calls(folder: str, calls: int) -> dict[str, Any]:
    """Log into a spool that nobody reads."""
    from trackhub.spool.layout import SpoolInfo, create_spool
    from trackhub.writer.writer import Writer

    spool = Path(folder, "spool")
    create_spool(spool, SpoolInfo("site-1", "job", ("server",)))
    writer = Writer(spool)

    def one(step: int) -> None:
        writer.log({"train/loss": 0.5 * step}, step)

    def ten(step: int) -> None:
        writer.log(_TEN, step)

    values = _timed(one, ten, calls, writer.close)
    return {"values": values, "logged": 2 * calls, "stored": count_spool(spool)}


def tensorboard_calls(folder: str, calls: int) -> dict[str, Any]:
    """Log with PyTorch's writer; ten metrics are ten calls."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def one(step: int) -> None:
        writer.add_scalar("train/loss", 0.5 * step, step)

    def ten(step: int) -> None:
        for key, value in _TEN.items():
            writer.add_scalar(key, value, step)

    values = _timed(one, ten, calls, writer.close)
    return {"values": values, "logged": 11 * calls, "stored": count_event_files(Path(folder))}


def wandb_calls(folder: str, calls: int) -> dict[str, Any]:
    """Log with W&B's SDK, offline."""
    import wandb

    run = wandb.init(dir=folder, mode="offline", project="bench", settings=wandb.Settings(silent=True))

    def one(step: int) -> None:
        run.log({"train/loss": 0.5 * step})

    def ten(step: int) -> None:
        run.log(_TEN)

    values = _timed(one, ten, calls, run.finish)
    return {"values": values, "logged": 2 * calls, "stored": count_wandb(Path(folder))}


def _timed(one: Callable[[int], None], ten: Callable[[int], None], calls: int, close: Callable[[], Any]) -> Any:
    """Return median, p99 and CPU time of a call, in microseconds; the CPU time includes what the call leaves behind."""
    values = {}
    clock = time.perf_counter
    for name, call in (("one", one), ("ten", ten)):
        call(0)  # what only the first call does
        cpu, took = own_cpu_s(), []
        for step in range(1, calls):
            before = clock()
            call(step)
            took.append(clock() - before)
        if name == "ten":
            close()
        values[f"{name}_cpu_us"] = (own_cpu_s() - cpu) / calls * 1e6
        took.sort()
        values[f"{name}_median_us"] = took[len(took) // 2] * 1e6
        values[f"{name}_p99_us"] = took[int(len(took) * 0.99)] * 1e6
    return values
