# SPDX-License-Identifier: Apache-2.0
"""The commands in the documents: each is one that its program accepts, and the cheap ones run.

A block that needs more than a clone and a finished job is marked `<!-- skip: next -->`, as Python code is.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import job as cifar10_job
import pytest
import standalone
from click.testing import CliRunner

import trackhub
from tests.unit.test_docs import DOCUMENTS, GENERATED, ROOT
from trackhub.cli.app import _trackhub

pytest.importorskip("plotly", reason="plotly is not installed; it is in the extra report")

PLACES = ("runs", "PATH", "FOLDER")
"""What the documents call the folder of a job."""
CHEAP = ("status", "report", "export", "watch", "replay", "prune", "new-backend")
"""The commands of ``trackhub`` that need a finished job at most."""
PROGRAM = re.compile(r" *(?:\w+=\S+ )*(?:trackhub|python|pip|make|nvflare|tensorboard|mlflow|wandb|cd|grep|\.) ")
VARIABLE = re.compile(r"\w+=.*")
SKIP = "<!-- skip: next -->"


class Block(NamedTuple):
    """A block of a document that is no Python, with what stands in the line above it."""

    path: Path
    line: int
    above: str
    language: str
    lines: list[str]

    @property
    def name(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    """Yield each block of each document."""
    for path in DOCUMENTS:
        lines, begin = path.read_text(encoding="utf-8").splitlines(), None
        for number, line in enumerate(lines):
            if not (fence := re.fullmatch(r" *```(\w*)", line)):
                continue
            if begin is None:
                begin, language = number, fence[1]
            else:
                yield Block(path, begin + 1, lines[begin - 1].strip(), language, lines[begin + 1 : number])
                begin = None


SHELL = [block for block in blocks() if block.language == "sh" and block.above != SKIP]


def commands(line: str) -> list[list[str]]:
    """Return the words of each command in a line of shell, without comments and variables."""
    found: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            found.append([])
        elif found[-1] or not VARIABLE.fullmatch(word):
            found[-1].append(word)
    return [words for words in found if words]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of one finished job."""
    folder = tmp_path_factory.mktemp("finished")
    with trackhub.local(["jsonl"], folder=folder / "runs", quiet=True) as writer:
        writer.log({"train/loss": 0.5, "val/accuracy": 0.5}, step=0)
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, with the finished job under each of its names."""
    for place in PLACES:
        shutil.copytree(finished / "runs", tmp_path / place)
    (tmp_path / "jobs" / "my-job").mkdir(parents=True)  # an exported job must exist, and is not changed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["job.py"])  # FLARE's import reads it
    return tmp_path


def parse(words: list[str]) -> None:
    """Let the parser of ``trackhub`` read the words after it, and run nothing."""
    group = _trackhub
    assert isinstance(group, click.Group)
    with group.make_context("trackhub", list(words)) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        command.make_context(name, rest, parent=context)


def check_trackhub(words: list[str]) -> None:
    if words[0] not in CHEAP:
        parse(words)
        return
    done = CliRunner().invoke(_trackhub, words)
    assert done.exit_code == 0, done.output


def check_python(words: list[str], block: Block) -> None:
    """Check the flags with the script's own parser. A script that is not in a clone is written in the document."""
    script, *flags = words
    if script == "jobs/cifar10_fedavg/job.py":
        cifar10_job.tracking_config(cifar10_job.parse_args(flags))
    elif script == "jobs/cifar10_fedavg/standalone.py":
        assert standalone.main(flags) == 0
    else:
        page = block.path.read_text(encoding="utf-8")
        assert f"<!-- file: {script} -->" in page or f"```python\n# {script}\n" in page, f"there is no {script}"


def check_make(words: list[str]) -> None:
    done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def check_pip(words: list[str], folder: Path) -> None:
    """Check that each editable project is there, and has the extras that are named."""
    assert words[0] == "install"
    projects = [after for word, after in itertools.pairwise(words) if word == "-e"]
    assert len(words) == 1 + 2 * len(projects)
    for project in projects:
        found = re.fullmatch(r"([\w./-]+)(?:\[([\w,]+)\])?", project)
        assert found is not None, project
        place = next(base / found[1] for base in (folder, ROOT) if (base / found[1] / "pyproject.toml").exists())
        declared: dict[str, Any] = tomllib.loads((place / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        missing = {*(found[2] or "").split(",")} - {""} - declared.get("optional-dependencies", {}).keys()
        assert not missing, f"{project} has no extra {missing}"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_each_command_in_a_document_is_accepted_and_the_cheap_ones_run(
    block: Block, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "train", lambda args: None)
    for line in block.lines:
        for program, *words in commands(line):
            match program:
                case "trackhub":
                    check_trackhub(words)
                case "python":
                    check_python(words, block)
                case "make":
                    check_make(words)
                case "pip":
                    check_pip(words, here)
                case ".":
                    assert words == [".venv/bin/activate"]
                case _:
                    pytest.fail(f"{program!r} cannot be checked here: mark the block {SKIP}")


def test_each_example_in_the_help_of_a_command_is_accepted(here: Path) -> None:
    examples = re.findall(r"^    trackhub (.+)$", GENERATED["command_reference"](), re.MULTILINE)
    assert len(examples) > 10

    for example in examples:
        words = shlex.split(example, comments=True)
        parse(["runs" if word.startswith("/") else word for word in words])  # some folders must exist


def test_each_block_of_commands_is_marked_as_shell() -> None:
    unmarked = [block.name for block in blocks() if block.language in ("", "text") and PROGRAM.match(block.lines[0])]

    assert unmarked == []
    assert len(SHELL) > 15
