# SPDX-License-Identifier: Apache-2.0
"""How a local run ends that its script does not close: at exit, after an exception, by a signal, or by SIGKILL."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import trackhub
from tests.conftest import MakePlugin
from tests.support.script_without_new_threads import run_script_without_new_threads
from tests.unit.readers_and_bad_backends import json_lines
from trackhub.delivery import receiver as receiver_module
from trackhub.delivery.lane.lane import Lane
from trackhub.delivery.report import REPORT_NAME, read_report
from trackhub.limits import Limits
from trackhub.local_tracking import LocalWriter
from trackhub.process_lock import ProcessLock
from trackhub.runnable_commands import command_for, runnable

FAST = Limits(poll_s=0.005, linger_s=0, flush_s=0.01, deadline_s=5)

HEAD = """
    import os, signal, sys, threading, time, trackhub
    writer = trackhub.local(["jsonl"], folder=sys.argv[1], job="j")
    for i in range(200):
        writer.log({"a": i}, i)
"""


def run_script(folder: Path, ending: str, head: str = HEAD) -> subprocess.CompletedProcess[str]:
    """Run a script that logs 200 records and ends in this way."""
    code = textwrap.dedent(head) + textwrap.dedent(ending)
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )


def stored(folder: Path, job: str = "j") -> list[dict[str, object]]:
    return json_lines(folder / job / "jsonl" / job / "local.jsonl")


def status_of(folder: Path, job: str = "j") -> str:
    last = json.loads((folder / job / "jsonl" / job / "local.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "end"
    return str(last["status"])


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trackhub.cli", *words], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("ending", "status", "code"),
    [
        ("", "finished", 0),
        ("sys.exit()", "finished", 0),
        ("sys.exit(3)", "failed", 3),
        ("raise ValueError('boom')", "failed", 1),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", "failed", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(30)", "failed", -signal.SIGHUP),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(30)", "failed", -signal.SIGINT),
    ],
)
def test_a_run_that_was_not_closed_is_delivered_at_the_end_of_the_script(
    tmp_path: Path, ending: str, status: str, code: int
) -> None:
    done = run_script(tmp_path, ending)

    assert done.returncode == code
    assert [line["step"] for line in stored(tmp_path)] == list(range(200))
    assert status_of(tmp_path) == status
    assert read_report(tmp_path / "j" / "trackhub" / "delivery.json").status == status
    assert f"trackhub: the run was still open when the script ended, and is closed now as {status}" in done.stderr
    assert str(tmp_path / "j" / "jsonl" / "j" / "local.jsonl") in done.stderr


def test_a_script_that_logs_its_first_file_last_delivers_it_without_new_threads(
    tmp_path: Path, make_plugin: MakePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Python 3.12.0 to 3.12.2, the thread for the files of a lane could not start then, and the run stopped."""
    source = """
        from trackhub.records import Kind
        from trackhub.spi import Backend, BackendRun, Capabilities, ConfirmedBy, Redelivery

        class Run(BackendRun):
            def write(self, batch):
                return None

            def finish(self, status):
                pass

        class Beside(Backend):
            spi = 1
            capabilities = Capabilities(
                kinds=frozenset(Kind) - {Kind.GAP},
                confirmed_by=ConfirmedBy.WRITE,
                redelivery=Redelivery.IDEMPOTENT,
                any_order=True,
                files_beside=frozenset({Kind.ARTIFACT}),
            )

            def open_run(self, info):
                return Run()
    """
    monkeypatch.setenv("PYTHONPATH", str(make_plugin("beside", {"beside": "beside:Beside"}, {"beside": source})))

    ended = run_script_without_new_threads(tmp_path / "runs", "beside", {})

    assert (ended.run.confirmed, ended.run.pending, ended.run.state) == (7, 0, "finished"), ended.stderr
    assert ended.run.last_error == ""


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_ends_the_process_at_once_however_many_runs_are_open(
    tmp_path: Path, second: signal.Signals
) -> None:
    ending = f"""
        other = trackhub.local(["jsonl"], folder=sys.argv[1], job="other")
        def close(*_, **__):
            print("ends", flush=True)
            os.kill(os.getpid(), signal.{second.name})
            time.sleep(30)
        writer._delivery.sender.close = other._delivery.sender.close = close
        os.kill(os.getpid(), signal.SIGTERM)
    """
    done = run_script(tmp_path, ending)
    assert (done.returncode, done.stdout) == (-second, "ends\n"), done.stderr


@pytest.mark.parametrize(
    ("leave", "status"),
    [("pass", "finished"), ("sys.exit(0)", "finished"), ("sys.exit('no')", "failed"), ("raise OSError", "failed")],
)
def test_a_with_block_ends_its_run_as_the_block_ends(tmp_path: Path, leave: str, status: str) -> None:
    done = run_script(tmp_path, f"with writer:\n    {leave}\n")

    assert status_of(tmp_path) == status
    assert "closed now" not in done.stderr


def test_an_error_that_the_script_survives_does_not_make_its_run_fail(tmp_path: Path) -> None:
    run_script(tmp_path, "try:\n    sys.exit(2)\nexcept SystemExit:\n    sys.exit(0)\n")
    assert status_of(tmp_path) == "finished"


def test_handlers_of_the_script_itself_keep_working(tmp_path: Path) -> None:
    own = """
        def stop(number, frame):
            print("own handler", flush=True)
            raise SystemExit(0)
        signal.signal(signal.SIGTERM, stop)
    """
    raise_it = "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(30)\n"
    head, call = HEAD.split("\n    writer =", 1)
    for job, code in (
        ("before", textwrap.dedent(head) + textwrap.dedent(own) + textwrap.dedent("    writer =" + call) + raise_it),
        ("after", textwrap.dedent(HEAD) + textwrap.dedent(own) + raise_it),
    ):
        done = run_script(tmp_path / job, "", code)
        assert (done.returncode, done.stdout) == (0, "own handler\n"), done.stderr
        assert status_of(tmp_path / job) == "finished"
        assert len(stored(tmp_path / job)) == 200


def test_signals_and_sys_exit_are_given_back_when_the_last_run_closes(tmp_path: Path) -> None:
    before = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP), sys.exit)
    first, second = (trackhub.local(["jsonl"], folder=tmp_path, limits=FAST) for _ in range(2))
    assert signal.getsignal(signal.SIGTERM) is not before[0]
    first.close()
    assert signal.getsignal(signal.SIGTERM) is not before[0]
    second.close()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP), sys.exit) == before


def test_a_run_that_another_thread_opens_handles_no_signal_and_ends_with_the_script(tmp_path: Path) -> None:
    head = """
        import os, signal, sys, threading, trackhub
        def train():
            writer = trackhub.local(["jsonl"], folder=sys.argv[1], job="j")
            for i in range(200):
                writer.log({"a": i}, i)
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    """
    done = run_script(tmp_path, "", head)
    assert done.returncode == 0, done.stderr
    assert (len(stored(tmp_path)), status_of(tmp_path)) == (200, "finished")


def test_a_forked_child_that_exits_leaves_the_run_of_its_parent_alone(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        if os.fork() == 0:
            writer.log({"child": 1}, 1000)
            sys.exit(4)
        os.wait()
        writer.log({"a": 200}, 200)
        """,
    )
    assert sorted(int(str(line["step"])) for line in stored(tmp_path)) == [*range(201), 1000]
    assert status_of(tmp_path) == "finished"
    assert done.stderr.count("closed now") == 1


@pytest.mark.parametrize("when", ["at once", "when all is delivered"])
def test_a_run_of_a_killed_script_is_named_and_ends_as_killed_after_a_replay(
    tmp_path: Path, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    wait = """
        assert writer.flush(20)
        file = os.path.join(writer.folder, "jsonl", "j", "local.jsonl")
        while not os.path.exists(file) or sum(1 for _ in open(file)) < 200:
            time.sleep(0.01)
    """
    runs = tmp_path / "my runs"
    kill = "os.kill(os.getpid(), signal.SIGKILL)\n"
    run_script(runs, textwrap.dedent(wait if when != "at once" else "") + kill)

    shown = command("status", str(runs)).stdout
    assert "trackhub replay" in shown
    assert ", killed" in shown
    with trackhub.local(["jsonl"], folder=runs, limits=FAST) as other:
        other.log({"a": 1.0})
    (line,) = [record.getMessage() for record in caplog.records if "killed" in record.getMessage()]
    printed = line.split("`")[1]
    assert shlex.split(printed) == [runnable("trackhub"), "replay", str(runs / "j")]

    done = command(*shlex.split(printed)[1:])
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in stored(runs)] == list(range(200))
    assert status_of(runs) == "killed"
    caplog.clear()
    trackhub.local(["jsonl"], folder=runs, limits=FAST).close()
    assert "killed" not in caplog.text


@pytest.mark.parametrize(("failed", "status"), [(False, "finished"), (True, "failed")])
@pytest.mark.parametrize("left_in", ["spool", "journal"])
def test_after_a_replay_the_status_of_a_run_is_that_of_its_script(
    tmp_path: Path, failed: bool, status: str, left_in: str
) -> None:
    run = tmp_path / "j"
    in_the_way = run / "jsonl" / "j"  # a file where the backend wants a folder
    for folder in (in_the_way.parent, run / "trackhub" / "spool"):
        folder.mkdir(parents=True)
    lock = ProcessLock.open(run / "trackhub" / "spool" / "local.lock")  # the sender waits for it
    if left_in == "journal":
        lock.release()
        in_the_way.write_text("")
    writer = trackhub.local(
        ["jsonl"], folder=tmp_path, job="j", limits=Limits(poll_s=0.005, linger_s=0, deadline_s=0.5)
    )
    for step in range(200):
        writer.log({"a": step}, step)
    writer.close(failed=failed)
    lock.release()
    in_the_way.unlink(missing_ok=True)
    assert not list(in_the_way.glob("*"))

    done = command("replay", str(run))

    assert done.returncode == 0, done.stderr + done.stdout
    assert len(stored(tmp_path)) == 200
    assert status_of(tmp_path) == status


def test_a_run_that_goes_on_after_sigkill_ends_as_its_last_script(tmp_path: Path) -> None:
    run_script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)\n")
    with trackhub.local(["jsonl"], folder=tmp_path, job="j", resume=True, limits=FAST) as writer:
        writer.log({"a": 200}, 200)
    assert sorted(int(str(line["step"])) for line in stored(tmp_path)) == list(range(201))
    assert status_of(tmp_path) == "finished"


def test_a_run_that_goes_on_and_is_killed_is_named_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_script(tmp_path, "")
    run_script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)\n", HEAD.replace('job="j"', 'job="j", resume=True'))
    trackhub.local(["jsonl"], folder=tmp_path, limits=FAST).close()
    assert f"`{command_for('trackhub replay', tmp_path / 'j')}`" in caplog.text


def test_with_tracking_turned_off_nothing_is_recorded_and_no_folder_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRACKHUB_MODE", "disabled")
    before = threading.active_count()

    with trackhub.local(["jsonl"], folder=tmp_path / "runs", job="j") as writer:
        writer.set_round(1)
        writer.log({"a": 1.0})
        assert isinstance(writer, LocalWriter)
        assert writer.flush(0)
        assert threading.active_count() == before

    assert writer.report is None
    assert not os.path.lexists(tmp_path / "runs")
    assert caplog.text == ""


def interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def close_interrupted(writer: LocalWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close a writer, and press Ctrl-C while it waits for its sender."""
    assert writer._delivery is not None
    close = writer._delivery.sender.close
    monkeypatch.setattr(writer._delivery.sender, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    close(0.5)


def test_ctrl_c_while_the_run_ends_names_the_command_that_delivers_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "j" / "trackhub" / "spool").mkdir(parents=True)
    lock = ProcessLock.open(tmp_path / "j" / "trackhub" / "spool" / "local.lock")  # so that the sender cannot send
    writer = trackhub.local(["jsonl"], folder=tmp_path, job="j", limits=FAST)
    writer.log({"a": 1.0}, 0)

    close_interrupted(writer, monkeypatch)
    lock.release()

    assert f"`{command_for('trackhub replay', tmp_path / 'j')}` delivers what is left" in capsys.readouterr().err


def test_ctrl_c_while_the_run_ends_reaches_the_script_although_the_receiver_could_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(receiver_module, "set_up_backends", no_space)
    writer = trackhub.local(["jsonl"], folder=tmp_path, job="j", limits=FAST)

    close_interrupted(writer, monkeypatch)

    assert f"`{command_for('trackhub replay', tmp_path / 'j')}` delivers what is left" in capsys.readouterr().err


@pytest.mark.parametrize("interruptions", [1, 2])
def test_after_ctrl_c_while_backends_get_the_rest_the_run_can_go_on_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptions: int
) -> None:
    before = threading.active_count()
    writer = trackhub.local(["jsonl"], folder=tmp_path, job="j", limits=FAST)
    writer.log({"a": 1.0}, 0)
    left = [KeyboardInterrupt] * interruptions
    join = Lane.join

    def interrupted(lane: Lane, timeout_s: float) -> bool:
        if left:
            raise left.pop()
        return join(lane, timeout_s)

    monkeypatch.setattr(Lane, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()

    assert read_report(writer.folder / "trackhub" / REPORT_NAME).status == "finished"
    with trackhub.local(["jsonl"], folder=tmp_path, job="j", limits=FAST, resume=True) as writer:
        writer.log({"a": 2.0}, 1)
    assert [line["step"] for line in stored(tmp_path) if line["kind"] == "metrics"] == [0, 1]
    if interruptions == 1:  # after the second Ctrl-C, nobody waits for the lane
        assert threading.active_count() == before
