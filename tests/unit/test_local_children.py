# SPDX-License-Identifier: Apache-2.0
"""While a ``trackhub.local`` is open, a plain ``Writer()`` finds its run: in this process and in those it starts."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
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
