# SPDX-License-Identifier: Apache-2.0
"""What a person gets wrong on the command line is answered in a line that says what was expected, with a status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import trackhub
from tests.unit.readers_and_bad_backends import new_spool
from trackhub.cli import main
from trackhub.cli.output import print_table


class Said(NamedTuple):
    status: int | str | None
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Run a command in this process, in a folder without anything."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    capsys.readouterr()

    def run(*args: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["trackhub", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Said(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished job in ``good``, and with things that only look like one."""
    folder = tmp_path_factory.mktemp("jobs")
    with trackhub.local(["jsonl"], folder=folder, job="good") as writer:
        writer.log({"loss": 1.0}, 0)
    (folder / "empty").mkdir()
    for name, content in (("no bytes", b""), ("text", b"this is no database"), ("torn", b"SQLite format 3\0")):
        (folder / name).mkdir()
        (folder / name / "trackhub.db").write_bytes(content)
    new_spool(folder / "spool only")
    (folder / "notes.txt").write_text("notes")
    (folder / "job" / "app").mkdir(parents=True)
    (folder / "job" / "meta.json").write_text("{no json")
    (folder / "workspace" / "local").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("line", "status", "expected"),
    [
        (["statsu", "JOBS"], 2, "There is no command 'statsu'. Did you mean 'status'? There are: backends, "),
        (["status"], 2, "Missing argument 'PATH...'"),
        (["status", "--jsno", "JOBS"], 2, "No such option"),
        (["status", "JOBS/goood"], 1, "there is no JOBS/goood; expected a job's folder"),
        (["status", "JOBS/empty"], 1, "there is no journal (trackhub.db) and no spool"),
        (["status", "JOBS/no bytes"], 1, "cannot read the journal"),
        (["status", "JOBS/text"], 1, "cannot read the journal"),
        (["status", "JOBS/torn/trackhub.db"], 1, "cannot read the journal"),
        (["status", "JOBS/notes.txt"], 1, "cannot read the journal"),
        (["report", "JOBS/goood"], 1, "there is no JOBS/goood"),
        (["report", "JOBS/spool only"], 1, "`trackhub replay` delivers them"),
        (["report", "JOBS/no bytes"], 1, "cannot read the journal"),
        (["report", "JOBS/good", "-o", "JOBS/empty"], 1, "cannot write JOBS/empty"),
        (["report", "JOBS/good", "-o", "JOBS/nowhere/r.html"], 1, "name a file in a folder that you can write to"),
        (["export", "JOBS/good"], 2, "Missing option '--to'"),
        (["export", "JOBS/good", "--to", "all.xlsx"], 1, "ends in .csv, .jsonl, .parquet"),
        (["export", "JOBS/good", "--to", "JOBS/nowhere/a.csv"], 1, "name a file in a folder that you can write to"),
        (["export", "JOBS/text", "--to", "a.csv"], 1, "cannot read the journal"),
        (["replay", "JOBS/goood"], 1, "there is no JOBS/goood"),
        (["replay", "JOBS/good", "--backend", "jsnol"], 1, "there is no backend 'jsnol' here; available: "),
        (["replay", "JOBS/good", "--option", "jsonl.path=x"], 1, "but no --backend; name it as well"),
        (["replay", "JOBS/good", "--backend", "jsonl", "--option", "path=x"], 1, "NAME.KEY=VALUE"),
        (["replay", "JOBS/good", "--backend", "jsonl", "--option", "jsonl.pth=x"], 1, "unknown option"),
        (["replay", "JOBS/good", "--timeout-s", "soon"], 2, "'soon' is not a valid float"),
        (["replay", "JOBS/good", "--timeout-s", "-1"], 2, "-1.0 is not in the range"),
        (["replay", "JOBS/good", "--workspace", "JOBS/nowhere"], 2, "does not exist"),
        (["prune", "JOBS/spool only"], 1, "only a spool, which deletes its own files"),
        (["prune", "JOBS/text"], 1, "`trackhub replay` repairs a damaged journal"),
        (["attach", "JOBS/nowhere", "--server", "jsonl"], 2, "does not exist"),
        (["attach", "JOBS/empty", "--server", "jsonl"], 1, "meta.json"),
        (["attach", "JOBS/job", "--server", "jsonl"], 1, "meta.json"),
        (["attach", "JOBS/job"], 1, "name a backend: --server NAME, --client NAME or both"),
        (["attach", "JOBS/job", "--server", "jsonl", "--limit", "deadline"], 1, "expected NAME=VALUE"),
        (["attach", "JOBS/job", "--server", "jsonl", "--limit", "dedline_s=5"], 1, "dedline_s"),
        (["backends", "jsnol"], 1, "there is no backend 'jsnol' here; available: "),
        (["backends", "jsnol", "--check"], 1, "there is no backend 'jsnol' here; available: "),
        (["backends", "--workspace", "JOBS/workspace"], 2, "--workspace goes with --check"),
        (["backends", "--check", "--workspace", "JOBS/empty"], 1, "is not the workspace of a FLARE site"),
        (["check", "jsnol"], 1, "there is no backend 'jsnol' here; available: "),
        (["check", "jsonl", "--option", "pth=x"], 1, "unknown option"),
        (["new-backend", "My Store"], 1, "cannot be a backend's name; expected at most 64 characters"),
        (["new-backend", "mine", "JOBS"], 1, "is not empty; give one that is, or that does not exist yet"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_command_says_what_was_expected(
    command: Command, jobs: Path, line: Sequence[str], status: int, expected: str
) -> None:
    said = command(*(word.replace("JOBS", str(jobs)) for word in line))

    assert said.status == status
    assert expected.replace("JOBS", str(jobs)) in said.err
    assert "Traceback" not in said.out + said.err


def test_a_limit_of_the_environment_that_is_no_number_is_named(
    command: Command, jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKHUB_FLUSH_S", "often")

    said = command("replay", jobs / "good")

    assert said.status == 1
    assert "TRACKHUB_FLUSH_S" in said.err


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        (["status", "JOBS/good"], {"version", "journals", "spools", "errors"}),
        (["backends"], {"version", "spi", "backends"}),
        (["backends", "jsonl", "--check"], {"version", "checked"}),
        (["export", "JOBS/good", "--to", "a.csv"], {"version", "files", "problems"}),
        (["replay", "JOBS/good"], {"version", "journals", "undelivered", "errors"}),
        (["prune", "JOBS/good"], {"version", "journals", "errors"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_a_script_would_read_is_one_json_document(
    command: Command, jobs: Path, line: Sequence[str], keys: set[str]
) -> None:
    said = command(*(word.replace("JOBS", str(jobs)) for word in line), "--json")

    assert said.status == 0, said.err
    assert set(json.loads(said.out)) == keys


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (80, "site confirmed rejected remarks site-1 123456 0 stopped"),
        (40, "site confirmed remarks site-1 123456 stopped"),
        (20, "site site-1 confirmed 123456 remarks stopped"),
    ],
)
def test_a_terminal_that_is_too_narrow_for_a_table_gets_fewer_columns_or_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, expected: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))

    print_table(["site", "confirmed", "rejected", "remarks"], [["site-1", "123456", "0", "stopped"]])

    shown = re.sub(r"\x1b\[[\d;]*m|─", "", capsys.readouterr().out)
    assert " ".join(shown.split()) == expected
    assert max(map(len, shown.splitlines())) <= width


def test_a_reader_that_takes_only_the_first_line_sees_no_traceback(jobs: Path) -> None:
    line = f"{sys.executable} -m trackhub.cli status --json {jobs / 'good'} | head -1"

    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)

    assert (done.stdout, done.stderr) == ("{\n", "")


def test_no_color_is_obeyed(jobs: Path) -> None:
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "trackhub.cli", "status", str(jobs / "good")],
        capture_output=True, text=True, timeout=60, env=environment,
    )  # fmt: skip

    assert "\x1b[3" not in done.stdout


@pytest.mark.parametrize("args", [["status"], ["replay"], ["prune"], ["report"], ["export", "--to", "all.csv"]])
def test_a_link_to_a_run_is_named_and_not_followed(command: Command, jobs: Path, args: Sequence[str]) -> None:
    Path("runs").mkdir()
    link = Path("runs", "a")
    link.symlink_to(jobs / "good")
    Path("runs", "loop").symlink_to(".")

    said = command(*args, "runs")

    assert said.status == 1
    assert f"{link} is a symbolic link to a run's folder, and is not followed; give {link} itself" in said.err
    assert command("status", link).status == 0
