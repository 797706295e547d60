# SPDX-License-Identifier: Apache-2.0
"""One process of a job of the fault suite: starts it, talks to it, kills it, and waits for what it does.

`tests.faults.job_processes` starts every process of a job as a `Proc`; the tests call `wait_for`.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["PATIENCE_S", "ROOT", "Proc", "environments", "wait_for"]

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
"""How long a test waits for what must happen. Only a failure takes so long."""


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait until a condition holds in another process, from which no event comes.

    Args:
        condition: is called again and again.
        what: what should happen, for the message.
        timeout_s: fail after this time.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {timeout_s:g} s")
        pause.wait(0.01)


class Proc:
    """One process of a job. Commands go to its stdin; answers come as lines of JSON from its stdout."""

    def __init__(self, arguments: list[str], env: dict[str, str], log: Path) -> None:
        self._log = log
        self._stderr = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
            env=env, cwd=ROOT, preexec_fn=_heed_ctrl_c,
        )  # fmt: skip
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line.decode())
        self._answers.put(None)

    @property
    def log(self) -> str:
        """What the process wrote to stderr."""
        return self._log.read_text(errors="replace")

    def answer(self, timeout_s: float = PATIENCE_S) -> Any:
        """Wait for the next answer."""
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"no answer within {timeout_s:g} s; log: {self.log[-3000:]}") from None
        if line is None:
            raise AssertionError(f"ended with status {self.process.wait()} before it answered; log: {self.log[-3000:]}")
        return json.loads(line)

    def is_ready(self, timeout_s: float = PATIENCE_S) -> bool:
        """Wait until it says that it is ready, or has ended. Return whether it is ready."""
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"not ready within {timeout_s:g} s; log: {self.log[-3000:]}") from None
        if line is None:
            self.process.wait()
            return False
        assert json.loads(line) == "ready"
        return True

    def tell(self, command: str) -> None:
        """Send a command without waiting for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, command: str, timeout_s: float = PATIENCE_S) -> Any:
        """Send a command and wait for its answer."""
        self.tell(command)
        return self.answer(timeout_s)

    def kill(self) -> None:
        """Kill it by SIGKILL, if it has not ended by itself."""
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait until it ends, and return its exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s; log: {self.log[-3000:]}") from None

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """Kill it if it has not ended, and close its pipes."""
        self.kill()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout, self._stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _heed_ctrl_c() -> None:
    """Undo an ignored SIGINT. A shell starts background jobs so, and their processes inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environments() -> Iterator[tuple[int, bytes]]:
    """Yield the id and the environment of each process that may be read. Zombies are left out."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    yield int(entry.name), (entry / "environ").read_bytes()
