# SPDX-License-Identifier: Apache-2.0
"""Faults in a federation of real FLARE processes: a provisioned one on this machine, and one in the simulator."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.independent_readers import count_receiver, count_site
from tests.faults.process import wait_for
from tests.integration.harness import Job, read_jsonl
from tests.integration.poc import SITES, Poc, PocResult, poc, wandb

__all__ = ["poc", "wandb"]  # the fixtures: pytest finds them by their names here

pytestmark = pytest.mark.long

TRAINER = """
from trackhub import Writer

writer = Writer()


def train(n):
    for i in range(400):
        values = {"loss": n + i / 7}
        fact(lambda: writer.log(values, 400 * n + i), values, 400 * n + i)
        time.sleep(0.002)


rounds(train)
"""
CALLS = 3 * 400
LIMITS = {"sites_s": 6, "deadline_s": 10, "silence_s": 4, "keepalive_s": 1, "request_s": 3}


def job_processes(job: str, kind: str) -> list[int]:
    """Return the processes of a job whose command line contains ``kind``, such as ``site-1`` or ``client.py``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                folder = os.readlink(entry / "cwd")
            except OSError:
                continue
            if job in f"{command} {folder}" and kind in command:
                found.append(int(entry.name))
    return found


def facts(result_out: Path, job: str, site: str) -> list[tuple[str, int, float]]:
    path = result_out / job / f"{site}.facts"
    content = path.read_text() if path.exists() else ""
    lines = content[
        : content.rfind("\n") + 1
    ].splitlines()  # the trainer may be writing the last line, or died while it did
    return [(key, step, value) for key, value, step, *_ in map(json.loads, lines)]


def points(folder: Path, job: str, site: str) -> list[tuple[str, int, float]]:
    records = [r for r in read_jsonl(folder / "jsonl" / f"job-{job[:8]}" / f"{site}.jsonl") if r["kind"] == "metrics"]
    return [(key, r["step"], value) for r in records for key, value in r["values"].items()]


def kill_in_mid_job(poc: Poc, job: str, kind: str, seed: int) -> None:
    target = random.Random(seed).randrange(100, 800)
    wait_for(
        lambda: len(facts(poc.out, job, "site-1")) >= target and facts(poc.out, job, "site-2"),
        f"{target} records of site-1, and some of site-2", 120,
    )  # fmt: skip
    victims = job_processes(job, kind)
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)


def check_after_replay(poc: Poc, result: PocResult, server: Path, tmp_path: Path, in_doubt: int) -> None:
    """Copy the server's and the sites' folders into one, deliver what is left, and compare with what was noted."""
    wait_for(lambda: job_processes(result.job, "") == [], "the end of all processes of the job")
    folder = tmp_path / "together"
    shutil.copytree(server, folder / "server")
    for site in SITES:
        shutil.copytree(result.client(site), folder / site)
    for site in SITES:
        calls, here = len(facts(poc.out, result.job, site)), count_site(folder / site / "trackhub" / "spool")
        assert calls <= here.logged <= calls + in_doubt
        assert here.logged == here.acked + here.spooled
    done = subprocess.run(
        [sys.executable, "-m", "trackhub.cli", "replay", str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    counts = count_receiver(folder / "server" / "trackhub" / "trackhub.db")
    for site in SITES:
        noted = facts(poc.out, result.job, site)
        found = points(folder / "server", result.job, site)
        assert found[: len(noted)] == noted
        assert len(found) - len(noted) <= in_doubt
        assert counts[site].received == counts[site].duplicates + counts[site].journaled
        assert counts[site].lanes["jsonl"].confirmed == counts[site].journaled == len(found)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_client_job_process_loses_nothing(poc: Poc, tmp_path: Path, seed: int) -> None:
    job = Job(tmp_path, TRAINER, {"server": ["jsonl"], "limits": LIMITS}, rounds=3)

    result = poc.run(job.export(), meanwhile=lambda i: kill_in_mid_job(poc, i, "site-1", seed))

    check_after_replay(poc, result, result.server, tmp_path, in_doubt=1)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_external_trainer_loses_nothing(poc: Poc, tmp_path: Path, seed: int) -> None:
    job = Job(tmp_path, TRAINER, {"server": ["jsonl"], "limits": LIMITS}, rounds=3, external=True)

    result = poc.run(job.export(), meanwhile=lambda i: kill_in_mid_job(poc, i, "client.py", seed))

    check_after_replay(poc, result, result.server, tmp_path, in_doubt=1)


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_server_job_process_loses_nothing(poc: Poc, tmp_path: Path, seed: int) -> None:
    job = Job(tmp_path, TRAINER, {"server": ["jsonl"], "limits": LIMITS}, rounds=3)

    result = poc.run(job.export(), meanwhile=lambda i: kill_in_mid_job(poc, i, "server.runner_process", seed))

    server = result.startup / "server" / result.job
    check_after_replay(poc, result, server if server.exists() else result.server, tmp_path, in_doubt=1)


def test_a_simulator_with_fewer_threads_than_clients_delivers_every_record(tmp_path: Path) -> None:
    """The simulator may even train a client's round twice, in two processes at once. Both belong to the same site.

    It ends most client processes without END_RUN. So the report cannot know that a site logged no more, and says so.
    """
    tracking = {"server": ["jsonl"], "limits": LIMITS}
    trainer = re.sub("400", "50", TRAINER)

    result = Job(tmp_path / "job", trainer, tracking, n_clients=3, threads=2, rounds=2).run()

    assert result.rc == 0, result.log[-4000:]
    report = result.report("server")
    assert report["adds_up"]
    for site in ("site-1", "site-2", "site-3"):
        assert report["sites"][site]["counted"] in ("final", "stale")
        assert report["sites"][site]["missing"] == 0
        noted = sorted((f.key, f.step, f.value) for f in result.facts(site))
        assert len(noted) >= 100
        assert sorted((p.key, p.step, p.value) for p in result.jsonl_points("server", site)) == noted
        assert report["lanes"]["jsonl"][site]["confirmed"] == len(noted)
