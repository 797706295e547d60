# SPDX-License-Identifier: Apache-2.0
"""Under any fault of a backend or a receiver, training gives the same model, bit by bit, and the job succeeds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.conftest import Disk
from tests.faults.independent_readers import count_site
from tests.faults.training import BACKEND_FAULTS, HEALTHY, LOGGED, NONE, RECEIVER_FAULTS, Fault, model, train
from tests.integration.harness import JobResult

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:trackhub. backend")]

SITES = ("site-1", "site-2")


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the model that the job gives without tracking."""
    result = train(tmp_path_factory.mktemp("untracked"), NONE)
    assert result.rc == 0, result.log[-4000:]
    return model(result)


def assert_same_model(result: JobResult, untracked: bytes) -> None:
    assert result.rc == 0, result.log[-6000:]
    assert model(result) == untracked


@pytest.mark.parametrize("fault", [HEALTHY, *BACKEND_FAULTS], ids=lambda fault: fault.name)
def test_under_a_backends_fault_training_gives_the_same_model(tmp_path: Path, untracked: bytes, fault: Fault) -> None:
    result = train(tmp_path, fault)

    assert_same_model(result, untracked)
    report = result.report("server")
    assert report["balanced"]
    assert set(report["lanes"]) == {"jsonl", *fault.backends, *fault.servers}
    for site in SITES:
        assert [point.step for point in result.jsonl_points("server", site)] == list(range(LOGGED))
    for name, lane in report["lanes"].items():
        for site in SITES:
            run = lane[site]
            assert run["confirmed"] + run["pending"] + sum(run["rejected"].values()) == LOGGED
            if name == "jsonl":
                assert run["confirmed"] == LOGGED


@pytest.mark.parametrize("fault", RECEIVER_FAULTS, ids=lambda fault: fault.name)
def test_under_a_receivers_fault_training_gives_the_same_model(tmp_path: Path, untracked: bytes, fault: Fault) -> None:
    result = train(tmp_path, fault)

    assert_same_model(result, untracked)
    assert_every_record_is_counted(result)


def test_with_a_receiver_whose_disk_is_full_training_gives_the_same_model(
    tmp_path: Path, untracked: bytes, make_disk: Callable[[Path, int], Disk]
) -> None:
    disk = make_disk(tmp_path / "disk", 256)
    disk.fill()

    result = train(tmp_path / "full", replace(HEALTHY, receiver_folder=str(disk.folder / "receiver")))

    assert_same_model(result, untracked)
    assert_every_record_is_counted(result)


LOCKER = """
import sqlite3, sys, time
from pathlib import Path
folder, held_s = Path(sys.argv[1]), float(sys.argv[2])
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    try:
        journal = next(folder.rglob("trackhub.db"), folder)
        db = sqlite3.connect(f"{journal.as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=5)
        if db.execute("SELECT count(*) FROM batches").fetchone()[0]:
            break
    except sqlite3.Error:
        pass
    time.sleep(0.02)
db.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
time.sleep(held_s)
"""


@pytest.mark.parametrize("held_s", [4, 600], ids=["for a while", "to the end"])
def test_with_a_journal_that_is_locked_training_gives_the_same_model(
    tmp_path: Path, untracked: bytes, held_s: float
) -> None:
    folder = tmp_path / "receiver"
    command = [sys.executable, "-c", LOCKER, str(folder), str(held_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as locker:
        try:
            result = train(tmp_path / "locked", replace(HEALTHY, receiver_folder=str(folder)))
        finally:
            locker.kill()
        assert locker.stdout is not None
        assert locker.stdout.read() == "locked\n"

    assert_same_model(result, untracked)
    assert_every_record_is_counted(result)


def assert_every_record_is_counted(result: JobResult) -> None:
    for site in SITES:
        found = count_site(result.run_dir(site) / "trackhub" / "spool")
        assert found.logged == LOGGED
        assert found.logged == found.acked + found.spooled + found.dropped.total() + found.refused.total()
