# SPDX-License-Identifier: Apache-2.0
"""Checks, before a job starts, whether a backend can be used here.

It does what a receiver does before training: it builds the options, makes the backend, and calls its ``preflight``.
``trackhub backends --check``, `trackhub.flare.preflight_before_simulator` and scripts that start jobs call it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import threading
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from trackhub import registry
from trackhub.conceal import conceal
from trackhub.environment_trouble import is_environment_trouble
from trackhub.errors import ConfigError, PluginError
from trackhub.job_and_run_info import JobInfo, Side
from trackhub.spi import BackendContext, TransientError

__all__ = ["Readiness", "Ready", "check_ready"]

_TIMEOUT_S = 30.0


class Readiness(StrEnum):
    """Whether a job could use a backend now."""

    YES = "yes"
    NO = "no"
    """A job that names the backend would be stopped before training."""
    NOT_NOW = "not now"
    """The store does not answer, or a disk is full. A job would start, and its records would wait."""


class Ready(NamedTuple):
    """Whether a backend is ready, and a remark: the reason why not, and the backend's warnings."""

    word: Readiness
    remark: str


def check_ready(name: str, options: Mapping[str, Any], timeout_s: float = _TIMEOUT_S) -> Ready:
    """Set a backend up as a job does, and return whether it is ready. Blocks up to ``timeout_s``. Never raises.

    The backend gets a temporary folder in place of the job's. The remark holds the warnings of the backend.

    Args:
        name: the backend's name.
        options: the backend's options, as a job gives them.
        timeout_s: the longest wait, in seconds.
    """
    try:
        temporary = tempfile.TemporaryDirectory(prefix="trackhub-check-", ignore_cleanup_errors=True)
    except OSError as error:
        return Ready(
            Readiness.NOT_NOW,
            f"it cannot be checked, since no temporary folder can be made: {error}. Free space there, or set TMPDIR",
        )
    answers: list[Ready] = []
    with temporary as folder:
        # The check runs in another thread, since an SDK may never return.
        thread = threading.Thread(target=lambda: answers.append(_ask(name, options, Path(folder))), daemon=True)
        with contextlib.redirect_stdout(sys.stderr), _Warnings() as warnings:
            thread.start()
            thread.join(timeout_s)
    if not answers:
        return Ready(Readiness.NOT_NOW, f"it did not answer within {timeout_s:g} s")
    word, remark = answers[0]
    remark = "; ".join(filter(None, [remark, *warnings.messages]))
    return Ready(word, conceal(remark.replace(folder, "the job's folder")))


def _ask(name: str, options: Mapping[str, Any], folder: Path) -> Ready:
    try:
        cls = registry.load(name)
        context = BackendContext(folder / name, JobInfo("trackhub-check"), Side.LOCAL)
        context.workdir.mkdir()
        backend = cls(registry.build_options(name, cls, options), context)
    except Exception as error:  # noqa: BLE001 - a plugin may raise anything, and the others are still to be checked
        return _not_ready(error, stops=True)
    try:
        backend.preflight()
    except Exception as error:  # noqa: BLE001
        return _not_ready(error, stops=isinstance(error, ConfigError | ImportError))  # the same rule as in a lane
    finally:
        with contextlib.suppress(Exception):  # a lane only logs it
            backend.close()
    return Ready(Readiness.YES, "")


def _not_ready(error: Exception, *, stops: bool) -> Ready:
    """Return what an error of a backend means. ``stops`` says whether such an error stops a job before training."""
    word = Readiness.NO if stops and not is_environment_trouble(error) else Readiness.NOT_NOW
    named = isinstance(error, ConfigError | PluginError | TransientError)
    return Ready(word, str(error) if named else f"{type(error).__name__}: {error}")


class _Warnings(logging.Handler):
    """Collects the warnings that are logged in its block. Python prints a warning by itself only without a handler."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger().removeHandler(self)
