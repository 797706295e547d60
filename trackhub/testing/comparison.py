# SPDX-License-Identifier: Apache-2.0
"""Whether a store holds what it must: nothing missing, nothing twice, nothing else."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from trackhub.spi import Capabilities, Kind
from trackhub.testing.author import ContractHooks
from trackhub.testing.readback import ReadBack

__all__ = ["check_held", "counted", "differences"]

_FIELD_KINDS = {
    "params": Kind.PARAMS,
    "tags": Kind.TAGS,
    "texts": Kind.TEXT,
    "images": Kind.IMAGE,
    "histograms": Kind.HISTOGRAM,
    "tables": Kind.TABLE,
    "artifacts": Kind.ARTIFACT,
}
_SHOWN = 5


def check_held(expected: ReadBack, found: ReadBack, hooks: ContractHooks, can: Capabilities, what: str) -> None:
    """Check that a store holds exactly what is expected, apart from the order.

    Args:
        what: what was logged, for the message.

    Raises:
        AssertionError: it does not; the message shows what is missing and what should not be there.
    """
    problems = differences("points", expected, found, hooks)
    for field, kind in _FIELD_KINDS.items():
        if getattr(found, field) is not None:
            problems += differences(field, expected, found, hooks)
        elif field not in hooks.cannot_tell and kind in can.kinds:
            problems.append(
                f"{field}: read_back gives None, though the backend claims {kind.name}; read it, or say in "
                f"cannot_tell[{field!r}] why this store cannot tell"
            )
    if problems:
        raise AssertionError("\n  ".join([f"after {what}, the store does not hold what it must:", *problems]))


def differences(field: str, expected: ReadBack, found: ReadBack, hooks: ContractHooks) -> list[str]:
    """Return what is wrong with one field, in words."""
    if field in hooks.cannot_tell:
        return [f"{field}: declared in cannot_tell, but read_back tells it: remove the declaration"]
    want, have = getattr(expected, field), getattr(found, field)
    if isinstance(want, dict):
        want, have = _pairs(want), _pairs(have)
        return _multisets(field, Counter(want), Counter(have))
    hidden = {name for name in _attributes(want, have) if f"{field}.{name}" in hooks.cannot_tell}
    told = [
        f"{field}.{name}: declared in cannot_tell, but read_back tells it: remove the declaration"
        for name in hidden
        if _is_told(name, want, have)
    ]
    return told + _multisets(field, counted(want, hidden), counted(have, hidden))


def counted(items: Iterable[Any], hidden: Iterable[str] = ()) -> Counter[str]:
    """Return how often each item is there, spelled so that NaN equals NaN and contents are short."""
    return Counter(_spell({k: v for k, v in _fields(item) if k not in hidden}) for item in items)


def _multisets(field: str, want: Counter[str], have: Counter[str]) -> list[str]:
    lines = []
    for title, extra in (("missing", want - have), ("there, but must not be", have - want)):
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
    """Return whether an attribute agrees everywhere, where agreeing cannot be chance."""
    wanted, had = (Counter(_spell(dict(_fields(item))[name]) for item in items) for items in (want, have))
    return len(wanted) > 1 and "None" not in wanted and wanted == had


def _fields(item: Any) -> Iterable[tuple[str, Any]]:
    fields: dict[str, Any] = msgspec.structs.asdict(item)
    # A step is an int, and True is no step; values and times are floats, however a reader spells them.
    return ((name, float(v) if name in ("value", "time") and v is not None else v) for name, v in fields.items())


def _pairs(values: Mapping[str, Any]) -> list[str]:
    return [f"{key!r}: {_spell(value)}" for key, value in values.items()]


def _spell(value: Any) -> str:
    """Return a text that is the same for equal values, and tells 1, 1.0, True and "1" apart."""
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
