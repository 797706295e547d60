# SPDX-License-Identifier: Apache-2.0
"""How trackhub's keys are spelt in MLflow and in the paths of its artifacts, so that two keys never become one.

The core has escaped the characters that MLflow refuses, as ``_xHHHH_``. What is left are rules about whole names:
MLflow takes them for paths, and refuses one that ``posixpath.normpath`` would change or that leads upwards. The
characters that make a name such a path are escaped in the same way.

Source: ``mlflow.utils.validation.path_not_unique`` and ``mlflow.utils.uri.validate_path_is_safe``, mlflow 3.17.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

__all__ = [
    "KEY_CHARS",
    "MAX_NAME_CHARS",
    "artifact_path",
    "component",
    "digest",
    "entity_name",
    "file_part",
    "tag_name",
    "versioned_path",
]

KEY_CHARS = r"\w./ :\-"
"""What names of metrics, params and tags may consist of. Source: ``mlflow.utils.validation``, mlflow 3.17."""

MAX_NAME_CHARS = 250
"""Longest name of a metric, param or tag. Source: ``MAX_ENTITY_KEY_LENGTH`` there."""

NOTE_TAG = "mlflow.note.content"
"""The tag that MLflow shows as a run's description: the only one of its own that a site may set."""

_RESERVED_TAGS = frozenset({"job", "site", "side"})
_RESERVED_PREFIXES = ("mlflow.", "trackhub.")
_RESERVED_FOLDERS = frozenset({"images", "text", "histograms", "tables", "params", "tags"})
_MLFLOW_TEMPORARY = ".artifact.uploading."
_MAX_PART_BYTES = 120  # a file name has at most 255 bytes, and images add up to 90 to a key
_DIGEST_CHARS = 16

_ILLEGAL = re.compile(f"[^{KEY_CHARS}]")
_LOOKS_ESCAPED = re.compile(r"_(?=x[0-9A-F]{4})")


def component(text: str) -> str:
    """Return a piece of a name that the core has not seen, escaped as the core escapes keys."""
    return _ILLEGAL.sub(lambda match: _escape(match[0]), _LOOKS_ESCAPED.sub("_x005F_", text))


def entity_name(key: str) -> str:
    """Return the name of a metric, param or tag for this key."""
    return _fit(_without_path_rules(key), MAX_NAME_CHARS, len)


def tag_name(key: str) -> str:
    """Return the name of a tag that was logged, kept apart from those that say what the run is.

    A site that could set ``mlflow.parentRunId`` or ``site`` could pass for another.
    """
    if key in _RESERVED_TAGS or (key.startswith(_RESERVED_PREFIXES) and key != NOTE_TAG):
        key = _escape(key[0]) + key[1:]
    return entity_name(key)


def file_part(key: str) -> str:
    """Return one path component for a key: ``/`` becomes ``~``, as MLflow itself names logged images."""
    return _file_name(_without_path_rules(key).replace("/", "~"))


def artifact_path(key: str) -> str:
    """Return the path of an artifact that was logged under this key: the key itself wherever that is possible."""
    parts = [_file_name(part) for part in _without_path_rules(key).split("/")]
    if parts[0].casefold() in _RESERVED_FOLDERS:
        parts[0] = _escape(parts[0][0]) + parts[0][1:]
    if parts[-1].startswith(_MLFLOW_TEMPORARY):
        parts[-1] = _escape(".") + parts[-1][1:]
    return "/".join(parts)


def versioned_path(path: str, label: str) -> str:
    """Return the path with a label before the file's extension: ``model/best.pt`` to ``model/best.LABEL.pt``."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    if not stem:
        stem, dot, extension = name, "", ""
    return f"{folder}{slash}{stem}.{label}{dot}{extension}"


def digest(text: str, chars: int = _DIGEST_CHARS) -> str:
    """Return the beginning of a text's SHA-256, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:chars]


def _without_path_rules(key: str) -> str:
    """Escape what would make the key, read as a path, mean another one: ``a//b``, ``/a``, ``a/``, ``.``, ``..``."""
    out: list[str] = []
    named = False  # whether the path component at hand has a character yet
    last = len(key) - 1
    for index, char in enumerate(key):
        escaped = char == "/" and (index == last or not named)
        out.append(_escape(char) if escaped else char)
        named = escaped or char != "/"
    names = "".join(out).split("/")
    names = [_escape(".") + name[1:] if name in (".", "..") else name for name in names]
    if names[0].startswith(".."):
        names[0] = _escape(".") + names[0][1:]
    return "/".join(names)


def _file_name(text: str) -> str:
    """Escape what no file name may have everywhere, and what MLflow strips from a path: spaces at its ends."""
    text = text.replace(":", _escape(":"))
    if text[0] == " ":
        text = _escape(" ") + text[1:]
    if text[-1] in " .":
        text = text[:-1] + _escape(text[-1])
    return _fit(text, _MAX_PART_BYTES, _bytes)


def _fit(text: str, limit: int, size: Callable[[str], int]) -> str:
    """Shorten a text that is too long to one that ends in a hash of the whole."""
    if size(text) <= limit:
        return text
    suffix = "_" + digest(text)
    cut = text[: limit - len(suffix)]
    while size(cut) + len(suffix) > limit:
        cut = cut[:-1]
    return cut + suffix


def _bytes(text: str) -> int:
    return len(text.encode())


def _escape(char: str) -> str:
    return f"_x{ord(char):04X}_"
