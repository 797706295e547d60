# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trackhub_wandb import WandBBackend
from trackhub_wandb.sdk_start_and_stop import exclusive_sdk, service_is_lost, stop_service

import trackhub
from backends.wandb.tests.conftest import Rig, entry, losses, services
from tests.support.wandb_emulator import Emulator, Fault
from trackhub.delivery.replay_journal_or_spool import replay_journal
from trackhub.limits import Limits
from trackhub.spi import (
    Artifact,
    BackendRun,
    Confirmation,
    Params,
    PermanentError,
    RunStatus,
    Table,
    Text,
    TransientError,
)

Online = Callable[..., WandBBackend]


def persist(call: Callable[[], Any], within_s: float = 60.0) -> int:
    """Call again, as the lane does, until it succeeds and leaves nothing out; return how often it did not."""
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
            left = call.__self__.left_out() if call.__name__ == "flush" else []  # type: ignore[attr-defined]
            if not left:
                return failures
            failures += 1
            assert time.monotonic() < deadline, left
            time.sleep(0.2)


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


def service_pid() -> int:
    """Return the process id of the SDK's service."""
    done = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 2) for line in done.stdout.splitlines()]
    (pid,) = [int(row[0]) for row in rows if row[1] == str(os.getpid()) and "wandb-core" in row[2]]
    return pid


def kill_service() -> None:
    """Kill the SDK's service, and wait until it is gone."""
    pid, before = service_pid(), services()
    os.kill(pid, signal.SIGKILL)
    # Another thread may notice it first, and start a new service.
    while not service_is_lost() and services() == before and os.path.exists(f"/proc/{pid}"):
        time.sleep(0.01)


def test_a_service_that_does_not_end_in_time_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    with exclusive_sdk():
        os.kill(service_pid(), signal.SIGSTOP)
    stop_service(0.2)
    assert services() == []
    assert "did not end within 0.2 s and is killed" in caplog.text


def test_service_that_was_killed_is_replaced(online: Online, rig: Rig, emulator: Emulator) -> None:
    """The SDK's service may run out of memory. A new one gets what was not confirmed."""
    run = online().open_run(rig.info())
    run.write(losses(range(10)))
    persist(run.flush)
    run.write(losses(range(10, 20)))
    kill_service()
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


@pytest.mark.long
@pytest.mark.parametrize("operation", ["CreateArtifact", "CommitArtifact"])
@pytest.mark.parametrize("status", [400, 403])
def test_an_artifact_that_was_refused_is_sent_again_and_holds_up_no_metric(
    online: Online, rig: Rig, emulator: Emulator, operation: str, status: int
) -> None:
    run = online().open_run(rig.info())
    emulator.fail(Fault("graphql", operation=operation, status=status))
    with pytest.raises(TransientError, match="refused the artifact"):
        run.write([entry(5, Artifact("model", rig.blob(b"x", "a/b"), "m.bin"))])
    run.write([*losses(range(5)), *losses(range(6, 10))])
    assert run.flush() is Confirmation.STORE
    assert persist(lambda: run.write([entry(5, Artifact("model", rig.blob(b"x", "a/b"), "m.bin"))])) == 0
    run.finish(RunStatus.FINISHED)
    assert steps(emulator, rig) == [*range(5), *range(6, 10)]
    (model,) = [one for one in emulator.state.artifacts if one.state == "COMMITTED"]
    assert (model.artifact_type, model.files["m.bin"]) == ("file", b"x")


@pytest.mark.long
def test_an_artifact_that_is_refused_for_good_is_rejected_and_nothing_else(
    online: Online, rig: Rig, emulator: Emulator
) -> None:
    run = online().open_run(rig.info())
    emulator.fail(Fault("graphql", operation="CreateArtifact", status=400, times=100))
    bad = entry(0, Artifact("model", rig.blob(b"x", "a/b"), "m.bin"))
    for _ in range(2):
        with pytest.raises(TransientError, match="refused"):
            run.write([bad])
    with pytest.raises(PermanentError, match="refused the artifact 3 times"):
        run.write([bad])
    with pytest.raises(PermanentError, match="reserved"):
        run.write([entry(0, Artifact("model", rig.blob(b"x", "a/b"), "m.bin", "job"))])
    run.write(losses(range(1, 5)))
    assert run.flush() is Confirmation.STORE
    run.finish(RunStatus.FINISHED)
    assert steps(emulator, rig) == list(range(1, 5))


@pytest.mark.long
def test_an_artifact_that_is_forbidden_stays_pending_alone_at_the_end_of_the_job(
    tmp_path: Path, emulator: Emulator
) -> None:
    """A forbidden request may be mended: the operator can renew the login. So the artifact waits for a replay."""
    emulator.fail(Fault("graphql", operation="CreateArtifact", status=403, times=1000))
    (tmp_path / "m.bin").write_bytes(b"x")
    options = {"mode": "online", "base_url": emulator.url, "api_key": "${secret:KEY}", "upload_interval_s": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY", emulator.state.api_key)
        tracking = trackhub.local({"wandb": options}, folder=tmp_path / "run", job="j", limits=Limits(deadline_s=12))
        with tracking as writer:
            for step in range(10):
                writer.log({"loss": 1.0}, step)
                if step == 4:
                    writer.log_artifact(tmp_path / "m.bin")
    assert tracking.report is not None
    (found,) = [run for run in tracking.report.lanes["wandb"].values() if run.confirmed >= 10]
    assert (found.pending, found.rejected, found.state) == (1, {}, "unfinished")
    assert "403" in found.last_error


@pytest.mark.long
def test_metrics_are_confirmed_while_an_artifact_is_uploaded_slowly(
    online: Online, rig: Rig, emulator: Emulator
) -> None:
    run = online().open_run(rig.info())
    emulator.fail(Fault("upload", status=200, delay_s=5.0))
    artifact = [entry(0, Artifact("model", rig.blob(b"x" * 1000, "a/b"), "m.bin"))]
    thread = threading.Thread(target=run.write, args=(artifact,))
    thread.start()
    run.write(losses(range(1, 5)))
    assert persist(run.flush) == 0
    assert thread.is_alive()
    thread.join()
    run.finish(RunStatus.FINISHED)
    assert [one.state for one in emulator.state.artifacts] == ["COMMITTED"]


@pytest.mark.long
def test_an_upload_that_takes_longer_than_a_flush_is_not_begun_again(
    online: Online, rig: Rig, emulator: Emulator
) -> None:
    """The SDK's own wait cancels an upload when its time is over."""
    run = online(flush_timeout_s=1.0).open_run(rig.info())
    emulator.fail(Fault("upload", status=200, delay_s=4.0))
    artifact = [entry(0, Artifact("model", rig.blob(b"x" * 1000, "a/b"), "m.bin"))]
    assert persist(lambda: run.write(artifact)) >= 2
    run.finish(RunStatus.FINISHED)
    assert [(one.state, one.files["m.bin"]) for one in emulator.state.artifacts] == [("COMMITTED", b"x" * 1000)]


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 100])
def test_a_table_whose_artifact_is_refused_holds_up_no_later_record(
    online: Online, rig: Rig, emulator: Emulator, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is sent again. If W&B refuses it each time, the table's row and its file are stored all the same."""
    run = online(flush_timeout_s=6.0).open_run(rig.info())
    emulator.fail(Fault("graphql", operation="CreateArtifact", status=403, times=times))
    run.write([entry(0, Table("t", ["a"], [[1]])), *losses(range(1, 5))])
    assert run.flush() is Confirmation.STORE
    assert {late.position for late in run.left_out()} <= {0}
    persist(run.flush)
    run.finish(RunStatus.FINISHED)
    held = emulator.state.run(rig.info().run_id)
    assert steps(emulator, rig) == list(range(5))
    assert json.loads(held.files[held.history()[0]["t"]["path"]])["data"] == [[1]]
    assert [one.state for one in emulator.state.artifacts if one.state == "COMMITTED"] == ["COMMITTED"] * (times == 1)
    assert ("W&B's pages will not show" in caplog.text) == (times > 1)


@pytest.mark.long
def test_rows_are_confirmed_while_the_files_of_other_rows_are_on_their_way(
    online: Online, rig: Rig, emulator: Emulator
) -> None:
    """A table has a file and an artifact. The record with the table is left out until both have arrived."""
    run = online().open_run(rig.info())
    emulator.fail(Fault("upload", status=200, delay_s=6.0, times=2))
    run.write([*losses(range(3)), entry(3, Table("t", ["a"], [[1]])), *losses(range(4, 8))])
    started = time.monotonic()
    assert run.flush() is Confirmation.STORE
    took_s, late = time.monotonic() - started, [left.position for left in run.left_out()]
    run.write(losses(range(8, 12)))
    assert run.flush() is Confirmation.STORE
    late += [left.position for left in run.left_out()]
    assert persist(run.flush) > 0
    run.finish(RunStatus.FINISHED)
    assert (took_s < 6.0, late) == (True, [3, 3])
    assert steps(emulator, rig) == list(range(12))
    assert [one.state for one in emulator.state.artifacts] == ["COMMITTED"]


@pytest.mark.long
def test_a_table_whose_file_does_not_arrive_is_pending_alone_and_a_replay_delivers_it(
    tmp_path: Path, emulator: Emulator
) -> None:
    fault = Fault("upload", status=403, times=100_000)
    emulator.fail(fault)
    options = {"mode": "online", "base_url": emulator.url, "api_key": "${secret:KEY}", "upload_interval_s": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY", emulator.state.api_key)
        tracking = trackhub.local({"wandb": options}, folder=tmp_path / "run", job="j", limits=Limits(deadline_s=15))
        with tracking as writer:
            for step in range(10):
                writer.log({"loss": 1.0}, step)
                if step == 4:
                    writer.log_table("t", ["a"], [[7]], step=step)
        fault.times = 1  # the next one is the last
        replayed = replay_journal(tracking.folder / "trackhub" / "trackhub.db", operator=None)

    assert tracking.report is not None
    (found,) = [run for run in tracking.report.lanes["wandb"].values() if run.confirmed >= 10]
    assert (found.pending, found.rejected, found.state) == (1, {}, "unfinished")
    assert {run.pending for run in replayed.lanes["wandb"].values()} == {0}
    held = [run for run in emulator.state.runs.values() if len(run.history()) == 11]
    assert [json.loads(run.files[row["t"]["path"]])["data"] for run in held for row in run.history() if "t" in row] == [
        [[7]]
    ]


@pytest.mark.long
def test_an_artifact_survives_that_the_service_is_killed_during_its_upload(
    online: Online, rig: Rig, emulator: Emulator
) -> None:
    """The thread that waits for it, or the other one, opens the run again. Each row and the artifact arrive once."""
    run = online(flush_timeout_s=5.0).open_run(rig.info())
    emulator.fail(Fault("upload", status=200, delay_s=3.0))
    artifact = [entry(5, Artifact("model", rig.blob(b"x" * 1000, "a/b"), "m.bin"))]
    thread = threading.Thread(target=persist, args=(lambda: run.write(artifact),))
    run.write(losses(range(5)))
    thread.start()
    persist(run.flush)
    kill_service()
    persist(lambda: run.write(losses(range(6, 10))))
    persist(run.flush)
    thread.join(60)
    assert not thread.is_alive()
    persist(lambda: run.finish(RunStatus.FINISHED))
    assert steps(emulator, rig) == [*range(5), *range(6, 10)]
    assert [one.files["m.bin"] for one in emulator.state.artifacts if one.state == "COMMITTED"] == [b"x" * 1000]
