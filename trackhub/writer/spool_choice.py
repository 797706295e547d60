# SPDX-License-Identifier: Apache-2.0
"""Decides whether a writer records, and into which spool.

`Writer` calls ``open_spool`` once. A writer without a spool records nothing and does not fail. So a training script
runs unchanged with tracking, without it, and outside a job.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from trackhub.errors import ConfigError, SpoolError
from trackhub.spool.announce_spool import find_spool
from trackhub.spool.writing import SpoolWriter

__all__ = ["MODE_ENV", "STRICT_ENV", "is_disabled", "is_strict", "open_spool"]

MODE_ENV = "TRACKHUB_MODE"
"""Environment variable that turns tracking off for ``Writer()`` and ``trackhub.local``: ``disabled`` records nothing,
without a warning. ``enabled`` is the same as unset."""

STRICT_ENV = "TRACKHUB_STRICT"
"""Environment variable that makes every writer strict if it is ``1``. With ``0`` or unset, the writer's own argument
decides."""

_MODES = ("enabled", "disabled")
_HOW = (
    "To track a FLARE job, apply trackhub.flare.recipe.add_tracking to it. To track a script alone, log through "
    "`with trackhub.local(backends=[...]) as writer:`"
)
_log = logging.getLogger(__name__)
_has_warned = False


def open_spool(spool_dir: str | os.PathLike[str] | None, *, strict: bool) -> SpoolWriter | None:
    """Open the spool of a new writer. Return None if the writer must record nothing.

    Args:
        spool_dir: the spool's folder. None takes the one that was announced to this process, unless ``TRACKHUB_MODE``
            is ``disabled``.
        strict: raise where the process has no usable spool. Otherwise, warn once per process.

    Raises:
        ConfigError: ``TRACKHUB_MODE`` has an unknown value, or ``strict`` is set and there is no usable spool.
        SpoolError: ``spool_dir`` was given and is not a spool.
    """
    if spool_dir is not None:
        return SpoolWriter(Path(spool_dir))
    if is_disabled():
        return None
    try:
        return SpoolWriter(find_spool())
    except (ConfigError, SpoolError) as e:
        if strict:
            raise ConfigError(f"a strict Writer() found no spool to record into: {e}. {_HOW}") from e
        _warn_once(e)
        return None


def is_disabled() -> bool:
    """Return whether the environment variable ``TRACKHUB_MODE`` turns tracking off.

    Raises:
        ConfigError: it has an unknown value.
    """
    mode = os.environ.get(MODE_ENV) or "enabled"
    if mode not in _MODES:
        raise ConfigError(f"the environment variable {MODE_ENV} is {mode!r}; expected {' or '.join(_MODES)}, or unset")
    return mode == "disabled"


def is_strict() -> bool:
    """Return whether the environment variable ``TRACKHUB_STRICT`` makes every writer raise for what it cannot store.

    Raises:
        ConfigError: it has an unknown value.
    """
    value = os.environ.get(STRICT_ENV) or "0"
    if value not in ("0", "1"):
        raise ConfigError(f"the environment variable {STRICT_ENV} is {value!r}; expected 1 or 0, or unset")
    return value == "1"


def _warn_once(reason: Exception) -> None:
    global _has_warned  # once per process, however many writers it makes
    if not _has_warned:
        _has_warned = True
        _log.warning(
            "trackhub.Writer() records nothing in this process: %s. %s. To silence this warning, set %s=disabled",
            reason, _HOW, MODE_ENV,
        )  # fmt: skip
