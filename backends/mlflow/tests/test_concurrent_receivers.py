# SPDX-License-Identifier: Apache-2.0
"""Several receivers, each in a process of its own, share one store."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from trackhub_mlflow.shared_parent_run import PENDING_TAG, find_or_create
from trackhub_mlflow.store import StoredRun

if TYPE_CHECKING:
    from pathlib import Path

    from backends.mlflow.tests.conftest import Rig
    from tests.support.mlflow_server import Database, Server

# Say "ready", wait, open, say "open", wait, write, finish.
RECEIVER = """
import sys
from pathlib import Path
from trackhub.spi import JobInfo, Entry, Metrics, RunInfo, RunKey, RunStatus, Side, BackendContext
from trackhub_mlflow import MLflowBackend, MLflowOptions
workdir, uri, experiment, job, site, skew = sys.argv[1:]
options = MLflowOptions(tracking_uri=uri, experiment_name=experiment)
backend = MLflowBackend(options, BackendContext(Path(workdir), JobInfo(job), Side.CLIENT))
print("ready", flush=True)
sys.stdin.readline()
run = backend.open_run(RunInfo(JobInfo(job), site, Side.CLIENT, 1_700_000_000.0 + float(skew), 0, Path(workdir)))
print("open", flush=True)
sys.stdin.readline()
run.write([Entry(0, 1_700_000_000.0, 0, None, Metrics({"x": float(skew)}), "s", 0)])
run.finish(RunStatus.FINISHED)
"""


def run_receivers(workdir: Path, uri: str, job: str, *, receivers: int) -> None:
    """Have all receivers open their runs at the same moment, and finish when all are open."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RECEIVER, str(workdir), uri, f"experiment of {job}", job, f"site-{n}", str(-n)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(receivers)
    ]
    try:
        for word in ("ready", "open"):
            for receiver in started:
                assert receiver.stdout is not None
                assert receiver.stdout.readline().strip() == word
            for receiver in started:
                assert receiver.stdin is not None
                receiver.stdin.write("go\n")
                receiver.stdin.flush()
        for receiver in started:
            receiver.communicate(timeout=60)
            assert receiver.returncode == 0
    finally:
        for receiver in started:
            receiver.kill()
            receiver.communicate()


def check(database: Database, job: str, *, receivers: int) -> None:
    (parent,) = database.parents(job)
    assert parent.status == "FINISHED"
    for n in range(receivers):
        run = database.site_run(f"site-{n}", job)
        assert run.status == "FINISHED"
        assert run.experiment == f"experiment of {job}"
        assert database.tags(run.id)["mlflow.parentRunId"] == parent.id
        assert [value for _, _, value, _ in database.points(run.id)] == [float(-n)]


def test_receivers_that_start_at_once_on_a_server_share_experiment_and_parent(server: Server, tmp_path: Path) -> None:
    for attempt in range(2):
        run_receivers(tmp_path, server.url, f"together-{attempt}", receivers=4)
        check(server.database, f"together-{attempt}", receivers=4)


def test_receivers_that_start_at_once_on_one_file_share_experiment_and_parent(
    make_rig: Callable[..., Rig], tmp_path: Path
) -> None:
    """The file does not exist before."""
    receiver = make_rig(empty=True)

    run_receivers(receiver.workdir, f"sqlite:///{receiver.workdir}/mlflow.db", "job", receivers=2)

    check(receiver.database, "job", receivers=2)
    assert [file.name for file in receiver.workdir.iterdir()] == ["mlflow.db"]


class SlowStore:
    """A store in memory that lets all receivers search before any of them creates a run."""

    def __init__(self, barrier: threading.Barrier | None = None) -> None:
        self.runs: dict[str, dict[str, str]] = {}
        self.starts: dict[str, int] = {}
        self.deleted: list[str] = []
        self._lock = threading.Lock()
        self._barrier = barrier

    def create(self, start_ms: int) -> Callable[[], StoredRun]:
        def create() -> StoredRun:
            if self._barrier is not None:
                self._barrier.wait(10)
            with self._lock:
                run_id = f"run-{len(self.starts)}"
                self.runs[run_id], self.starts[run_id] = {"tag": "identity", PENDING_TAG: "true"}, start_ms
            return self._run(run_id)

        return create

    def find_runs(self, _experiment: str, tag: str, value: str) -> list[StoredRun]:
        with self._lock:
            return [self._run(run_id) for run_id, tags in self.runs.items() if tags.get(tag) == value]

    def delete_tag(self, run_id: str, key: str) -> None:
        with self._lock:
            self.runs[run_id].pop(key, None)

    def delete_run(self, run_id: str) -> None:
        self.deleted.append(run_id)

    def _run(self, run_id: str) -> StoredRun:
        return StoredRun(run_id, "1", "RUNNING", self.starts[run_id], 0, "", True, dict(self.runs[run_id]))


@pytest.mark.parametrize("receivers", [2, 8])
def test_all_who_create_a_run_at_once_agree_on_one(receivers: int) -> None:
    store = SlowStore(threading.Barrier(receivers))
    chosen: list[str] = []

    def ask(start_ms: int) -> None:
        run = find_or_create(store, "1", "tag", "identity", store.create(start_ms), patience_s=10)  # type: ignore[arg-type]
        chosen.append(run.id)

    threads = [threading.Thread(target=ask, args=(n % 3,)) for n in range(receivers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert len(chosen) == receivers
    assert len(set(chosen)) == 1
    assert sorted({*store.deleted, *chosen}) == sorted(store.runs)
    assert [run_id for run_id, tags in store.runs.items() if "tag" in tags and PENDING_TAG not in tags] == [chosen[0]]


def test_a_run_whose_creator_died_is_taken_over() -> None:
    store = SlowStore()
    left = store.create(5)()

    run = find_or_create(store, "1", "tag", "identity", store.create(1), patience_s=0.1)  # type: ignore[arg-type]

    assert run.id == left.id
    assert PENDING_TAG not in store.runs[left.id]
