# SPDX-License-Identifier: Apache-2.0
"""What is captured of script and machine: git's own answers, a command line without secrets, nothing that names one."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trackhub.context.describe_job_script import command_line, git_state, job_script, without_home
from trackhub.context.machine import describe_machine
from trackhub.errors import InvalidOptionError
from trackhub.secrets import refuse_literal_secrets, without_login, without_secrets

PLANTED = "pl4nted-value"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script in a repository of its own, with one commit."""
    (tmp_path / "jobs").mkdir()
    file = tmp_path / "jobs" / "job.py"
    file.write_text("print(1)\n")
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return file


@pytest.mark.parametrize(
    "text",
    [
        f"--lr 0.1 --api-key {PLANTED} --epochs 3",
        f"--lr 0.1 --password='{PLANTED} {PLANTED}' --epochs 3",
        f"wandb.api_key={PLANTED} --lr 0.1",
        f'{{"lr": 0.1, "auth_token": "{PLANTED}"}}',
        f"lr: 0.1, secret: {PLANTED}",
        f"--lr 0.1 https://me:{PLANTED}@example.com/x",
        f"--lr 0.1 https://example.com/x?sig={PLANTED}&y=1",
        f"--lr 0.1 -H 'Authorization: Bearer {PLANTED}'",
        f"--lr 0.1 -----BEGIN RSA PRIVATE KEY----- {PLANTED}",
        f"--lr 0.1 hf_{PLANTED.replace('-', '') * 3}",
        f"--lr 0.1 --token ${{secret:{PLANTED}}}",
    ],
)
def test_a_secret_within_a_text_is_hidden_and_the_rest_stays(text: str) -> None:
    shown = without_secrets(text)

    assert "lr" in shown
    assert "0.1" in shown
    assert "***" in shown
    assert PLANTED not in shown
    assert PLANTED.replace("-", "") not in shown


@pytest.mark.parametrize(
    "text",
    [
        "--max_tokens 5 --token_file /x/y",
        f"--revision {COMMIT}",
        "python job.py --lr=0.1 --name a:b",
        "10:30 https://h/x",
    ],
)
def test_a_text_without_secrets_stays_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("password", ["p@ss", "p@s:s@", "p/w", "p?w", "p#w", "p[w", "p:w", "12/w"])
@pytest.mark.parametrize("form", ["{}", "--db={} --lr 0.1", '"uri":"{}"'])
def test_a_password_in_a_url_is_hidden_whole_whatever_it_holds(form: str, password: str) -> None:
    url = f"postgresql://u:{password}@host/db" if password != "12/w" else "//u:p@host/db"

    assert without_secrets(form.format(url)) == form.format(f"{url.partition('//')[0]}//***@host/db")
    assert without_login(url) == f"{url.partition('//')[0]}//host/db"


@pytest.mark.parametrize("password", ["p@ss", "p:w", "p@s:s"])
def test_a_password_before_a_host_without_a_scheme_is_hidden_whole(password: str) -> None:
    assert without_secrets(f"--db u:{password}@host:5432/db") == "--db u:***@host:5432/db"


def test_of_two_keys_beside_each_other_both_are_hidden() -> None:
    assert without_secrets(f"{COMMIT}.{COMMIT}") == "***.***"


@pytest.mark.parametrize(
    "part",
    [
        "a", "_", "a-", "=", ":", "@", "'", '"', "%", "/", "a=", "a:", "a:b@", "a:b,", "://", "://a:b", "?a=", "-a ",
        "a=Token ", "a='b=\"", "eyJabcdefgh-", "eyJabcdefgh.", f"{COMMIT}.", f"{COMMIT} ", "local-", "${secret:", "[1]",
        "-----BEGIN PRIVATE KEY ", "hooks.slack.com/services/a/",
    ],
)  # fmt: skip
def test_a_long_argument_takes_time_in_proportion_to_its_length(part: str) -> None:
    def seconds(chars: int) -> float:
        text = f"{part * (chars // len(part))}!"
        begin = time.process_time()
        without_secrets(text)
        for path, value in (("x.note", text), (text, "v")):
            with contextlib.suppress(InvalidOptionError):
                refuse_literal_secrets(path, value)
        return time.process_time() - begin

    assert (
        seconds(40_000) < 20 * min(seconds(4_000) for _ in range(3)) + 0.5
    )  # quadratic time would be 100 times as long


def test_an_old_wandb_key_without_a_name_is_hidden() -> None:
    assert without_secrets(f"--k {COMMIT}") == "--k ***"


def test_a_command_line_has_no_secret_and_the_home_folder_is_a_tilde(script: Path) -> None:
    home = str(script.parent)
    argv = [sys.executable, str(script), "--token", PLANTED, "--pw=x", "--data", f"{home}/data", "-k", "from-the-shell",
            "--password", "two words", "--option", f"wandb.api_key={PLANTED}", "--lr", "0.1"]  # fmt: skip

    shown = command_line(argv, script, {"HOME": home, "MY_API_KEY": "from-the-shell"})

    assert shown == (
        "python job.py --token '***' '--pw=***' --data '~/data' -k '***' --password '***' "
        "--option 'wandb.api_key=***' --lr 0.1"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--wandb_key", PLANTED], [f"--licenseKey={PLANTED}"], ["--github-pat", PLANTED], [f"--DB_PASS={PLANTED}"],
        ["--auth", f"me:{PLANTED}"], ["--tokens", "a", PLANTED], [f"--header=Authorization: Basic {PLANTED}"],
        ["--env", f"A=1,TOKEN={PLANTED}"], [f"--env=TOKEN={PLANTED}"], ["--url", f"https://h/x?key={PLANTED}"],
        ["--uri", f"me:{PLANTED}@h:5432/db"],
    ],
)  # fmt: skip
def test_a_command_line_hides_all_that_may_be_a_secret(script: Path, words: list[str]) -> None:
    shown = command_line([sys.executable, str(script), *words, "--lr", "0.1"], script, {})

    assert PLANTED not in shown
    assert shown.endswith(" --lr 0.1")


def test_a_command_line_shows_names_and_numbers_that_only_sound_like_secrets(script: Path) -> None:
    words = ["--max_tokens", "5", "--num-keys=3", "--key_metric", "loss", "--token_file", "/x", "--author", "a:b"]

    assert command_line([sys.executable, str(script), *words], script, {}) == f"python job.py {' '.join(words)}"


@pytest.mark.parametrize(
    ("remote", "shown"),
    [
        ("https://ann:secret@github.com/o/r.git", "https://github.com/o/r.git"),
        ("ssh://ann@github.com/o/r", "ssh://github.com/o/r"),
        ("https://ann:se@cret@github.com/o/r.git", "https://github.com/o/r.git"),
        ("ann@github.com:o/r.git", "github.com:o/r.git"),
        ("/home/ann/central.git", None),
        ("../central", None),
        ("file:///home/ann/central", None),
    ],
)
def test_a_git_remote_is_shown_without_its_user_and_a_folder_is_not(
    script: Path, remote: str, shown: str | None
) -> None:
    git(script.parent, "remote", "add", "origin", remote)

    assert git_state(script).get("git/repository") == shown


def test_the_home_folder_becomes_a_tilde_and_folders_that_begin_alike_stay() -> None:
    text = "--data /home/ann/x --log '/home/ann' /home/anna /home/ann"

    assert without_home(text, "/home/ann/") == "--data ~/x --log '~' /home/anna ~"
    assert without_home(text, "/") == text


def test_the_git_state_is_what_git_says(script: Path) -> None:
    root = script.parent.parent
    git(root, "remote", "add", "origin", f"https://me:{PLANTED}@example.com/repo.git")

    clean = git_state(script)
    script.write_text("print(2)\n")

    assert clean == {
        "git/commit": git(root, "rev-parse", "HEAD"),
        "git/branch": "main",
        "git/repository": "https://example.com/repo.git",
        "git/dirty": False,
    }
    assert git_state(script)["git/dirty"] is True


def test_a_script_that_git_does_not_know_counts_as_changed(script: Path) -> None:
    new = script.with_name("new.py")
    new.write_text("")

    assert git_state(script)["git/dirty"] is False
    assert git_state(new)["git/dirty"] is True


def test_variables_of_a_git_hook_do_not_lead_to_another_repository(
    script: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "--quiet")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))

    assert "git/commit" in git_state(script)


@pytest.mark.parametrize("content", [None, "ref: refs/heads/none", "gitdir: /nowhere", "\0\xff"])
def test_what_is_no_whole_repository_says_nothing(content: str | None, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text("")
    if content is not None:
        (tmp_path / ".git").write_text(content)

    assert git_state(script) == {}


def test_without_git_or_in_no_time_there_is_no_git_state(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(script, timeout_s=0.0) == {}
    monkeypatch.setenv("PATH", "")
    assert git_state(script) == {}


def test_a_script_is_described_where_it_runs_and_an_installed_program_is_not(script: Path) -> None:
    code = "from trackhub.context.describe_job_script import job_script; print(job_script())"
    script.write_text(code)

    done = subprocess.run(
        [sys.executable, str(script), "--token", PLANTED], capture_output=True, text=True, check=True, cwd=script.parent
    )
    in_text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "'command': \"python job.py --token '***'\"" in done.stdout
    assert "'git/dirty': True" in done.stdout
    assert in_text.stdout == "{}\n"
    assert job_script() == {}  # this process runs pytest


def test_the_machine_is_described_and_not_named() -> None:
    found = describe_machine()

    assert found["versions/python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"versions/flare-trackhub", "host/os", "host/cpus", "host/machine", "host/container"} <= set(found)
    assert found["host/cpus"] == len(os.sched_getaffinity(0))
    everything = " ".join(map(str, found.values()))
    assert socket.gethostname() not in everything
    assert os.uname().release not in everything
