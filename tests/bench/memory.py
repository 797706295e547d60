# SPDX-License-Identifier: Apache-2.0
"""The memory of trainer, client and receiver, each a process of its own, while the records go from few to many."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from tests.bench.child import peak_mb, started
from tests.bench.figures import Experiment, Figure, Run

__all__ = ["experiments"]

_FEW = 10_000


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    many = 200_000 if quick else 1_000_000
    figures = [
        Figure(f"growth of the {who}'s memory, {_FEW:,} to {many:,} records", "", f"{who}_mb", "trackhub", "", "MB",
               "at most", 30)
        for who in ("trainer", "client", "receiver")
    ]  # fmt: skip
    return [Experiment("memory", {"trackhub": lambda folder: _run(folder, many)}, figures, 1)]


def _run(folder: Path, many: int) -> Run:
    with (
        started("memory:receiver", folder=str(folder)) as receiver,
        started("memory:client", folder=str(folder), port=_number(receiver)) as client,
        started("memory:trainer", folder=str(folder), turns=[_FEW, many - _FEW], go=_number(client)) as trainer,
    ):
        processes = {"trainer": trainer, "client": client, "receiver": receiver}
        _number(trainer)  # the first records were confirmed by the receiver's journal
        few = {name: peak_mb(process.pid) for name, process in processes.items()}
        _tell(trainer)
        _number(trainer)
        _tell(trainer)
        trainer.wait(120)
        growth = {f"{name}_mb": -few[name] for name in processes}
        growth["trainer_mb"] += _last(trainer)["peak_mb"]
        growth["client_mb"] += _end(client)["peak_mb"]
        ended = _end(receiver)
        growth["receiver_mb"] += ended["peak_mb"]
    return Run(growth, many, ended["stored"])


def _number(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.strip():
        assert process.stderr is not None
        raise RuntimeError(process.stderr.read().decode(errors="replace")[-500:])
    return int(line)


def _tell(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    _tell(process)
    process.wait(600)
    return _last(process)


def _last(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    stream: IO[bytes] | None = process.stdout
    assert stream is not None
    result: dict[str, Any] = json.loads(stream.read().decode().splitlines()[-1])
    return result


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def receiver(folder: str) -> dict[str, Any]:
    """A receiver with a TensorBoard lane."""
    from tests.bench.floor import serve
    from tests.bench.load import open_receiver
    from trackhub.run import RunStatus

    receiver = open_receiver(Path(folder, "receiver"), {"tensorboard": {}})
    server = serve(receiver.handle)
    _say(server.server_address[1])
    sys.stdin.readline()
    report = receiver.finish(RunStatus.FINISHED)
    return {"peak_mb": peak_mb(), "stored": report.lanes["tensorboard"]["site-1"].confirmed}


def client(folder: str, port: int) -> dict[str, Any]:
    """A sender."""
    from tests.bench.floor import Channel
    from trackhub.delivery.sender import Sender
    from trackhub.spool.layout import SpoolInfo, create_spool

    spool = Path(folder, "spool")
    create_spool(spool, SpoolInfo("site-1", "job", ("server",), max_bytes=1 << 34))
    sender = Sender(spool, Channel(port, "site-1"))
    sender.start()
    _say(0)
    sys.stdin.readline()
    sender.close(600)
    return {"peak_mb": peak_mb()}


def trainer(folder: str, turns: list[int], go: int) -> dict[str, Any]:
    """Log flat out, a turn at a time; the last turn's records may be on their way when it ends."""
    from trackhub.writer.writer import Writer

    writer, done = Writer(Path(folder, "spool")), 0
    for turn in turns:
        for step in range(done, done + turn):
            writer.log({"train/loss": 1.0 / (step + 1)}, step)
        done += turn
        writer.flush(300)
        _say(done)
        sys.stdin.readline()
    writer.close()
    return {"peak_mb": peak_mb()}
