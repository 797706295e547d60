# SPDX-License-Identifier: Apache-2.0
"""A script shows the job that it runs: on a terminal in one place, and elsewhere in plain lines."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import trackhub

SCRIPT = """
import subprocess, sys
from pathlib import Path
from trackhub.watch import show_job
folder = Path(sys.argv[1])
with show_job(folder, folder / "job.log") as show:
    print("a line of the script")
    subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write('ValueError: a line of a child')"])
print("after it:", show.last_lines())
"""


def on_terminal(script: str, folder: Path, go_on_after: str | None = None) -> str:
    """Run a script on a terminal of its own, and return what it showed.

    Args:
        script: its text.
        folder: its argument.
        go_on_after: the text after which it gets a line as input.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux reports the end of a terminal as an error
            break
        if not part:
            break
        shown += part
        if go_on_after is not None and go_on_after.encode() in shown:
            os.write(ours, b"\n")
            go_on_after = None
    os.close(ours)
    assert process.wait(60) == 0, shown
    return shown.decode()


def test_on_a_terminal_the_lines_of_a_job_go_to_a_file(tmp_path: Path) -> None:
    shown = on_terminal(SCRIPT, tmp_path)

    before, after = shown.split("after it:")
    assert "waiting for the first record" in before
    assert "a line of" not in before
    assert after.strip() == "['ValueError: a line of a child']"
    assert (tmp_path / "job.log").read_text().splitlines() == ["a line of the script", "ValueError: a line of a child"]


def elsewhere(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script whose output is no terminal.

    Args:
        script: its text.
        folder: its argument.
        environment: more variables of its environment.
    """
    command = [sys.executable, "-c", script, str(folder)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=env)


def test_elsewhere_the_lines_of_a_job_come_as_usual(tmp_path: Path) -> None:
    done = elsewhere(SCRIPT, tmp_path)

    lines = [line for line in done.stdout.splitlines() if "no receiver has begun in" not in line]
    assert lines == ["a line of the script", "after it: []"]
    assert done.stderr == "ValueError: a line of a child"
    assert not (tmp_path / "job.log").exists()


JOB = """
import sys
from pathlib import Path
import trackhub
from trackhub.watch import show_job, show_until_end
show_until_end._LINE_EVERY_S = 0.05
folder = Path(sys.argv[1])
with show_job(folder, folder / "job.log"):
    with trackhub.local(["jsonl"], folder=folder / ("long" * 40), name="job", quiet=True) as writer:
        writer.log({"loss": float(sys.argv[2])}, step=1)
        assert writer.flush(20)
        sys.stdin.readline()
"""


def test_elsewhere_plain_lines_say_what_the_job_does(tmp_path: Path) -> None:
    """A job that was in the folder before is not shown."""
    with trackhub.local(["jsonl"], folder=tmp_path, name="old", quiet=True) as writer:
        writer.log({"loss": 98765.0})
    command = [sys.executable, "-c", JOB, str(tmp_path), "0.5"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.split(" ", 1)[1])
            if "1 confirmed" in line and not process.stdin.closed:
                process.stdin.close()

    assert process.returncode == 0
    assert [line for line in lines if "old" in line or "98765" in line] == []
    assert "job: running; loss: local 0.5; jsonl: 1 confirmed, 0 pending\n" in lines
    assert lines[-1] == "job: finished; loss: local 0.5; jsonl: 1 confirmed, 0 pending\n"


SLOW_LOOK = """
import threading
import trackhub.watch.show_job_in_script as shows
begun = threading.Event()
class SlowFollower(shows.JobFollower):
    def __init__(self, *args, **options):
        begun.wait(1)
        super().__init__(*args, **options)
shows.JobFollower = SlowFollower
"""


def test_a_job_that_begins_at_once_is_not_taken_for_one_that_was_there(tmp_path: Path) -> None:
    job = JOB.replace("sys.stdin.readline()", "begun.set()").replace("sys.argv[2]", "0.5")

    done = elsewhere(SLOW_LOOK + job, tmp_path)

    assert "job: finished; loss: local 0.5; jsonl: 1 confirmed, 0 pending\n" in done.stdout


def test_a_terminal_shows_whole_commands_that_open_a_running_job(tmp_path: Path) -> None:
    shown = on_terminal(JOB.replace("sys.argv[2]", "0.5"), tmp_path, go_on_after="look at it in jsonl")

    (path,) = tmp_path.glob("long*/*/jsonl/**/local.jsonl")
    assert f"look at it in jsonl: {path}" in shown
    assert "finished" in shown.split("running")[-1]


def test_output_that_cannot_hold_a_name_gets_it_with_escapes(tmp_path: Path) -> None:
    job = JOB.replace('name="job"', 'name="größe"').replace("sys.argv[2]", "0.5")

    done = elsewhere(job, tmp_path, PYTHONIOENCODING="ascii")

    assert done.stderr == ""
    assert "gr\\xf6\\xdfe: finished; loss: local 0.5; jsonl: 1 confirmed, 0 pending\n" in done.stdout


def test_a_terminal_that_cannot_hold_a_name_gets_it_with_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    job = JOB.replace('name="job"', 'name="größe"').replace("sys.argv[2]", "0.5")

    shown = on_terminal(job, tmp_path, go_on_after="look at it in jsonl")

    assert "gr\\xf6\\xdfe" in shown
    assert "finished" in shown.split("running")[-1]


def test_a_show_that_breaks_says_so_and_the_job_runs_on(tmp_path: Path) -> None:
    broken = "import trackhub.watch.show_until_end as s\ns.job_line = lambda state: 1 / 0\n"

    done = elsewhere(broken + SCRIPT, tmp_path)

    assert "after it: []" in done.stdout
    assert "the job runs on, but is not shown any more" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_a_log_that_cannot_be_written_leaves_no_descriptor_open(tmp_path: Path) -> None:
    script = """
import contextlib, os, sys
from pathlib import Path
from trackhub.watch import show_job
folder = Path(sys.argv[1])
before = len(os.listdir("/proc/self/fd"))
for _ in range(3):
    with contextlib.suppress(OSError), show_job(folder, folder):
        print("never")
print("left open:", len(os.listdir("/proc/self/fd")) - before)
"""
    assert on_terminal(script, tmp_path) == "left open: 0\r\n"


def test_a_handler_of_ctrl_c_that_python_does_not_know_stays(tmp_path: Path) -> None:
    of_c = "import signal\nsignal.getsignal = lambda number: None\nsignal.signal = lambda *args: 1 / 0\n"

    assert "after it: []" in elsewhere(of_c + SCRIPT, tmp_path).stdout


@pytest.mark.parametrize("code", ["import os, signal; os.kill(os.getpid(), signal.SIGINT)"])
def test_ctrl_c_is_noted_also_where_what_runs_the_job_hides_it(tmp_path: Path, code: str) -> None:
    script = (
        "import sys, contextlib; from pathlib import Path; from trackhub.watch import show_job\n"
        "with show_job(Path(sys.argv[1]), Path(sys.argv[1], 'log')) as show:\n"
        f"    with contextlib.suppress(KeyboardInterrupt):\n        {code}\n"
        "print(show.was_interrupted)"
    )

    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)

    assert (done.stdout.splitlines()[-1], done.stderr) == ("True", "")
