# SPDX-License-Identifier: Apache-2.0
"""Compares what a store holds with what it must hold: nothing missing, nothing twice, nothing else.

Scenarios and checks call it with an `expectation` and with what the contract class has read back.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from trackhub.spi import Capabilities, Kind
from trackhub.testing.contract_hooks import ContractHooks
from trackhub.testing.readback import ReadBack

__all__ = ["check_held", "counted", "differences"]

_FIELD_KINDS = {
    "params": Kind.PARAMS,
    "tags": Kind.TAGS,
    "summary": Kind.SUMMARY,
    "texts": Kind.TEXT,
    "images": Kind.IMAGE,
    "histograms": Kind.HISTOGRAM,
    "tables": Kind.TABLE,
    "artifacts": Kind.ARTIFACT,
}
_SHOWN = 5
_TOLD = "{}: cannot_tell declares it, but read_back tells it. Remove the declaration"


def check_held(expected: ReadBack, found: ReadBack, hooks: ContractHooks, can: Capabilities, what: str) -> None:
    """Check that a store holds exactly what is expected, in any order.

    Args:
        expected: what it must hold.
        found: what it holds.
        hooks: the contract class, for what its store cannot tell.
        can: what the backend claims.
        what: what was logged, for the message.

    Raises:
        AssertionError: it does not. The message shows what is missing, and what must not be there.
    """
    problems = differences("points", expected, found, hooks)
    for field, kind in _FIELD_KINDS.items():
        if getattr(found, field) is not None:
            problems += differences(field, expected, found, hooks)
        elif field not in hooks.cannot_tell and kind in can.kinds:
            problems.append(
                f"{field}: read_back returns None, but the backend claims {kind.name}. Read it back, or say in "
                f"cannot_tell[{field!r}] why this store cannot tell it"
            )
    if problems:
        raise AssertionError("\n  ".join([f"after {what}, the store does not hold what it must:", *problems]))


def differences(field: str, expected: ReadBack, found: ReadBack, hooks: ContractHooks) -> list[str]:
    """Return what is wrong with one field, in words.

    Args:
        field: of `ReadBack`.
        expected: what the store must hold.
        found: what it holds.
        hooks: the contract class, for what its store cannot tell.
    """
    if field in hooks.cannot_tell:
        return [_TOLD.format(field)]
    want, have = getattr(expected, field), getattr(found, field)
    if isinstance(want, dict):
        want, have = _pairs(want), _pairs(have)
        return _multisets(field, Counter(want), Counter(have))
    hidden = {name for name in _attributes(want, have) if f"{field}.{name}" in hooks.cannot_tell}
    told = [_TOLD.format(f"{field}.{name}") for name in hidden if _is_told(name, want, have)]
    return told + _multisets(field, counted(want, hidden), counted(have, hidden))


def counted(items: Iterable[Any], hidden: Iterable[str] = ()) -> Counter[str]:
    """Return how often each item is there. Items are spelled so that NaN equals NaN, and long contents are short.

    Args:
        items: such as the points of a `ReadBack`.
        hidden: names of attributes that do not count.
    """
    return Counter(_spell({k: v for k, v in _fields(item) if k not in hidden}) for item in items)


def _multisets(field: str, want: Counter[str], have: Counter[str]) -> list[str]:
    lines = []
    for title, extra in (("missing", want - have), ("must not be there", have - want)):
        if extra:
            total = extra.total()
            shown = [f"{item} ({n} times)" if n > 1 else item for item, n in list(extra.items())[:_SHOWN]]
            more = f", and {total - len(shown)} more" if total > len(shown) else ""
            lines.append(f"{field}, {title}: {'; '.join(shown)}{more}")
    return lines


def _attributes(*lists: list[Any]) -> tuple[str, ...]:
    first = next((item for items in lists for item in items), None)
    return () if first is None else first.__struct_fields__


def _is_told(name: str, want: list[Any], have: list[Any]) -> bool:
    """Return True if both sides have the same values of an attribute.

    A single value proves nothing, so there must be two different ones.
    """
    wanted, had = (Counter(_spell(dict(_fields(item))[name]) for item in items) for items in (want, have))
    return len(wanted) > 1 and "None" not in wanted and wanted == had


def _fields(item: Any) -> Iterable[tuple[str, Any]]:
    fields: dict[str, Any] = msgspec.structs.asdict(item)
    # Values and times are floats, whatever a reader makes of them. A step must be an int.
    return ((name, float(v) if name in ("value", "time") and v is not None else v) for name, v in fields.items())


def _pairs(values: Mapping[str, Any]) -> list[str]:
    return [f"{key!r}: {_spell(value)}" for key, value in values.items()]


def _spell(value: Any) -> str:
    """Return a text that is the same for equal values only: 1, 1.0, True and "1" have different texts."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_spell(value[key])}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_spell, value)) + "]"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes, sha256 {hashlib.sha256(value).hexdigest()[:12]}>"
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:90]}…{text[-30:]} ({len(text)} characters, {_short_hash(text)})"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
