# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the fault suite."""

from __future__ import annotations

import contextlib
import subprocess
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import LIMITS, World, wait_for

MakeWorld = Callable[..., World]
TOTALS: Counter[str] = Counter()
PASSED = pytest.StashKey[bool]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With tests side by side, hand this process's part of the figures to the one that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = dict(TOTALS)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over a process's part of the figures. One that crashed has none, and has failed its tests."""
    TOTALS.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the suite's figures: of the tests that passed, since each checks that no record is lost without a count."""
    if TOTALS:
        figures = "{jobs} jobs without FLARE, {killed} processes killed, {records} records logged".format_map(TOTALS)
        failed = len(terminalreporter.stats.get("failed", [])) + len(terminalreporter.stats.get("error", []))
        none = f"in those of {failed} failed tests it is not known" if failed else "0 without"
        terminalreporter.write_line(f"faults: {figures}; {TOTALS['counted']} lost with a count, {none}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep whether the test passed, for the figures."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path, kib: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", f"size={kib}k", "none")

    def resize(self, kib: int) -> None:
        """Give it another size."""
        self._mount("-o", f"remount,size={kib}k")

    def set_read_only(self, read_only: bool) -> None:
        """Make it read-only, as soon as no file on it is open for writing, or writable again."""
        option = f"remount,{'ro' if read_only else 'rw'}"
        wait_for(lambda: subprocess.run(["mount", "-o", option, self.folder], check=False).returncode == 0, option)

    def fill(self) -> Path:
        """Use up all space that is left; return the file to delete."""
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
def make_disk(make_world: MakeWorld) -> Iterator[Callable[[Path, int], Disk]]:
    """Make small disks. Only root can mount them."""
    disks: list[Disk] = []

    def make(folder: Path, kib: int) -> Disk:
        try:
            disk = Disk(folder, kib)
        except (OSError, subprocess.CalledProcessError) as e:
            pytest.skip(f"a disk that can be filled is made by mounting a tmpfs, which is not permitted here: {e}")
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        disk.close()


@pytest.fixture
def make_world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MakeWorld]:
    """Make jobs; when the test ends, none of their processes may be left."""
    worlds: list[World] = []

    def make(backends: dict[str, dict[str, Any]] | None = None, *, files: bool = False, **limits: float | str) -> World:
        chosen = {"jsonl": {}} if backends is None else backends
        world = World(tmp_path / f"job-{len(worlds)}", chosen, {**LIMITS, **limits}, files=files)
        worlds.append(world)
        return world

    try:
        yield make
        for world in worlds:
            figures = world.totals()
            world.check_nothing_stays()
            if request.node.stash.get(PASSED, False):
                TOTALS.update(figures)
    finally:
        for world in worlds:
            world.close()
