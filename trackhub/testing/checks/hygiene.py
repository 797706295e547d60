# SPDX-License-Identifier: Apache-2.0
"""The contract's groups on what a backend leaves behind, in files and in the process that it runs in; and on volume."""

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

from trackhub.records import Kind, Params
from trackhub.testing.author import SECRET_ENV
from trackhub.testing.checks.base import ContractBase, Kit
from trackhub.testing.log_calls import Call, metric, series
from trackhub.testing.scenarios import check_run

__all__ = ["Hygiene", "Volume"]


class Hygiene(ContractBase):
    """Nothing is left that should not be."""

    def test_secrets_are_nowhere(
        self,
        kit: Kit,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """A token in the environment or in an option is in no file that the receiver leaves, no log record, no output."""
        token = secrets.token_hex(20)
        for name in (SECRET_ENV, *self.secret_env):
            monkeypatch.setenv(name, token)
        with _everything_logged() as log:
            rig = kit.rig(options=dict(self.secret_options)).start()
            params = [Call(Params({"lr": 0.5}))] if Kind.PARAMS in rig.can.kinds else []
            rig.log("site-1", [*series("loss", range(5)), *params])
            rig.finish()
        printed = "".join(capfd.readouterr())
        assert token not in log.getvalue(), "the token is in a log record"
        assert token not in printed, "the token was printed"
        found = [path for path in _files(tmp_path) if token.encode() in path.read_bytes() or token in path.name]
        assert not found, f"the token is in {', '.join(str(path.relative_to(tmp_path)) for path in found)}"
        assert rig.run("site-1").pending == 0, f"nothing was delivered, so nothing is proved: {rig.run('site-1')}"

    def test_no_thread_is_left(self, kit: Kit) -> None:
        """After its receiver has ended, a backend has no thread more than before; the first receiver may make some to keep."""
        left = _growth(self, kit, lambda: {f"{thread.name} ({thread.ident})" for thread in threading.enumerate()})
        assert not left, f"threads are left: {', '.join(sorted(left))}"

    def test_no_file_is_left_open(self, kit: Kit) -> None:
        """After its receiver has ended, a backend has no file or socket open more than before."""
        left = _growth(self, kit, _open_files)
        assert not left, f"files are left open: {', '.join(sorted(left))}"

    def test_no_process_is_left(self, kit: Kit) -> None:
        """After its receiver has ended, a backend has left no process."""
        before = _children()
        _use(kit, 1)
        left = _remains(self, _children, before)
        assert not left, f"processes are left: {', '.join(sorted(left))}"

    def test_random_generators_are_left_alone(self, kit: Kit) -> None:
        """No draw from the global generators of Python and NumPy: at a client, training draws from the same ones."""
        before = _generators()
        _use(kit, 1)
        moved = [name for name, state in _generators().items() if state != before[name]]
        assert not moved, f"{' and '.join(moved)} moved; draw from a generator of the backend's own"


class Volume(ContractBase):
    """Much."""

    def test_volume(self, kit: Kit) -> None:
        """Ten thousand points of several metrics arrive, each once."""
        total = 1000 if kit.quick else 10_000
        rig = kit.rig().start()
        keys = [f"metric-{number}" for number in range(5)]
        for start in range(0, total, 500):
            rig.log("site-1", [metric(keys[n % 5], n / 8, n // 5) for n in range(start, start + 500)])
        rig.finish(deadline_s=4 * self.deadline_s)
        check_run(rig, self, ["site-1"], f"{total} points")


def _use(kit: Kit, rigs: int) -> None:
    for _ in range(rigs):
        rig = kit.rig().start()
        rig.log("site-1", series("loss", range(5)))
        rig.log("site-2", series("loss", range(5)))
        rig.finish()


def _growth(hooks: ContractBase, kit: Kit, look: Callable[[], set[str]]) -> set[str]:
    """Return what two more receivers leave that one receiver has not left before."""
    _use(kit, 1)
    before = look()
    _use(kit, 2)
    return _remains(hooks, look, before)


def _remains(hooks: ContractBase, look: Callable[[], set[str]], before: set[str]) -> set[str]:
    """Return what is still there after a while of grace, in which threads and processes may end."""
    deadline = time.monotonic() + hooks.patience_s
    pause = threading.Event()
    while (left := look() - before) and time.monotonic() < deadline:
        pause.wait(0.05)
    return left


def _generators() -> dict[str, bytes]:
    """Return the state of the global random generators."""
    states = {"random": pickle.dumps(random.getstate())}
    if importlib.util.find_spec("numpy"):  # where it is not installed, no backend draws from it
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
            continue  # the folder's own descriptor, closed by now
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
    """Collect what any logger says, at any level, tracebacks included."""
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
