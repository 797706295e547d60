# SPDX-License-Identifier: Apache-2.0
"""Yields the values of a mapping and of the mappings in it, such as a configuration, with keys such as ``optim/lr``.

`trackhub.writer.values` calls it for metrics, params, tags and final values. It reads a bounded number of values, also
if objects refer to each other or are shared: then there are far more paths to them than objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trackhub.errors import RecordError
from trackhub.records import MAX_DEPTH, MAX_VALUES_OF_RECORD
from trackhub.writer.bad_values import BadValues, WrongCallError
from trackhub.writer.bounded_reading import Budget
from trackhub.writer.plain_values import as_mapping, key_text, shown

__all__ = ["pairs_of"]

_MAX_KEYS = 1_000_000  # of the outermost mapping; a million params take seconds


def pairs_of(
    method: str, values: Any, bad: BadValues, *, is_nested: bool = True, has_fields: bool = False
) -> Iterator[tuple[Any, Any]]:
    """Yield the values of a mapping with their keys. The values of a nested mapping get keys such as ``a/b``.

    Args:
        method: the method that was called, for the message.
        values: the mapping.
        bad: gets the values that cannot be read, and nested mappings that contain themselves or have too many values.
        is_nested: whether to look into nested mappings.
        has_fields: whether an object with fields counts as a mapping.

    Raises:
        WrongCallError: ``values`` is not a mapping.
        RecordError: it has more than a million keys.
    """
    fields = as_mapping(values, has_fields=has_fields)
    if fields is None:
        name = type(values).__name__
        raise WrongCallError(f"{method}: expected a mapping of key to value, got {name}: {shown(values)}")
    if type(fields) is dict and len(fields) <= _MAX_KEYS:
        keys = list(fields)  # `Writer.log` of tensors comes here, and a budget would cost it microseconds
    else:
        keys = list(Budget(method, _MAX_KEYS, "keys").each(fields))
    depth = 0 if is_nested else MAX_DEPTH + 1  # a walk looks into nothing that is deeper than MAX_DEPTH
    yield from _Walk(values, bad, has_fields=has_fields).pairs("", keys, fields, depth)


class _Walk:
    """One walk through a mapping and all that it contains."""

    __slots__ = ("_bad", "_budget", "_enclosing", "_has_fields", "_outermost")

    def __init__(self, outermost: Any, bad: BadValues, *, has_fields: bool) -> None:
        self._bad = bad
        self._has_fields = has_fields
        self._outermost = outermost
        # Most calls have no nested mapping, and need neither of these.
        self._enclosing: set[int] = set()  # the values that enclose the place where the walk is
        self._budget: Budget | None = None

    def pairs(self, prefix: str, keys: list[Any], fields: Mapping[Any, Any], depth: int) -> Iterator[tuple[Any, Any]]:
        for key in keys:
            path: Any = key
            try:
                path = f"{prefix}{key_text(key, is_inner=bool(prefix))}"
                value = fields[key]
                inner = None if depth > MAX_DEPTH else as_mapping(value, has_fields=self._has_fields)
                inner_keys = [] if inner is None else self._inner_keys(path, value, inner, depth)
            except Exception as e:  # noqa: BLE001  # for example, OmegaConf raises for a value that is missing
                self._bad.add("value", path, e)
                continue
            if inner is None:
                yield path, value
            elif inner_keys:
                self._enclosing.add(id(value))
                yield from self.pairs(f"{path}/", inner_keys, inner, depth + 1)
                self._enclosing.remove(id(value))
            elif self._has_fields:  # an empty mapping is a param as well, but no metric
                yield path, {}

    def _inner_keys(self, path: str, value: Any, inner: Mapping[Any, Any], depth: int) -> list[Any]:
        """Return the keys of a nested mapping.

        Raises:
            RecordError: it is nested too deep, contains itself, or has more values than may still be read.
        """
        if self._budget is None:
            self._budget = Budget("the nested mappings of one call", MAX_VALUES_OF_RECORD)
        if value is self._outermost or id(value) in self._enclosing:
            raise RecordError(f"{shown(path)} is an object that contains it, such as a parent; leave it out")
        if depth == MAX_DEPTH:
            raise RecordError(f"{shown(path)} is nested more than {MAX_DEPTH} deep; flatten it first")
        return list(self._budget.each(inner))
