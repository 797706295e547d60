# SPDX-License-Identifier: Apache-2.0
"""Checks that a backend leaves nothing behind, in files or in its process: secrets, threads, open files."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import pickle
import random
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trackhub.testing.checks.fixtures import ContractFixtures, Kit, one_param
from trackhub.testing.contract_hooks import SECRET_ENV
from trackhub.testing.sample_calls_and_requests import series

__all__ = ["LeftoverChecks"]


class LeftoverChecks(ContractFixtures):
    """A backend leaves no secret, thread, open file or process behind, and moves no global random generator."""

    def test_secrets_are_nowhere(
        self,
        kit: Kit,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """A token in the environment or in an option is in no file, no log record and no output."""
        token = secrets.token_hex(20)
        for name in (SECRET_ENV, *self.secret_env, *self.backend.credentials.variables):
            monkeypatch.setenv(name, token)
        with _everything_logged() as log:
            rig = kit.rig(options=dict(self.secret_options)).start()
            rig.log("site-1", [*series("loss", range(5)), *one_param(rig.can)])
            rig.finish()
        printed = "".join(capfd.readouterr())
        assert token not in log.getvalue(), "the token is in a log record"
        assert token not in printed, "the token was printed"
        found = [path for path in _files(tmp_path) if token.encode() in path.read_bytes() or token in path.name]
        assert not found, f"the token is in {', '.join(str(path.relative_to(tmp_path)) for path in found)}"
        assert rig.run("site-1").pending == 0, f"nothing was delivered, so nothing is proved: {rig.run('site-1')}"

    def test_no_thread_is_left(self, kit: Kit) -> None:
        """A receiver that has ended leaves no thread. The first receiver of a process may start threads that stay."""
        left = _growth(self, kit, lambda: {f"{thread.name} ({thread.ident})" for thread in threading.enumerate()})
        assert not left, f"threads are left: {', '.join(sorted(left))}"

    def test_no_file_is_left_open(self, kit: Kit) -> None:
        """A receiver that has ended leaves no file or socket open. The first of a process may open files that stay."""
        left = _growth(self, kit, _open_files)
        assert not left, f"files are left open: {', '.join(sorted(left))}"

    def test_no_process_is_left(self, kit: Kit) -> None:
        """A receiver that has ended leaves no process."""
        before = _children()
        _use(kit, 1)
        left = _remains(self, _children, before)
        assert not left, f"processes are left: {', '.join(sorted(left))}"

    def test_random_generators_are_left_alone(self, kit: Kit) -> None:
        """The backend does not draw from the global generators of Python and NumPy, from which training draws."""
        before = _generators()
        _use(kit, 1)
        moved = [name for name, state in _generators().items() if state != before[name]]
        assert not moved, f"the global generator moved: {', '.join(moved)}. Draw from a generator of the backend's own"


def _use(kit: Kit, rigs: int) -> None:
    for _ in range(rigs):
        rig = kit.rig().start()
        rig.log("site-1", series("loss", range(5)))
        rig.log("site-2", series("loss", range(5)))
        rig.finish()


def _growth(hooks: ContractFixtures, kit: Kit, look: Callable[[], set[str]]) -> set[str]:
    """Return what two further receivers leave behind, without what the first one left.

    Args:
        hooks: the contract class.
        kit: makes the receivers.
        look: returns what is there now.
    """
    _use(kit, 1)
    before = look()
    _use(kit, 2)
    return _remains(hooks, look, before)


def _remains(hooks: ContractFixtures, look: Callable[[], set[str]], before: set[str]) -> set[str]:
    """Return what is still there after ``patience_s``, in which threads and processes may end.

    Args:
        hooks: the contract class.
        look: returns what is there now.
        before: what was there before.
    """
    deadline = time.monotonic() + hooks.patience_s
    pause = threading.Event()
    while (left := look() - before) and time.monotonic() < deadline:
        pause.wait(0.05)
    return left


def _generators() -> dict[str, bytes]:
    """Return the states of the global random generators."""
    states = {"random": pickle.dumps(random.getstate())}
    if importlib.util.find_spec("numpy"):  # a backend cannot draw from what is not installed
        import numpy

        states["numpy.random"] = pickle.dumps(numpy.random.get_state())
    return states


def _open_files() -> set[str]:
    folder = Path("/proc/self/fd" if Path("/proc/self/fd").exists() else "/dev/fd")
    found = set()
    for name in os.listdir(folder):
        try:
            found.add(f"{name} -> {os.readlink(folder / name)}")
        except OSError:
            continue  # the descriptor of the listing itself, closed by now
    return found


def _children() -> set[str]:
    done = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    me = str(os.getpid())
    rows = (line.split(None, 2) for line in done.stdout.splitlines())
    return {f"{row[0]} {row[2]}" for row in rows if len(row) == 3 and row[1] == me and not row[2].startswith("ps ")}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@contextmanager
def _everything_logged() -> Iterator[io.StringIO]:
    """Collect the records of all loggers at all levels, tracebacks included."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
