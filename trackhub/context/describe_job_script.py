# SPDX-License-Identifier: Apache-2.0
"""Describes the script of this process: its command line without secrets, and the git commit that it is from.

`trackhub.flare.log_job_context` calls it where a job is written. It runs git for up to three seconds, so nothing that
trains calls it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trackhub.secrets import is_secret_name, may_name_secret, without_login, without_secrets

__all__ = ["command_line", "git_state", "job_script", "without_home"]

_GIT_S = 3.0
"""The longest time that git gets for all its answers, in seconds. A repository may be large, or on a slow disk."""

_MAX_COMMAND_CHARS = 4000
_MIN_SECRET_CHARS = 8  # a shorter value could occur in an argument by chance
_SHOWN = "***"
_FLAG = re.compile(r"--?[A-Za-z][\w.-]*\Z")
_INSTALLED = {"site-packages", "dist-packages"}


def job_script() -> dict[str, str | bool]:
    """Return ``command`` and ``git/...`` of the script that this process runs.

    Empty if the process runs no script of the user's: an installed program, such as pytest, or a notebook.
    """
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if not file or not (script := Path(os.path.abspath(file))).is_file() or _is_installed(script):
        return {}
    script = script.resolve()
    git = git_state(script)
    return {"command": command_line(sys.orig_argv, script, os.environ), **git}


def _is_installed(script: Path) -> bool:
    places = {script, script.resolve()}
    prefixes = {Path(sys.prefix), Path(sys.prefix).resolve()}
    return any(_INSTALLED & set(place.parts) or any(map(place.is_relative_to, prefixes)) for place in places)


def command_line(argv: Sequence[str], script: Path, environ: Mapping[str, str]) -> str:
    """Return a command line as a shell would read it, without secrets. The home folder is ``~``.

    Args:
        argv: the interpreter and what follows.
        script: the script. Only its name is shown.
        environ: the environment. Where an argument holds the value of a secret variable, the value is hidden.
    """
    secrets = [v for k, v in environ.items() if is_secret_name(k) and len(v) >= _MIN_SECRET_CHARS]
    home = environ.get("HOME", "")
    words, hides = ["python"], False  # a flag may have several values
    for word in argv[1:]:
        shown = script.name if _is_script(word, script) else word
        for secret in sorted(secrets, key=len, reverse=True):
            shown = shown.replace(secret, _SHOWN)
        flag, equals, value = shown.partition("=")
        if _FLAG.match(flag):
            hides = may_name_secret(flag)
            if equals:  # the whole value, which may have spaces
                shown = f"{flag}={_SHOWN if hides else without_secrets(value)}"
                hides = False
        else:
            shown = _SHOWN if hides else without_secrets(shown)
        words.append(without_home(shown, home))
        if sum(map(len, words)) > _MAX_COMMAND_CHARS:  # the rest is cut off
            break
    return shlex.join(words)[:_MAX_COMMAND_CHARS]


def without_home(text: str, home: str) -> str:
    """Return the text with ``~`` in place of the user's home folder, whose path mostly has the user's name."""
    return re.sub(rf"{re.escape(home.rstrip('/'))}(?=[/\s\"']|\Z)", "~", text) if len(home) > 1 else text


def _is_script(word: str, script: Path) -> bool:
    return word.endswith(script.name) and Path(os.path.abspath(word)).resolve() == script


def git_state(script: Path, timeout_s: float = _GIT_S) -> dict[str, str | bool]:
    """Return ``git/commit``, ``git/dirty``, ``git/branch`` and ``git/repository`` of a script, where git knows them.

    ``git/dirty`` says whether a file that git tracks differs from the commit, or git does not track the script.
    Empty if the script is in no repository, or there is no git. Blocks up to ``timeout_s``.
    """
    folder = script.parent
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)):
        return {}
    end = time.monotonic() + timeout_s
    found: dict[str, str | bool] = {}
    if (commit := _git(folder, end, "rev-parse", "--verify", "HEAD")) is None:
        return {}
    found["git/commit"] = commit
    if branch := _git(folder, end, "symbolic-ref", "--short", "--quiet", "HEAD"):
        found["git/branch"] = branch
    if remote := _address(_git(folder, end, "config", "--get", "remote.origin.url") or ""):
        found["git/repository"] = remote
    changes = _git(folder, end, "status", "--porcelain", "--untracked-files=no")
    if changes is not None:
        is_known = _git(folder, end, "ls-files", "--error-unmatch", "--", script.name) is not None
        found["git/dirty"] = bool(changes) or not is_known
    return found


def _address(remote: str) -> str:
    """Return the address of a git remote on another machine, without its user. Empty for a folder of this machine."""
    if "://" in remote:
        return "" if remote.startswith("file:") else without_secrets(without_login(remote))
    host, colon, path = remote.partition(":")
    return f"{host.rpartition('@')[2]}:{without_secrets(path)}" if colon and "/" not in host else ""


def _git(folder: Path, end: float, *command: str) -> str | None:
    """Return what a git command prints; None if it fails, or ``end`` of the monotonic clock passes."""
    # Variables such as GIT_DIR, which git sets for a hook, would name another repository. GIT_OPTIONAL_LOCKS=0 takes no
    # lock, since this only reads. Without core.fsmonitor=false, git could start a program that the repository names.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environ |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", *command],
            cwd=folder, env=environ, stdin=subprocess.DEVNULL, capture_output=True, check=False,
            timeout=max(0.0, end - time.monotonic()),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None
