# SPDX-License-Identifier: Apache-2.0
"""Keeps values within what one record may hold: its bytes and its number of values.

`trackhub.writer.values` calls it for the values of params, tags, final values and tables. So a value that is
too large is left out alone, and many values become several records.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from trackhub.framing import MAX_BODY_BYTES
from trackhub.records import MAX_KEY_CHARS, MAX_VALUES_OF_RECORD, Params, count_values

__all__ = ["parts_that_fit", "value_problem"]

_MAX_KEY_BYTES = 4 * MAX_KEY_CHARS  # a character of UTF-8 has up to 4 bytes
_MAX_BYTES = MAX_BODY_BYTES - 100  # number, time, step and round take less
_MAX_VALUE_BYTES = _MAX_BYTES - _MAX_KEY_BYTES - 10  # 10: what msgpack writes before the mapping and before the key
_SHORT = 10_000  # characters; saves most texts from being encoded twice
_Value = TypeVar("_Value")
_encode = msgspec.msgpack.Encoder().encode


def value_problem(value: Any) -> str | None:
    """Return why a plain value is too large for any record, as a sentence without its full stop. None if it is not."""
    if not isinstance(value, str | list | dict) or (isinstance(value, str) and len(value) < _SHORT):
        return None
    if (size := len(_encode(value))) > _MAX_VALUE_BYTES:
        return (
            f"it takes {size} bytes encoded; expected at most {_MAX_VALUE_BYTES}; log a larger value with log_artifact"
        )
    if (count := _count(value)) > MAX_VALUES_OF_RECORD:
        return f"it has {count} values; expected at most {MAX_VALUES_OF_RECORD}; log a file of them with log_artifact"
    return None


def parts_that_fit(values: dict[str, _Value]) -> list[dict[str, _Value]]:
    """Split the values into parts, in their order. Each part fits into one record. There is no part without values.

    Args:
        values: key to plain value. No value has a ``value_problem``.
    """
    if not values:
        return []
    if len(_encode(values)) <= _MAX_BYTES and count_values(Params(values)) <= MAX_VALUES_OF_RECORD:
        return [values]
    parts: list[dict[str, _Value]] = []
    size = count = 0
    for key, value in values.items():
        more, many = len(_encode(key)) + len(_encode(value)), _count(value)
        size, count = size + more, count + many
        if not parts or size > _MAX_BYTES - 10 or count > MAX_VALUES_OF_RECORD:
            parts.append({})
            size, count = more, many
        parts[-1][key] = value
    return parts


def _count(value: Any) -> int:
    """Return how many values a record counts for a value: itself, and those in it."""
    return count_values(Params({"": value}))
