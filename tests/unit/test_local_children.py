# SPDX-License-Identifier: Apache-2.0
"""While a ``trackhub.local`` is open, a plain ``Writer()`` finds its run: in this process and in those it starts.

A child that a signal ends leaves the run alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import trackhub
from tests.unit.readers_and_bad_backends import json_lines
from trackhub.limits import Limits
from trackhub.spool.announce_spool import SPOOL_ENV

FAST = Limits(poll_s=0.005, linger_s=0, flush_s=0.01, deadline_s=10)
PROGRAM = "import trackhub; trackhub.Writer(strict=True).log({'program': 1.0})"


def log_in_child() -> None:
    trackhub.Writer(strict=True).log({"spawned": 1.0})


def test_a_plain_writer_here_and_in_a_child_logs_into_the_open_run(tmp_path: Path) -> None:
    with trackhub.local(["jsonl"], folder=tmp_path, job="j", limits=FAST):
        trackhub.Writer(strict=True).log({"here": 1.0})
        subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
        child = multiprocessing.get_context("spawn").Process(target=log_in_child)
        child.start()
        child.join(60)

    metrics = [line["values"] for line in json_lines(tmp_path / "j/jsonl/j/local.jsonl") if line["kind"] == "metrics"]
    assert sorted(key for values in metrics for key in values) == ["here", "program", "spawned"]
    assert SPOOL_ENV not in os.environ


def test_of_several_open_runs_the_last_is_announced_and_the_first_comes_back(tmp_path: Path) -> None:
    first = trackhub.local(["jsonl"], folder=tmp_path, job="first", limits=FAST)
    announced = os.environ[SPOOL_ENV]
    second = trackhub.local(["jsonl"], folder=tmp_path, job="second", limits=FAST)
    assert os.environ[SPOOL_ENV] != announced
    second.close()
    assert os.environ[SPOOL_ENV] == announced
    first.close()
    assert SPOOL_ENV not in os.environ


def run_script(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_signal_that_reaches_a_child_at_once_does_not_end_the_stream_of_its_parent(tmp_path: Path) -> None:
    """The hook stands for a parent that ends a child right after its start. It runs before those of trackhub."""
    code = """
        import os, signal, sys
        is_armed = False
        os.register_at_fork(after_in_child=lambda: is_armed and os.kill(os.getpid(), signal.SIGTERM))
        import trackhub
        from trackhub.spool.writer_ledger import writer_state
        with trackhub.local(["jsonl"], folder=sys.argv[1], job="j", quiet=True) as writer:
            writer.log({"a": 1.0})
            is_armed = True
            if (child := os.fork()) == 0:
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            print(*(writer_state(path).value for path in writer.folder.glob("trackhub/spool/*.ledger")))
        """

    assert run_script(code, tmp_path).split() == [str(-signal.SIGTERM), "alive"]


def test_a_child_that_is_terminated_right_after_its_start_ends(tmp_path: Path) -> None:
    """Python forgets a signal with a handler that reaches a child before its first statement."""
    code = """
        import os, signal, sys, time, trackhub
        with trackhub.local(["jsonl"], folder=sys.argv[1], job="j", quiet=True) as writer:
            writer.log({"a": 1})
            for _ in range(30):
                if (child := os.fork()) == 0:
                    time.sleep(5)
                    os._exit(0)
                os.kill(child, signal.SIGTERM)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """

    assert run_script(code, tmp_path).split() == [str(-signal.SIGTERM)] * 30


def test_a_fork_leaves_the_signals_as_they_were(tmp_path: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        child = os.fork()
        if child == 0:
            os._exit(signal.pthread_sigmask(signal.SIG_BLOCK, []) != mask)
        assert os.waitpid(child, 0)[1] == 0
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
