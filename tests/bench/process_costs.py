# SPDX-License-Identifier: Apache-2.0
"""What trackhub costs a single process: a log call, an import, a command's start, and memory.

The command calls `log_calls`, `startup` and `memory`. Every arm runs in processes of its own; the functions without a
leading underscore below them are what these processes run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.measured_figures import Arm, Experiment, Figure, Run
from tests.bench.store_counts import count_event_files, count_spool, count_wandb
from tests.bench.subprocesses import ROOT, SocketChannel, in_child, own_cpu_s, peak_mb, say, serve, started

__all__ = ["log_calls", "memory", "startup"]

_TEN = {f"train/metric_{i}": 0.5 for i in range(10)}
_CALL = "one write(2) takes some 40 % of the call; encoding and the lock are the next two"
_IMPORT = "import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
_FEW = 10_000


def log_calls(quick: bool) -> list[Experiment]:
    """Return the experiment that compares ``Writer.log`` with the bare SDKs' calls."""
    calls, rows = (10_000, 1_000) if quick else (50_000, 2_000)
    arms = {
        "trackhub": lambda folder: _run_calls("trackhub_calls", folder, calls),
        "SummaryWriter": lambda folder: _run_calls("tensorboard_calls", folder, max(calls // 50, 500)),
        "wandb": lambda folder: _run_calls("wandb_calls", folder, rows),
    }
    figures = []
    for what, key in (("one metric", "one"), ("ten metrics", "ten")):
        figures += [
            _call(f"Writer.log, {what}: median", "SummaryWriter.add_scalar", f"{key}_median_us", "SummaryWriter", 8),
            _call(f"Writer.log, {what}: CPU of the process, without delivery", "SummaryWriter.add_scalar",
                  f"{key}_cpu_us", "SummaryWriter", 8),
            _call(f"Writer.log, {what}: median", "wandb run.log, offline", f"{key}_median_us", "wandb", 40),
        ]  # fmt: skip
    return [Experiment("writer", arms, figures, repeat=1 if quick else 5)]


def _call(what: str, alternative: str, value: str, against: str, reach: float) -> Figure:
    return Figure(what, alternative, value, "trackhub", against, "us", "times less", reach, _CALL)


def _run_calls(function: str, folder: Path, calls: int) -> Run:
    result = in_child(f"process_costs:{function}", folder=str(folder), calls=calls)
    return Run(result["values"], result["logged"], result["stored"])


def trackhub_calls(folder: str, calls: int) -> dict[str, Any]:
    """Log into a spool that no sender reads."""
    from trackhub.spool.layout import SpoolInfo, create_spool
    from trackhub.writer.writer import Writer

    spool = Path(folder, "spool")
    create_spool(spool, SpoolInfo("site-1", "job", ("server",)))
    writer = Writer(spool)

    def one(step: int) -> None:
        writer.log({"train/loss": 0.5 * step}, step)

    def ten(step: int) -> None:
        writer.log(_TEN, step)

    values = _time_calls(one, ten, calls, writer.close)
    return {"values": values, "logged": 2 * calls, "stored": count_spool(spool)}


def tensorboard_calls(folder: str, calls: int) -> dict[str, Any]:
    """Log with PyTorch's writer. Ten metrics are ten calls."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def one(step: int) -> None:
        writer.add_scalar("train/loss", 0.5 * step, step)

    def ten(step: int) -> None:
        for key, value in _TEN.items():
            writer.add_scalar(key, value, step)

    values = _time_calls(one, ten, calls, writer.close)
    return {"values": values, "logged": 11 * calls, "stored": count_event_files(Path(folder))}


def wandb_calls(folder: str, calls: int) -> dict[str, Any]:
    """Log with W&B's SDK, offline."""
    import wandb

    run = wandb.init(dir=folder, mode="offline", project="bench", settings=wandb.Settings(silent=True))

    def one(step: int) -> None:
        run.log({"train/loss": 0.5 * step})

    def ten(step: int) -> None:
        run.log(_TEN)

    values = _time_calls(one, ten, calls, run.finish)
    return {"values": values, "logged": 2 * calls, "stored": count_wandb(Path(folder))}


def _time_calls(
    one: Callable[[int], None], ten: Callable[[int], None], calls: int, close: Callable[[], Any]
) -> dict[str, float]:
    """Return median, p99 and CPU time of a call in microseconds. The CPU time includes work that a call puts off."""
    values = {}
    clock = time.perf_counter
    for name, call in (("one", one), ("ten", ten)):
        call(0)  # outside the clock: the first call does more than the others
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


def startup(quick: bool) -> list[Experiment]:
    """Return the experiment that times ``import trackhub`` and the command ``trackhub backends``."""
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
    """Time an import alone in a new interpreter, and that interpreter from start to end."""

    def run(folder: Path) -> Run:
        process_ms, out = _time_command([sys.executable, "-c", _IMPORT.format(module=module)])
        return Run({"ms": float(out.splitlines()[-1]) * 1000, "process_ms": process_ms})

    return run


def _command(command: list[str]) -> Arm:
    return lambda folder: Run({"process_ms": _time_command(command)[0]})


def _time_command(command: list[str]) -> tuple[float, str]:
    """Run a command. Return how many milliseconds it took, and what it printed."""
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return (time.perf_counter() - begin) * 1000, done.stdout


def memory(quick: bool) -> list[Experiment]:
    """Return the experiment that measures how trainer, client and receiver grow with the number of records."""
    many = 200_000 if quick else 1_000_000
    figures = [
        Figure(f"growth of the {who}'s memory, {_FEW:,} to {many:,} records", "", f"{who}_mb", "trackhub", "", "MB",
               "at most", 30)
        for who in ("trainer", "client", "receiver")
    ]  # fmt: skip
    return [Experiment("memory", {"trackhub": lambda folder: _grow(folder, many)}, figures, 1)]


def _grow(folder: Path, many: int) -> Run:
    with (
        started("process_costs:receiver", folder=str(folder)) as receiver,
        started("process_costs:client", folder=str(folder), port=_number(receiver)) as client,
        started("process_costs:trainer", folder=str(folder), turns=[_FEW, many - _FEW], go=_number(client)) as trainer,
    ):
        processes = {"trainer": trainer, "client": client, "receiver": receiver}
        _number(trainer)  # by now the receiver's journal has the first records
        few = {name: peak_mb(process.pid) for name, process in processes.items()}
        _go_on(trainer)
        _number(trainer)
        _go_on(trainer)
        trainer.wait(120)
        growth = {f"{name}_mb": -few[name] for name in processes}
        growth["trainer_mb"] += _result(trainer)["peak_mb"]
        growth["client_mb"] += _end(client)["peak_mb"]
        ended = _end(receiver)
        growth["receiver_mb"] += ended["peak_mb"]
    return Run(growth, many, ended["stored"])


def _number(process: subprocess.Popen[bytes]) -> int:
    """Wait for the next number that a process prints, and return it."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.strip():
        assert process.stderr is not None
        raise RuntimeError(process.stderr.read().decode(errors="replace")[-500:])
    return int(line)


def _go_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    _go_on(process)
    process.wait(600)
    return _result(process)


def _result(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert process.stdout is not None
    result: dict[str, Any] = json.loads(process.stdout.read().decode().splitlines()[-1])
    return result


def receiver(folder: str) -> dict[str, Any]:
    """Run a receiver with a TensorBoard lane."""
    from tests.bench.load import open_receiver
    from trackhub.job_and_run_info import RunStatus

    receiver = open_receiver(Path(folder, "receiver"), {"tensorboard": {}})
    server = serve(receiver.handle)
    say(server.server_address[1])
    sys.stdin.readline()
    report = receiver.finish(RunStatus.FINISHED)
    return {"peak_mb": peak_mb(), "stored": report.lanes["tensorboard"]["site-1"].confirmed}


def client(folder: str, port: int) -> dict[str, Any]:
    """Run a sender."""
    from trackhub.delivery.sender import Sender
    from trackhub.spool.layout import SpoolInfo, create_spool

    spool = Path(folder, "spool")
    create_spool(spool, SpoolInfo("site-1", "job", ("server",), max_bytes=1 << 34))
    sender = Sender(spool, SocketChannel(port, "site-1"))
    sender.start()
    say(0)
    sys.stdin.readline()
    sender.close(600)
    return {"peak_mb": peak_mb()}


def trainer(folder: str, turns: list[int], go: int) -> dict[str, Any]:
    """Log as fast as possible, one turn after the other. The last turn's records may be in the spool at the end.

    Args:
        folder: where the spool is.
        turns: how many records each turn logs.
        go: ignored. The parent reads it from the client, and so starts the trainer only when the client is ready.
    """
    from trackhub.writer.writer import Writer

    writer, done = Writer(Path(folder, "spool")), 0
    for turn in turns:
        for step in range(done, done + turn):
            writer.log({"train/loss": 1.0 / (step + 1)}, step)
        done += turn
        writer.flush(300)
        say(done)
        sys.stdin.readline()
    writer.close()
    return {"peak_mb": peak_mb()}
