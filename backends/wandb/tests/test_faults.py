# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
from trackhub_wandb import WandBBackend
from trackhub_wandb.sdk_start_and_stop import service_is_lost

from backends.wandb.tests.conftest import Rig, entry, losses, services
from tests.support.wandb_emulator import Emulator, Fault
from trackhub.spi import Artifact, BackendRun, Params, RunStatus, Text, TransientError

Online = Callable[..., WandBBackend]


def persist(call: Callable[[], Any], within_s: float = 60.0) -> int:
    """Call again, as the lane does, until it succeeds; return how often it failed."""
    deadline = time.monotonic() + within_s
    failures = 0
    while True:
        try:
            call()
        except TransientError:
            failures += 1
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return failures


def steps(emulator: Emulator, rig: Rig) -> list[int]:
    """Return the positions of the rows at the server."""
    return [row["_step"] for row in emulator.state.run(rig.info().run_id).history()]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault("file_stream", status=429, retry_after_s=0.2, times=2), id="429"),
        pytest.param(Fault("file_stream", status=500, applied=True, times=2), id="500 after applying"),
        pytest.param(Fault("file_stream", status=0), id="reset"),
        pytest.param(Fault("file_stream", status=0, applied=True), id="reset after applying"),
        pytest.param(Fault("file_stream", status=200, delay_s=1.5), id="slow"),
        pytest.param(Fault("graphql", operation="TrackhubRunState", status=503), id="no answer to our own question"),
    ],
)
def test_fault_of_the_server_costs_no_row_and_doubles_none(
    online: Online, rig: Rig, emulator: Emulator, fault: Fault
) -> None:
    """The history's offsets make it harmless to send a request again."""
    run = online(flush_timeout_s=20.0).open_run(rig.info())
    run.write(losses(range(10)))
    persist(run.flush)
    emulator.fail(dataclasses.replace(fault))
    run.write(losses(range(10, 50)))
    persist(run.flush)
    run.write(losses(range(50, 60)))
    persist(run.flush)
    run.finish(RunStatus.FINISHED)
    assert steps(emulator, rig) == list(range(60))
    assert emulator.faults_left() == 0
    if fault.applied:
        assert emulator.state.run(rig.info().run_id).resent > 0


@pytest.mark.long
def test_upload_that_the_sdk_gave_up_is_started_again(online: Online, rig: Rig, emulator: Emulator) -> None:
    """A request that is refused for good ends the SDK's upload, with a printed line only. The run is opened again."""
    run = online(flush_timeout_s=2.5).open_run(rig.info())
    run.write(losses(range(10)))
    persist(run.flush)
    emulator.fail(Fault("file_stream", status=400))
    run.write([*losses(range(10, 20)), entry(20, Params({"lr": 1}))])
    assert persist(run.flush) >= 3
    run.finish(RunStatus.FINISHED)
    held = emulator.state.run(rig.info().run_id)
    assert steps(emulator, rig) == list(range(20))
    assert (held.params()["lr"], held.state) == (1, "finished")


@pytest.mark.long
def test_file_and_config_that_were_refused_are_retries(online: Online, rig: Rig, emulator: Emulator) -> None:
    """The SDK drops a file or a config that it could not upload. Flush notices that it is missing."""
    run = online(flush_timeout_s=8.0).open_run(rig.info())
    emulator.fail(Fault("upload", status=403))
    emulator.fail(Fault("graphql", operation="UpsertBucket", status=400))
    run.write([entry(0, Text("note", "hello")), entry(1, Params({"lr": 1}))])
    assert persist(run.flush) >= 1
    run.finish(RunStatus.FINISHED)
    held = emulator.state.run(rig.info().run_id)
    assert held.params()["lr"] == 1
    assert held.history()[0]["note"]["path"] in held.files


def test_outage_costs_no_row(online: Online, rig: Rig, emulator: Emulator) -> None:
    """The server goes away and comes back. Meanwhile nothing blocks, and nothing is confirmed."""
    run = online().open_run(rig.info())
    run.write(losses(range(10)))
    persist(run.flush)
    emulator.stop()
    run.write(losses(range(10, 500)))
    with pytest.raises(TransientError):
        run.flush()
    emulator.start()
    persist(run.flush)
    run.finish(RunStatus.FINISHED)
    assert steps(emulator, rig) == list(range(500))


@pytest.mark.long
def test_run_is_opened_when_the_server_comes_back(online: Online, rig: Rig, emulator: Emulator) -> None:
    """The first attempts fail, since the server is down or refuses. Later ones with the same id succeed."""
    backend = online(init_timeout_s=2.0)
    emulator.stop()
    with pytest.raises(TransientError):
        backend.open_run(rig.info())
    emulator.start()
    emulator.fail(Fault("graphql", operation="UpsertBucket", status=500, times=2))
    opened: list[BackendRun] = []
    assert persist(lambda: opened.append(backend.open_run(rig.info()))) >= 1
    opened[0].write(losses(range(3)))
    persist(opened[0].flush)
    opened[0].finish(RunStatus.FINISHED)
    assert steps(emulator, rig) == [0, 1, 2]


def test_dead_server_does_not_hold_up_the_end(online: Online, rig: Rig, emulator: Emulator) -> None:
    """Every call returns in bounded time, and ``close`` at once. No process or thread is left."""
    backend = online(flush_timeout_s=3.0, finish_timeout_s=1.0)
    runs = [backend.open_run(rig.info(f"site-{number}")) for number in range(4)]
    for run in runs:
        run.write(losses(range(5)))
        persist(run.flush)
    emulator.stop()
    started = time.monotonic()
    blob = rig.blob(b"x", "a/b")
    for run in runs:
        run.write(losses(range(5, 50)))
        with pytest.raises(TransientError):
            run.flush()
        with pytest.raises(TransientError):
            run.write([entry(50, Artifact("m", blob, "m"))])
    # Only the first run waits for the server. The others know by then.
    assert time.monotonic() - started < 15
    for run in runs[:2]:
        with pytest.raises(TransientError):
            run.finish(RunStatus.FINISHED)
    assert time.monotonic() - started < 20
    closing = time.monotonic()
    backend.close()
    assert time.monotonic() - closing < 5
    assert services() == []


def test_service_that_was_killed_is_replaced(online: Online, rig: Rig, emulator: Emulator) -> None:
    """The SDK's service may run out of memory. A new one gets what was not confirmed."""
    run = online().open_run(rig.info())
    run.write(losses(range(10)))
    persist(run.flush)
    run.write(losses(range(10, 20)))
    done = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in done.stdout.splitlines()]
    (pid,) = [int(row[0]) for row in rows if row[1] == str(os.getpid()) and "wandb-core" in row[2]]
    os.kill(pid, signal.SIGKILL)
    while not service_is_lost():
        time.sleep(0.01)
    persist(lambda: run.write(losses(range(20, 30))))
    persist(run.flush)
    run.finish(RunStatus.FINISHED)
    assert steps(emulator, rig) == list(range(30))


def test_unended_run_is_ended_when_the_server_comes_back(online: Online, rig: Rig, emulator: Emulator) -> None:
    """A finish that failed can be called again."""
    run = online(finish_timeout_s=1.0).open_run(rig.info())
    run.write(losses(range(5)))
    persist(run.flush)
    emulator.stop()
    with pytest.raises(TransientError):
        run.finish(RunStatus.FAILED)
    emulator.start()
    persist(lambda: run.finish(RunStatus.FAILED))
    held = emulator.state.run(rig.info().run_id)
    assert (held.state, held.exit_code, len(held.rows)) == ("failed", 1, 5)
