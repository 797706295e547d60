# SPDX-License-Identifier: Apache-2.0
"""How keys, tags and files are named in MLflow, so that two keys never become one.

The core fits every logged key to `KEY_RULE` or `TAG_RULE` before this backend sees it. The functions here name what the
core does not know: parts of nested params, tags of a job or an option, and files of artifacts. They escape a character
as the core does, as ``_xHHHH_``.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import unicodedata
from collections.abc import Callable

import msgspec

from trackhub.spi import KeyRule

__all__ = [
    "KEY_RULE",
    "NOTE_TAG",
    "SUMMARY_PREFIX",
    "SUMMARY_RULE",
    "TAG_RULE",
    "artifact_path",
    "cut_name",
    "digest",
    "escape_name",
    "file_part",
    "job_tag_name",
    "logged_tag_name",
    "versioned_path",
]

NOTE_TAG = "mlflow.note.content"
"""The tag that MLflow shows as a run's description. Of MLflow's tags, a site may set only this and `_SOURCE_TAGS`."""

_SOURCE_TAGS = {f"source.git.{name}": f"mlflow.source.git.{name}" for name in ("commit", "branch", "dirty", "repoURL")}
"""What trackhub logs of the job's script, and the tags by which MLflow shows it beside a run's source."""

_MAX_NAME_CHARS = 250
_NAME_CHARS = r"\w./ :\-"
_OWN_TAGS = frozenset({"job", "job_name", "site", "side"})
SUMMARY_PREFIX = "summary."
"""The tags of final values begin with this."""

_OWN_PREFIXES = ("mlflow.", "trackhub.", SUMMARY_PREFIX)
_OWN_FOLDERS = frozenset({"images", "text", "histograms", "tables", "params", "tags"})
_MLFLOW_TEMPORARY = ".artifact.uploading."
_MAX_PART_BYTES = 120  # a file name has at most 255 bytes, and the name of an image adds up to 90 to its key
_DIGEST_CHARS = 16

KEY_RULE = KeyRule(
    max_chars=_MAX_NAME_CHARS,
    chars=_NAME_CHARS,
    edge_chars=_NAME_CHARS.replace(" ", ""),
    is_path=True,
)
"""Which keys MLflow can hold. It refuses a name that ``posixpath.normpath`` would change or that leads upwards.

Spaces at both ends are escaped because MariaDB, SQL Server and older MySQL ignore spaces at the end of a name.

Source: ``validate_param_and_metric_name``, ``path_not_unique`` and ``MAX_ENTITY_KEY_LENGTH`` of
``mlflow.utils.validation``, mlflow 3.17.
"""

TAG_RULE = msgspec.structs.replace(KEY_RULE, reserved_keys=_OWN_TAGS, reserved_prefixes=_OWN_PREFIXES)
"""The same for tags. A site that could set ``mlflow.parentRunId`` or ``site`` could pass for another."""

SUMMARY_RULE = msgspec.structs.replace(KEY_RULE, max_chars=_MAX_NAME_CHARS - len(SUMMARY_PREFIX))
"""The rule of final values, which are tags with a prefix."""

_ILLEGAL = re.compile(f"[^{_NAME_CHARS}]")
_LOOKS_ESCAPED = re.compile(r"_(?=x[0-9A-F]{4})")


def escape_name(text: str) -> str:
    """Escape a name, or a part of one, that the core has not fitted, so that MLflow accepts it."""
    name = _ILLEGAL.sub(lambda match: _escape(match[0]), _LOOKS_ESCAPED.sub("_x005F_", text))
    if name.startswith(("/", "..")) or name == "." or posixpath.normpath(name) != name:
        name = name.replace("/", _escape("/"))
        if name.startswith("."):
            name = _escape(".") + name[1:]
    if name.endswith(" "):
        name = name[:-1] + _escape(" ")
    return name


def cut_name(name: str) -> str:
    """Return the name of a param or tag, cut to the length that MLflow allows.

    A cut name ends in a hash of the whole name.
    """
    return _cut(name, _MAX_NAME_CHARS, len)


def logged_tag_name(key: str) -> str:
    """Return the name of a tag that was logged, given its key as the core fitted it.

    The core has escaped the reserved names. Some databases take ``Site`` and ``site`` for one name, or ``síte`` and
    ``site``. So names that differ from a reserved one only in case or accents are escaped, too.
    """
    if key == _FITTED_NOTE:
        return NOTE_TAG
    if key in _SOURCE_TAGS:
        return _SOURCE_TAGS[key]
    return _escape_first(key) if _is_own_tag(key) else key


def job_tag_name(text: str) -> str:
    """Return the name of a tag that the job or an option gives to every run."""
    if text == NOTE_TAG:
        return text
    name = escape_name(text)
    return cut_name(_escape_first(name) if _is_own_tag(name) else name)


def file_part(key: str) -> str:
    """Return one path component for a key: ``/`` becomes ``~``, as MLflow itself names logged images."""
    return _file_name(key.replace("/", "~"))


def artifact_path(key: str) -> str:
    """Return the path of an artifact that was logged under this key: the key itself wherever that is possible."""
    parts = [_file_name(part) for part in key.split("/")]
    if parts[0].casefold() in _OWN_FOLDERS:
        parts[0] = _escape_first(parts[0])
    if parts[-1].startswith(_MLFLOW_TEMPORARY):
        parts[-1] = _escape_first(parts[-1])
    return "/".join(parts)


def versioned_path(path: str, label: str) -> str:
    """Return the path with a label before the file's extension: ``model/best.pt`` -> ``model/best.LABEL.pt``."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    if not stem:
        stem, dot, extension = name, "", ""
    return f"{folder}{slash}{stem}.{label}{dot}{extension}"


def digest(text: str, chars: int = _DIGEST_CHARS) -> str:
    """Return the beginning of a text's SHA-256, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:chars]


def _is_own_tag(name: str) -> bool:
    letters = (char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char))
    folded = "".join(letters).casefold()
    return folded in _OWN_TAGS or folded.startswith(_OWN_PREFIXES)


def _file_name(text: str) -> str:
    """Escape what some file systems do not allow in a name, and the spaces at its ends, which MLflow would strip."""
    text = text.replace(":", _escape(":"))
    if text[0] == " ":
        text = _escape_first(text)
    if text[-1] in " .":
        text = text[:-1] + _escape(text[-1])
    return _cut(text, _MAX_PART_BYTES, _bytes)


def _cut(text: str, limit: int, size: Callable[[str], int]) -> str:
    if size(text) <= limit:
        return text
    suffix = "_" + digest(text)
    kept = text[: limit - len(suffix)]
    while size(kept) + len(suffix) > limit:
        kept = kept[:-1]
    return kept + suffix


def _bytes(text: str) -> int:
    return len(text.encode())


def _escape_first(text: str) -> str:
    return _escape(text[0]) + text[1:]


def _escape(char: str) -> str:
    return f"_x{ord(char):04X}_"


_FITTED_NOTE = _escape_first(NOTE_TAG)
"""`NOTE_TAG` as the core hands it over: escaped, since it begins like a reserved name."""
