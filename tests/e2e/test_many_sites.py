# SPDX-License-Identifier: Apache-2.0
"""Many sites in one W&B receiver: one process serves them all, and the job ends."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.stores import BACKENDS, canonical, own_home, read_run, same_points, were_logged
from tests.integration.harness import Job
from trackhub import Writer
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.sender import Sender
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.spool.layout import SpoolInfo, create_spool

JOB = "job-1"
SITES = [f"site-{number}" for number in range(1, 17)]
RECORDS = 100
BACKENDS_USED = {name: BACKENDS[name] for name in ("jsonl", "wandb")}

TRAINER = f"""
from trackhub import Writer

writer = Writer()


def train(n):
    for i in range({RECORDS // 2}):
        values = {{"train/loss": 1 / (i + 3)}}
        fact(lambda: writer.log(values, i), values, i)


rounds(train)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_home(tmp_path / "home", monkeypatch)


def services(root: int) -> set[int]:
    """Return the processes below this one that are W&B's."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        children[parent].append(int(folder.name))
    below = [root]
    while below:
        pid = below.pop()
        below += children[pid]
        if pid != root and "wandb-core" in _program(pid):
            found.add(pid)
    return found


def _program(pid: int) -> str:
    try:
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return ""  # it has ended


@contextmanager
def watch_services() -> Iterator[list[int]]:
    """Count W&B's processes below this one, many times a second."""
    counts: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            counts.append(len(services(os.getpid())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield counts
    finally:
        stop.set()
        thread.join()


def test_16_sites_share_one_process_of_wandb_and_each_has_its_run(tmp_path: Path) -> None:
    receiver = Receiver(
        tmp_path, job=JobInfo(JOB), side=Side.SERVER, backends=BACKENDS_USED,
        limits=Limits(deadline_s=120),
    )  # fmt: skip
    receiver.start()

    def deliver(site: str) -> None:
        spool = tmp_path / "sites" / site
        create_spool(spool, SpoolInfo(site, JOB, ("server",), 1 << 30))
        sender = Sender(spool, receiver.channel(site))
        sender.start()
        with Writer(spool) as writer:
            for step in range(RECORDS):
                writer.log({"train/loss": 1 / (step + 3)}, step)
        assert sender.close(60).spooled == 0

    with watch_services() as counts:
        with ThreadPoolExecutor(len(SITES)) as pool:
            list(pool.map(deliver, SITES))
        report = receiver.finish(RunStatus.FINISHED)

    assert set(counts) <= {0, 1}
    assert 1 in counts
    assert services(os.getpid()) == set()
    assert report.undelivered() == report.lost() == 0
    for site in SITES:
        logged = read_run("jsonl", tmp_path, JobInfo(JOB), site, Side.SERVER).points
        assert [(p.step, p.value) for p in logged] == [(step, 1 / (step + 3)) for step in range(RECORDS)]
        found = read_run("wandb", tmp_path, JobInfo(JOB), site, Side.SERVER)
        same_points(found.points, canonical("wandb", logged))
        assert found.status == "finished"


@pytest.mark.long
def test_a_flare_job_of_16_sites_ends_with_one_process_of_wandb(tmp_path: Path) -> None:
    job = Job(tmp_path / "job", TRAINER, {"server": BACKENDS_USED, "limits": {"deadline_s": 120}}, n_clients=len(SITES))

    with watch_services() as counts:
        result = job.run()

    assert result.rc == 0, result.log[-6000:]
    assert set(counts) <= {0, 1}
    assert 1 in counts
    for site in SITES:
        run_dir = result.run_dir("server")
        logged = read_run("jsonl", run_dir, result.job, site, Side.SERVER).points
        were_logged(result.facts(site), logged)
        found = read_run("wandb", run_dir, result.job, site, Side.SERVER)
        same_points(found.points, canonical("wandb", logged))
        assert found.status == "finished"
