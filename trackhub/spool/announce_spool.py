# SPDX-License-Identifier: Apache-2.0
"""Announces a spool to the writers of a site, and finds the announced spool.

The transport that runs the sender announces it. ``spool_env`` makes the value of an environment variable that trainers
inherit. ``set_process_spool`` tells only this process. ``announce_to_children`` also tells the programs that this
process starts. `trackhub.writer.spool_choice` finds the spool for a new writer.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from trackhub.errors import ConfigError, SpoolError
from trackhub.plain_values_to_structs import prepare
from trackhub.spool.layout import SpoolInfo, expect_spool, expected_spool, read_spool_info, spool_info

__all__ = [
    "SPOOL_ENV",
    "announce_to_children",
    "find_spool",
    "set_process_spool",
    "spool_env",
    "withdraw_process_spool",
]

SPOOL_ENV = "TRACKHUB_SPOOL"
"""Environment variable by which a trainer finds its spool. ``spool_env`` makes its value."""

_process_spool: Path | None = None
_in_environment: dict[Path, str] = {}  # what ``announce_to_children`` set, oldest first
_inherited: str | None = None  # what the environment variable was before


class _Claim(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the environment variable says.

    Attributes:
        dir: the spool's folder.
        site: the site that the spool belongs to.
        job: the job that the spool belongs to.
        info: what the spool is, in case its folder cannot be read just now. None if the announcer did not know it.
        reason: why the spool could not be created yet; empty if it is there.
    """

    dir: str
    site: str
    job: str
    info: SpoolInfo | None = None
    reason: str = ""


prepare(_Claim)


def spool_env(folder: Path, site: str, job: str) -> str:
    """Return the value of ``SPOOL_ENV`` that leads a trainer of this site and job to the spool.

    If `create_spool` could not create the spool yet, the value says so. The trainer then counts what it drops.

    Args:
        folder: the spool's folder.
        site: the site that the spool belongs to.
        job: the job that the spool belongs to.
    """
    expected = expected_spool(folder)
    with contextlib.suppress(SpoolError):  # there is no spool yet; a trainer that looks for it reports that
        info = spool_info(folder)
        return msgspec.json.encode(_Claim(str(folder), site, job, info, expected[1] if expected else "")).decode()
    return msgspec.json.encode(_Claim(str(folder), site, job)).decode()


def set_process_spool(folder: Path | None) -> None:
    """Announce the spool to writers in this process only, not in programs that it starts. None withdraws the spool.

    The FLARE server announces its spool this way. The simulator's clients inherit the server's environment. With an
    environment variable, they would therefore write as the server.
    """
    global _process_spool  # one per process, since a process logs for one site
    _process_spool = folder


def announce_to_children(folder: Path, site: str, job: str) -> None:
    """Announce the spool to writers in this process and in the programs that it starts from now on.

    ``trackhub.local`` does so: a script's worker processes log into the run of the script.

    Args:
        folder: the spool's folder.
        site: the site that the spool belongs to.
        job: the job that the spool belongs to.
    """
    global _inherited
    set_process_spool(folder)
    if not _in_environment:
        _inherited = os.environ.get(SPOOL_ENV)
    os.environ[SPOOL_ENV] = _in_environment[folder] = spool_env(folder, site, job)


def withdraw_process_spool(folder: Path) -> None:
    """Withdraw the announcement of this spool. A spool that was announced later stays announced."""
    if _process_spool == folder:
        set_process_spool(None)
    if (value := _in_environment.pop(folder, None)) is None or os.environ.get(SPOOL_ENV) != value:
        return
    before = next(reversed(_in_environment.values()), _inherited)
    if before is None:
        del os.environ[SPOOL_ENV]
    else:
        os.environ[SPOOL_ENV] = before


def find_spool(announced: str | None = None) -> Path:
    """Return the folder of the spool that was announced to this process.

    Args:
        announced: the value of ``SPOOL_ENV``, if it was read before. None reads it now.

    Raises:
        ConfigError: no spool was announced, or it belongs to another site or job, or its job has ended.
    """
    if _process_spool is not None:
        return _process_spool
    value = os.environ.get(SPOOL_ENV) if announced is None else announced
    if not value:
        raise ConfigError(f"this process has no tracking (the environment variable {SPOOL_ENV} is not set)")
    try:
        claim = msgspec.json.decode(value, type=_Claim)
    except (ValueError, msgspec.DecodeError) as e:
        raise ConfigError(f"{SPOOL_ENV} is {value!r}, which trackhub has not set; unset it") from e
    folder = Path(claim.dir)
    try:
        info = read_spool_info(folder)
    except SpoolError as e:
        is_missing = isinstance(e.__cause__, FileNotFoundError) or not isinstance(e.__cause__, OSError)
        if claim.info is None or (is_missing and not claim.reason):
            raise ConfigError(f"{SPOOL_ENV} names a spool that is not there: {e}") from e
        # The disk is full, or this process has no free descriptor. Meanwhile, the records of this process are dropped
        # and counted.
        info = claim.info
        expect_spool(folder, info, claim.reason or "io_error")
    if (info.site, info.job) != (claim.site, claim.job) or not info.open:
        raise ConfigError(
            f"{SPOOL_ENV} names the spool of site {claim.site!r}, job {claim.job!r}, but {folder} belongs to site "
            f"{info.site!r}, job {info.job!r}{'' if info.open else ', which has ended'}"
        )
    return folder
