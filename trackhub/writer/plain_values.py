# SPDX-License-Identifier: Apache-2.0
"""Turns the objects of training code into plain values that a record can hold: numbers, texts, lists and dicts.

`trackhub.writer.values` calls it for single values. It recognises objects of numpy, torch and configuration libraries
by their attributes. It imports none of these libraries but NumPy, for `array_of`. The message of an error
begins with the argument ``what``, or with "key".
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import math
import numbers
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trackhub.errors import RecordError
from trackhub.fork_without_signals import FORK_LOCK
from trackhub.records import MAX_DEPTH, key_problem
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.writer.bounded_reading import Budget

__all__ = [
    "array_of",
    "as_mapping",
    "holds_numbers",
    "key_text",
    "masked_arrays",
    "plain_number",
    "plain_param",
    "plain_text",
    "require_new",
    "shown",
    "shown_error",
]

_MAX_ITEMS = 1000  # the longest array that becomes a list; a longer one becomes text
_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1  # the encoder raises for other integers
_NUMBERS = ("", "b", "i", "u", "f", "O")  # kinds of numpy: none, bools, ints, floats, objects
_FIRST_ADDED_TYPE = 256  # numpy numbers the types that other libraries add from here on (NPY_USERDEF)
_MISSING = ("NAType", "NaTType")  # the types of pandas' NA and NaT. The null of polars is None already
_SHOWN_CHARS = 80
_BRACKETS: dict[type, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    dict: ("{", "}"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
    collections.deque: ("deque([", "])"),
    collections.OrderedDict: ("OrderedDict({", "})"),
    collections.defaultdict: ("defaultdict({", "})"),
    collections.Counter: ("Counter({", "})"),
}
_FIELDS = ("__struct_fields__", "_fields", "model_fields", "__fields__")
"""The attributes in which classes list their fields: msgspec, named tuples, pydantic 2 and 1."""


def plain_text(what: str, key: Any, text: str) -> str:
    """Return a text as a plain str.

    The encoder does not take subclasses of str, such as the strings of numpy and enums.

    Args:
        what: what the text is, for the message.
        key: the key that it belongs to, for the message.
        text: the text.

    Raises:
        RecordError: it cannot be encoded as UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RecordError(f"{what} {key!r}: the text cannot be encoded as UTF-8: {e}") from e
    return str.__str__(text)


def shown(value: Any) -> str:
    """Return the beginning of a value's ``repr`` for a message. Raises only what a signal handler raises."""
    try:
        text = ""
        for piece in _pieces_of_repr(value):
            text += piece
            if len(text) > _SHOWN_CHARS:
                return f"{text[:_SHOWN_CHARS]}..."
        return text
    except Exception as e:  # noqa: BLE001  # a foreign class may raise anything; an int of 5000 digits raises ValueError
        raise_if_from_signal_handler(e)
        return f"<{type(value).__name__} without a repr: {type(e).__name__}>"


def _pieces_of_repr(value: Any) -> Iterator[str]:
    """Yield the ``repr`` of a value in pieces, so that the end of a long text or list is not made."""
    if isinstance(value, str | bytes | bytearray) and len(value) > _SHOWN_CHARS:
        yield repr(value[: _SHOWN_CHARS + 1])
        return
    begin, end = _BRACKETS.get(type(value), ("", ""))
    if not begin or not value:
        yield repr(value)
        return
    yield begin
    for i, item in enumerate(value):
        yield ", " if i else ""
        yield from _pieces_of_repr(item)
        if isinstance(value, dict):
            yield ": "
            yield from _pieces_of_repr(value[item])
    yield ",)" if type(value) is tuple and len(value) == 1 else end


def shown_error(error: BaseException, max_chars: int = _SHOWN_CHARS) -> str:
    """Return the beginning of an error's text for a message. Raises only what a signal handler raises."""
    try:
        return str(error)[:max_chars]
    except Exception as e:  # noqa: BLE001  # as above
        raise_if_from_signal_handler(e)
        return "it has no text"


def key_text(key: Any, *, is_inner: bool = False) -> str:
    """Return a key as text. Numbers, bools and enum members become text, since many dicts have such keys.

    Args:
        key: the key.
        is_inner: True for the key of a nested dict. Such a key may also be None or a tuple.

    Raises:
        RecordError: the key is of another type.
    """
    if isinstance(key, enum.Enum):
        key = key.value if isinstance(key.value, str | int) else key.name
    if isinstance(key, str):
        return str.__str__(key)
    if getattr(key, "shape", None) == () and hasattr(key, "item") and holds_numbers(key):
        key = key.item()  # a number of numpy or torch
    if isinstance(key, bool | int | float) or (is_inner and (key is None or isinstance(key, tuple))):
        return str(key)
    raise RecordError(f"key {shown(key)} is a {type(key).__name__}; expected a str")


def require_new(key: str, found: Mapping[str, Any]) -> None:
    """Check that a key is not there yet.

    Raises:
        RecordError: it is.
    """
    if key in found:
        raise RecordError(
            f"key {shown(key)} comes twice in one call; only one value can be kept. Rename one of the keys"
        )


def as_mapping(value: Any, *, has_fields: bool) -> Mapping[Any, Any] | None:
    """Return a mapping as it is, or an object's fields as a mapping. None for any other value.

    Args:
        value: any value.
        has_fields: True if an object with fields counts as well: a dataclass, an ``argparse.Namespace``, a pydantic
            model, ...
    """
    if isinstance(value, Mapping):
        return value
    if not has_fields or isinstance(value, type):
        return None
    if isinstance(value, types.SimpleNamespace) or _is_argparse_namespace(value):
        return dict(vars(value))
    names = _names_of_fields(value)
    return _Fields(value, names) if names else None


class _Fields(Mapping[str, Any]):
    """The fields of an object. Each is read only when it is asked for: a field that cannot be read costs no other."""

    def __init__(self, owner: Any, names: tuple[str, ...]) -> None:
        self._owner = owner
        self._names = names

    def __getitem__(self, name: str) -> Any:
        return getattr(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _is_argparse_namespace(value: Any) -> bool:
    """Return whether this is an ``argparse.Namespace``, or of a subclass, such as jsonargparse's."""
    argparse = sys.modules.get("argparse")  # without it, there is none
    return argparse is not None and isinstance(value, argparse.Namespace)


def _names_of_fields(value: Any) -> tuple[str, ...]:
    """Return the names of an object's fields. It is empty for an object of an unknown kind."""
    kind = type(value)
    if hasattr(kind, "__dataclass_fields__"):
        return tuple(field.name for field in dataclasses.fields(value))  # without ClassVar and InitVar
    if isinstance(attributes := getattr(kind, "__attrs_attrs__", None), tuple):  # attrs
        return tuple(attribute.name for attribute in attributes)
    for attribute in _FIELDS:
        if isinstance(names := getattr(kind, attribute, ()), tuple | Mapping) and names:
            break
    else:
        names = ()
    extra = getattr(value, "__pydantic_extra__", None)  # what a model with extra="allow" got beside its fields
    return tuple(names) + (tuple(extra) if isinstance(extra, dict) else ())


def array_of(value: Any) -> Any:
    """Return an array of numpy with the values of an array or tensor of any library, or of a list of these.

    A masked array stays one, also in a list: the caller decides what takes the place of the masked values.

    Raises:
        Exception: whatever the value raises.
    """
    import numpy as np  # imported late: a script that passes an array has NumPy

    # Not by the name of the method alone: ``detach`` of an open file takes the file away from the script.
    if _is_tensor(value):
        value = value.detach()
        value = value.dequantize() if value.is_quantized else value.to_dense()  # a dense tensor stays as it is
        try:
            return value.numpy(force=True)
        except TypeError:  # NumPy has no bfloat16 and no float8
            return value.float().numpy(force=True)
    ma = masked_arrays()
    if isinstance(value, ma.MaskedArray):
        return value
    if isinstance(value, list | tuple) and any(isinstance(item, ma.MaskedArray) for item in value):
        return ma.array([array_of(item) for item in value])
    try:
        return np.asarray(value)
    except Exception as e:
        raise_if_from_signal_handler(e)
        if not isinstance(value, list | tuple):
            raise
        return np.asarray([array_of(item) for item in value])  # such as losses on a GPU, or with a gradient


def masked_arrays() -> Any:
    """Return ``numpy.ma``, which NumPy itself would import when it is first used.

    A child that another thread forks in the middle of an import would wait for ever when it needs the module.
    """
    with FORK_LOCK:
        from numpy import ma
    return ma


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # without it, there is none
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def plain_number(what: str, key: Any, value: Any) -> float:
    """Return a number as a float: anything that ``float()`` takes, except texts, dates and complex numbers.

    Args:
        what: what the number is, for the message.
        key: the key that it belongs to, for the message.
        value: a number, or a numpy or torch value with one element.

    Raises:
        RecordError: it is not one number, or too large for a float64.
    """
    if isinstance(value, int | float):
        return _to_float(what, key, value)
    if not isinstance(value, str | bytes | bytearray) and holds_numbers(value):
        if _is_masked(value):
            return math.nan
        plain = _unwrap(what, key, value)
        if isinstance(plain, int | float) or hasattr(type(plain), "__float__"):
            return _to_float(what, key, plain)
    raise RecordError(
        f"{what} {key!r}: {shown(value)} is a {type(value).__name__}; expected a number (bool, int, float, or anything "
        "with one element that float() takes)"
    )


def _to_float(what: str, key: Any, value: Any) -> float:
    try:
        number = float(value)
        # A Decimal and numpy's longdouble become infinite without an OverflowError.
        is_number = math.isinf(number) and isinstance(value, numbers.Number)
        if is_number and value != number:
            raise OverflowError
        return number
    except OverflowError as e:
        raise RecordError(f"{what} {key!r}: {shown(value)} is too large for a float64") from e


def plain_param(what: str, path: str, value: Any, depth: int = 0, budget: Budget | None = None) -> Any:
    """Return a plain value: None, bool, int, float, str, or lists and dicts of these. Anything else becomes text.

    Args:
        what: what the value is, for the message.
        path: where the value is, for the message.
        value: any value.
        depth: how many lists and dicts enclose the value.
        budget: how many values may still be read; None for as many as a record may have.

    Raises:
        RecordError: the value is nested too deep, has too many values, a text that cannot be encoded, or an invalid
            key.
    """
    if isinstance(value, enum.Enum):
        value = value.value if isinstance(value.value, bool | int | float | str) else value.name
    if value is None or isinstance(value, bool | int | float | str):
        return _read_plain(what, path, value)
    if depth == MAX_DEPTH:
        raise RecordError(f"{what} {shown(path)} is nested more than {MAX_DEPTH} deep; convert it with str()")
    if isinstance(value, os.PathLike):
        return plain_text(what, path, os.fsdecode(value))
    if type(value).__name__ in _MISSING:  # before the next test, since NaT is also a datetime
        return None
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, type | types.FunctionType):
        # str() of a function shows its address, which differs in each process.
        return f"{value.__module__}.{value.__qualname__}"
    if _is_masked(value):
        return math.nan
    budget = Budget(f"{what} {path!r}") if budget is None else budget
    if (fields := as_mapping(value, has_fields=True)) is not None:
        inner: dict[str, Any] = {}
        for key in budget.each(fields):
            name = key_text(key, is_inner=True)
            if problem := key_problem(name):
                raise RecordError(f"{what} {path!r}: key {shown(name)} {problem}")
            require_new(name, inner)
            inner[name] = plain_param(what, f"{path}.{name}", fields[key], depth + 1, budget)
        return inner
    items = _as_list(value, budget)
    if items is not None:
        return [plain_param(what, f"{path}[{i}]", item, depth + 1, budget) for i, item in enumerate(items)]
    return _other_param(what, path, value, depth, budget)


def _as_list(value: Any, budget: Budget) -> list[Any] | None:
    """Return a sequence, a set, or an array of at most `_MAX_ITEMS` elements as a list; None for anything else."""
    if isinstance(value, set | frozenset):
        return sorted(budget.each(value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(budget.each(value))
    if not getattr(value, "shape", ()) or not hasattr(value, "tolist") or not _has_items_of_params(value):
        return None
    size = math.prod(value.shape)
    if not 1 < size <= _MAX_ITEMS and size != 0:
        return None
    is_times_of_numpy = getattr(value.dtype, "kind", "") == "M" and not hasattr(value, "to_frame")
    return list((value.astype(str) if is_times_of_numpy else value).tolist())  # else nanoseconds would become ints


def _has_items_of_params(array: Any) -> bool:
    """Return whether an array has numbers, texts or dates."""
    return holds_numbers(array) or getattr(getattr(array, "dtype", None), "kind", "") in ("U", "M")


def _other_param(what: str, path: str, value: Any, depth: int, budget: Budget) -> Any:
    if hasattr(value, "item") and holds_numbers(value) and math.prod(getattr(value, "shape", ())) == 1:
        plain = value.item()
        if type(plain) is not type(value):
            return plain_param(what, path, plain, depth + 1, budget)
        if hasattr(plain, "__float__"):
            return _to_float(what, path, plain)  # such as numpy.longdouble
    return plain_text(what, path, str(value))


def _read_plain(what: str, key: Any, value: Any) -> Any:
    """Return a value whose type is exactly None, bool, int, float or str. The encoder does not take subclasses."""
    if isinstance(value, str):
        return plain_text(what, key, value)
    if isinstance(value, float):
        return float(value)
    if value is None or isinstance(value, bool):
        return value
    number = int(value)
    return number if _MIN_INT <= number <= _MAX_INT else str(number)  # the encoder raises for larger ones


def holds_numbers(value: Any) -> bool:
    """Return whether a value of numpy has numbers. False for dates, times, complex numbers, texts and structures.

    True for values that are not numpy's: they have no such dtype.
    """
    dtype = getattr(value, "dtype", None)
    kind = getattr(dtype, "kind", "")
    if kind == "V":  # structures, and the number types that ml_dtypes adds for JAX: bfloat16, float8, int4, ...
        return bool(getattr(dtype, "num", 0) >= _FIRST_ADDED_TYPE)
    return kind in _NUMBERS or not isinstance(kind, str)


def _is_masked(value: Any) -> bool:
    """Return whether this is ``numpy.ma.masked``, or an array of one masked value. As numbers, both would be 0.0."""
    name = type(value).__name__
    return name == "MaskedConstant" or (name == "MaskedArray" and value.size == 1 and bool(value.mask.all()))


def _unwrap(what: str, key: Any, value: Any) -> Any:
    """Return the plain Python value of a numpy or torch value with one element. Return anything else as it is."""
    if isinstance(value, bool | int | float | str) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (ValueError, RuntimeError, TypeError) as e:
        shape = list(getattr(value, "shape", []))
        raise RecordError(
            f"{what} {key!r}: {type(value).__name__} of shape {shape} is not one number; reduce it first, for example "
            f"with .mean() ({e})"
        ) from e
