# SPDX-License-Identifier: Apache-2.0
"""Turns the keys that a site logged into keys that a backend can store, so that two keys never become one.

`fit_records_to_backend` calls it for every new key of a run. A backend declares its rule as a `trackhub.spi.KeyRule`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

from trackhub.spi import KeyRule

__all__ = ["key_fitter"]

_LOOKS_ESCAPED = re.compile(r"_(?=x[0-9A-F]{4})")
_HASH_CHARS = 16
_LOOKS_CUT = re.compile(rf"_[0-9a-f]{{{_HASH_CHARS}}}$")


def key_fitter(rule: KeyRule) -> Callable[[str], str]:
    """Return the function that makes a key acceptable under this rule.

    The function leaves an acceptable key as it is, unless the key looks like a changed one. It changes any other key
    reversibly. A key that is too long is cut, and ends in a hash. Different keys give different results.
    """
    allowed = re.compile(f"[{rule.chars}]") if rule.chars else None
    edge = re.compile(f"[{rule.edge_chars}]") if rule.edge_chars else None
    escapes = (
        allowed is not None
        or edge is not None
        or rule.is_path
        or (not rule.reserved_as and bool(rule.reserved_keys or rule.reserved_prefixes))
    )

    def fit(key: str) -> str:
        fitted = key
        if escapes:
            # Escape this pattern first. Otherwise the logged key `a_x003A_b` would equal the escaped form of `a:b`.
            fitted = _LOOKS_ESCAPED.sub("_x005F_", key)
        if allowed is not None:
            fitted = "".join(c if allowed.fullmatch(c) else _escape(c) for c in fitted)
        if rule.is_path:
            fitted = _with_escaped_path_parts(fitted)
        if rule.reserved_as:
            # Add the prefix before the edges are escaped: after the prefix, any first character of the key is allowed.
            fitted = _with_prefix(fitted, rule, edge)
        if edge is not None:
            fitted = _with_fitted_edges(fitted, edge)
        if not rule.reserved_as and _is_reserved(fitted, rule):
            fitted = _escape(fitted[0]) + fitted[1:]
        return _within(fitted, key, rule.max_chars)

    return fit


def _escape(char: str) -> str:
    """Spell a character that a name cannot hold.

    Source: the convention of ECMA-376 (Office Open XML), part 1, 22.4.2.4.
    """
    return f"_x{ord(char):04X}_"


def _is_reserved(key: str, rule: KeyRule) -> bool:
    return key in rule.reserved_keys or key.startswith(rule.reserved_prefixes)


def _with_prefix(key: str, rule: KeyRule, edge: re.Pattern[str] | None) -> str:
    """Put the prefix before a key that is reserved, or that begins with a character which may not come first."""
    bare = key
    while bare.startswith(rule.reserved_as):
        bare = bare[len(rule.reserved_as) :]  # a key that looks like the result gets the prefix once more
    is_bad_start = edge is not None and bare != "" and not edge.fullmatch(bare[0])
    return rule.reserved_as + key if is_bad_start or _is_reserved(bare, rule) else key


def _with_fitted_edges(key: str, edge: re.Pattern[str]) -> str:
    """Escape all characters at both ends that may not stand there. An SDK may strip more than one."""
    start, end = 0, len(key)
    while start < end and not edge.fullmatch(key[start]):
        start += 1
    while end > start and not edge.fullmatch(key[end - 1]):
        end -= 1
    return "".join(map(_escape, key[:start])) + key[start:end] + "".join(map(_escape, key[end:]))


def _with_escaped_path_parts(key: str) -> str:
    """Escape the parts that change the path if the key is read as a path: ``a//b``, ``/a``, ``.``, ``..``."""
    out: list[str] = []
    named = False  # True once the current part has a character
    last = len(key) - 1
    for index, char in enumerate(key):
        escaped = char == "/" and (index == last or not named)
        out.append(_escape(char) if escaped else char)
        named = escaped or char != "/"
    parts = "".join(out).split("/")
    parts = [_escape(".") + part[1:] if part in (".", "..") else part for part in parts]
    if parts[0].startswith(".."):
        parts[0] = _escape(".") + parts[0][1:]
    return "/".join(parts)


def _within(fitted: str, key: str, max_chars: int | None) -> str:
    if max_chars is None:
        return fitted
    if len(fitted) < max_chars or (len(fitted) == max_chars and not _LOOKS_CUT.search(fitted)):
        return fitted
    # A cut key ends in a hash of the whole key, so that two long keys with the same beginning stay different.
    digest = hashlib.sha256(key.encode()).hexdigest()[:_HASH_CHARS]
    return f"{fitted[: max_chars - _HASH_CHARS - 1]}_{digest}"
