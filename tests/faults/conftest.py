# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the fault suite, `make_job`, `make_disk` and `job_faults`, and the figures that it prints at its end."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.job_processes import LIMITS, JobProcesses
from tests.faults.process import wait_for
from tests.faults.random_faults import SITES, RandomFaults

MakeJob = Callable[..., JobProcesses]
TOTALS: Counter[str] = Counter()
PASSED = pytest.StashKey[bool]()
KINDS = (
    "resumable", "at_least_once", "wandb offline", "rebuild", "wandb online",
    "idempotent", "buffered", "resumable", "rebuild", "at_least_once",
)  # fmt: skip
"""The backend beside ``jsonl`` and ``tensorboard``, by the last digit of the seed."""
SPOOL_BYTES = 12 << 20
"""Room for all that a job logs while nothing is sent."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs one seed of the random faults."""
    parser.addoption("--fault-seed", type=int, help="run this seed of the random faults alone")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give the random faults their seeds: two short ones, fifty in the long form, or the one that the option names."""
    if "fault_seed" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--fault-seed", None)
        few = [] if chosen is not None else [pytest.param(seed, 3, id=f"{seed}-short") for seed in range(2)]
        marks = [pytest.mark.long] if chosen is None else []
        seeds = range(50) if chosen is None else [chosen]
        many = [pytest.param(seed, 16, id=str(seed), marks=marks) for seed in seeds]
        metafunc.parametrize(("fault_seed", "fault_count"), [*few, *many])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand this worker's part of the figures to the process that prints them, if pytest-xdist runs the tests."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = dict(TOTALS)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    """Add a worker's part of the figures. A worker that crashed has none; its tests have failed anyway."""
    TOTALS.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures of the passed tests: each of these has checked that no record is lost without a count."""
    if TOTALS:
        figures = "{jobs} jobs without FLARE, {killed} processes killed, {records} records logged".format_map(TOTALS)
        failed = len(terminalreporter.stats.get("failed", [])) + len(terminalreporter.stats.get("error", []))
        none = f"unknown without, since {failed} tests failed" if failed else "0 without"
        terminalreporter.write_line(f"faults: {figures}; {TOTALS['counted']} lost with a count, {none}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember whether the test passed, for the figures."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


class Disk:
    """A small file system in memory, mounted on a folder."""

    def __init__(self, folder: Path, kib: int, *, inodes: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", f"size={kib}k,nr_inodes={inodes}", "none")  # 0 is no limit

    def allow_inodes(self, inodes: int) -> None:
        """Change how many files it may have; 0 is no limit."""
        self._mount("-o", f"remount,nr_inodes={inodes}")

    def resize(self, kib: int) -> None:
        """Change its size."""
        self._mount("-o", f"remount,size={kib}k")

    def set_read_only(self, read_only: bool) -> None:
        """Make it read-only, or writable again. Waits until no file on it is open for writing."""
        option = f"remount,{'ro' if read_only else 'rw'}"
        wait_for(lambda: subprocess.run(["mount", "-o", option, self.folder], check=False).returncode == 0, option)

    def fill(self) -> Path:
        """Use up the space that is left. Return the file whose removal frees it."""
        path = self.folder / "filler"
        with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        return path

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.folder], check=True)

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments, self.folder], check=True, capture_output=True)


@pytest.fixture
def make_disk(make_job: MakeJob) -> Iterator[Callable[..., Disk]]:
    """Make small disks. Only root can mount them; without root, the test is skipped."""
    disks: list[Disk] = []

    def make(folder: Path, kib: int, **options: int) -> Disk:
        try:
            disk = Disk(folder, kib, **options)
        except (OSError, subprocess.CalledProcessError) as e:
            pytest.skip(f"the test mounts a tmpfs as a small disk, and that is not permitted here: {e}")
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        disk.close()


@pytest.fixture
def make_job(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MakeJob]:
    """Make jobs. When the test ends, none of their processes may be left."""
    jobs: list[JobProcesses] = []

    def make(
        backends: dict[str, dict[str, Any]] | None = None, *, files: bool = False, **limits: float | str
    ) -> JobProcesses:
        chosen = {"jsonl": {}} if backends is None else backends
        job = JobProcesses(tmp_path / f"job-{len(jobs)}", chosen, {**LIMITS, **limits}, files=files)
        jobs.append(job)
        return job

    try:
        yield make
        for job in jobs:
            figures = job.totals()
            job.check_nothing_stays()
            if request.node.stash.get(PASSED, False) and not job.has_planted_bug:
                TOTALS.update(figures)
    finally:
        for job in jobs:
            job.close()


@pytest.fixture
def job_faults(make_job: MakeJob, request: pytest.FixtureRequest) -> Callable[[int], RandomFaults]:
    """Make a job with the backends of a seed, and the driver that breaks it."""

    def make(seed: int) -> RandomFaults:
        kind, _, mode = KINDS[seed % len(KINDS)].partition(" ")
        job = make_job({}, files=True, sites_s=4, files_s=8, deadline_s=6)
        job.spool_bytes = SPOOL_BYTES
        job.backends = {"jsonl": {}, "tensorboard": {}, kind: {}}
        if mode:
            online = job.wandb_server()  # offline as well, for the login that is not used
            job.backends["wandb"] = online if mode == "online" else {"mode": "offline"}
        else:
            job.backends[kind] = {"down_while": str(job.folder / "down")}
        disks: dict[str, Any] = {}
        if os.geteuid() == 0:
            make_disk: Callable[[Any, int], Disk] = request.getfixturevalue("make_disk")
            disks = {site: make_disk(job.spool(site).parent, 16384) for site in SITES}
            disks["server"] = make_disk(job.journal.parent, 65536)
        return RandomFaults(job, seed, disks)

    return make
