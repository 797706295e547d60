# SPDX-License-Identifier: Apache-2.0
"""How trackhub's keys, tags, names and param values are spelt in W&B, so that two of them never become one.

`backend` declares the key rules, which the core applies before it hands over an entry. `sdk_run` calls the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

from trackhub.spi import KeyRule

__all__ = [
    "CONFIG_ENTRY",
    "MAX_ARTIFACT_NAME_CHARS",
    "MAX_NAME_CHARS",
    "MAX_TAG_CHARS",
    "PARAM_RULE",
    "RESERVED_AS",
    "TAG_RULE",
    "artifact_name",
    "config_value",
    "file_stem",
    "row_rule",
    "run_name",
    "tag_text",
]

CONFIG_ENTRY = "trackhub"
"""The entry of a run's config that holds what trackhub must find again: job, site, tags, position."""

RESERVED_AS = "user/"
"""The prefix of a logged key that W&B or this backend uses itself."""

MAX_TAG_CHARS = 64
"""Longest tag. Source: ``wandb.Settings.run_tags`` refuses longer ones (wandb 0.31)."""

MAX_NAME_CHARS = 128
"""Longest name of a run or a group. Source: wandb.ai refuses longer display names (NVIDIA-NeMo/Skills issue 842)."""

MAX_ARTIFACT_NAME_CHARS = 128
"""Longest artifact name. Source: ``wandb.sdk.artifacts._validators.NAME_MAXLEN`` (wandb 0.31)."""

_MAX_KEY_CHARS = 299
"""Source: W&B's documentation, "Experiments limits and performance", asks for metric names below 300 characters."""

PARAM_RULE = KeyRule(
    max_chars=_MAX_KEY_CHARS,
    chars="",
    # Source: ``wandb.sdk.wandb_config.Config._sanitize`` strips hyphens at both ends of every config key (wandb 0.31).
    edge_chars=r"^\-",
    reserved_keys=frozenset({CONFIG_ENTRY}),
    # The SDK keeps ``_wandb`` in the config, and its ``run.config`` hides every key that begins with an underscore.
    reserved_prefixes=("_",),
    reserved_as=RESERVED_AS,
)
"""The rule of params, which are keys of the run's config."""

TAG_RULE = KeyRule(max_chars=_MAX_KEY_CHARS, chars="")
"""The rule of tags, which are keys of a dict in this backend's own config entry. The SDK leaves such keys as they
are."""

_STEM_CHARS = 60
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_REFERENCE = "wandb-artifact://"


def row_rule(step_metric: str, round_metric: str) -> KeyRule:
    """Return the rule of metrics, texts, images, histograms and tables, which are keys of a row in the run's history.

    W&B owns every key that begins with an underscore. This backend adds the columns of step and round.
    """
    return KeyRule(
        max_chars=_MAX_KEY_CHARS,
        chars="",
        reserved_keys=frozenset({step_metric, round_metric}),
        reserved_prefixes=("_",),
        reserved_as=RESERVED_AS,
    )


def file_stem(key: str) -> str:
    """Return the stem of a file name for a key.

    It is short, one path component without ``..``, and unique for each key.
    """
    stem = _UNSAFE.sub("_", key)[:_STEM_CHARS].lstrip(".")
    return stem if stem == key else f"{stem}-{_digest(key)}"


def artifact_name(key: str, site: str) -> str:
    """Return the name of a site's artifact. All runs of a W&B project share artifact names, so it holds the site."""
    name = f"{key}--{site}"
    safe = _UNSAFE.sub("_", name)
    if safe == name and len(name) <= MAX_ARTIFACT_NAME_CHARS and name.replace("---", "----").count("--") == 1:
        return name
    digest = _digest(f"{site}\0{key}")
    return f"{safe[: MAX_ARTIFACT_NAME_CHARS - len(digest) - 1]}-{digest}"


def run_name(text: str) -> str:
    """Return a run's or a group's name. If it is too long, it ends in a digest of the whole."""
    return _within(text, MAX_NAME_CHARS)


def tag_text(key: str, value: str = "") -> str:
    """Return the W&B tag ``key:value``, or ``key`` alone. If it is too long, it ends in a digest of the whole."""
    return _within(f"{key}:{value}" if value else key, MAX_TAG_CHARS)


def config_value(value: Any) -> Any:
    """Return a param's value as a run's config can hold it.

    A config is plain JSON, so NaN and infinities become text. W&B stores it as a tree of its leaves. An empty dict
    would vanish there, so it becomes ``"{}"``. The SDK looks up a value that refers to an artifact, with the receiver's
    login and at the host that the value names. A site must not cause that, so such a value becomes its JSON text.
    """
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case str() if value.startswith(_REFERENCE):
            return json.dumps(value, ensure_ascii=False)
        case dict():
            plain = {str(key): config_value(item) for key, item in value.items()}
            if plain.get("_type") == "artifactVersion":
                return json.dumps(plain, ensure_ascii=False)
            return plain or "{}"
        case list() | tuple():
            return [config_value(item) for item in value]
    return value


def _within(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    digest = _digest(text)
    return f"{text[: max_chars - len(digest) - 1]}~{digest}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
