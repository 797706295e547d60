# SPDX-License-Identifier: Apache-2.0
"""Runs a function in a process of its own, so that what one arm imports and leaves in memory touches no other arm."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "children_cpu_s", "in_child", "kept_folder", "own_cpu_s", "peak_mb", "resident_mb", "started"]

ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_S = 900.0


def in_child(function: str, timeout_s: float = _TIMEOUT_S, /, **arguments: Any) -> dict[str, Any]:
    """Call ``module:name`` of ``tests.bench`` in a new process and return its result, a mapping that JSON can hold.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    with started(function, **arguments) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{function} did not end within {timeout_s:.0f} s") from error
    if process.returncode != 0:
        lines = err.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise RuntimeError(f"{function} failed: {lines[-1]}")
    result: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
    return result


def kept_folder(name: str) -> Path:
    """Return a new folder for what all rounds share; it is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"trackhub-bench-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def started(function: str, **arguments: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start the function in a new process group, of which nothing is left afterwards."""
    command = [sys.executable, "-m", "tests.bench.child", function, json.dumps(arguments, default=str)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def own_cpu_s() -> float:
    """Return the CPU time of this process, all threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def children_cpu_s() -> float:
    """Return the CPU time of all child processes that were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def resident_mb(pid: int | str = "self") -> float:
    """Return the memory of a process that is resident now, in MB of 2**20 bytes."""
    return _status(pid, "VmRSS")


def peak_mb(pid: int | str = "self") -> float:
    """Return the most that was ever resident of a process."""
    return _status(pid, "VmHWM")


def _status(pid: int | str, field: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} shows no {field}")


def main(argv: list[str]) -> None:
    """Call the function that the arguments name, and print what it returns."""
    module, _, name = argv[0].partition(":")
    function = getattr(importlib.import_module(f"tests.bench.{module}"), name)
    result = function(**json.loads(argv[1]))
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
