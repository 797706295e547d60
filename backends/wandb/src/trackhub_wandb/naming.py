# SPDX-License-Identifier: Apache-2.0
"""How trackhub's keys, tags and values are spelt in W&B, so that two different things never become one."""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

__all__ = [
    "CONFIG_ENTRY",
    "MAX_ARTIFACT_NAME_CHARS",
    "MAX_TAG_CHARS",
    "Names",
    "artifact_name",
    "config_value",
    "file_stem",
    "tag_text",
]

CONFIG_ENTRY = "trackhub"
"""The entry of a run's config in which trackhub keeps what it must find again: job, site, tags, position."""

MAX_TAG_CHARS = 64
"""Longest tag. Source: ``wandb.Settings.run_tags`` refuses longer ones (wandb 0.31)."""

MAX_ARTIFACT_NAME_CHARS = 128
"""Longest artifact name. Source: ``wandb.sdk.artifacts._validators.NAME_MAXLEN`` (wandb 0.31)."""

_PREFIX = "user/"
_STEM_CHARS = 60
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")


class Names:
    """Keeps the keys that are logged apart from those that W&B and this backend use themselves.

    W&B owns every key that starts with ``_``; this backend adds the step, the round and one entry of the config. A
    logged key of that spelling is stored below ``user/``, and so is one that already looks like the result.
    """

    def __init__(self, step_metric: str, round_metric: str) -> None:
        self._reserved_row = {step_metric, round_metric}
        self._reserved_config = {CONFIG_ENTRY}

    def row(self, key: str) -> str:
        """Return the history key of a logged key."""
        return _spell(key, self._reserved_row)

    def config(self, key: str) -> str:
        """Return the config key of a logged param."""
        return _spell(key, self._reserved_config)


def _spell(key: str, reserved: set[str]) -> str:
    bare = key
    while bare.startswith(_PREFIX):
        bare = bare[len(_PREFIX) :]
    return _PREFIX + key if bare.startswith("_") or bare in reserved else key


def file_stem(key: str) -> str:
    """Return a file name's stem for a key: one path component, without ``..`` and short, unequal for unequal keys."""
    stem = _UNSAFE.sub("_", key)[:_STEM_CHARS].lstrip(".")
    return stem if stem == key else f"{stem}-{_digest(key)}"


def artifact_name(key: str, site: str) -> str:
    """Return the name of a site's artifact. Artifact names are shared by a whole W&B project, so it holds the site."""
    name = f"{key}--{site}"
    safe = _UNSAFE.sub("_", name)
    if safe == name and len(name) <= MAX_ARTIFACT_NAME_CHARS and name.replace("---", "----").count("--") == 1:
        return name
    digest = _digest(f"{site}\0{key}")
    return f"{safe[: MAX_ARTIFACT_NAME_CHARS - len(digest) - 1]}-{digest}"


def tag_text(key: str, value: str) -> str:
    """Return the W&B tag ``key:value``, or ``key`` without a value; a longer one ends in a digest of the whole."""
    text = f"{key}:{value}" if value else key
    if len(text) <= MAX_TAG_CHARS:
        return text
    digest = _digest(text)
    return f"{text[: MAX_TAG_CHARS - len(digest) - 1]}~{digest}"


def config_value(value: Any) -> Any:
    """Return a param's value as a run's config can hold it.

    A config is plain JSON, so NaN and infinities are spelt out; and it is stored as a tree of its leaves, in which an
    empty dict would vanish, so that becomes ``"{}"``.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): config_value(item) for key, item in value.items()} or "{}"
    if isinstance(value, list | tuple):
        return [config_value(item) for item in value]
    return value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
