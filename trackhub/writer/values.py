# SPDX-License-Identifier: Apache-2.0
"""Read what training code hands to `Writer`: which values are accepted, and what plain values they become.

Each function takes arguments of a log call and returns a payload, or plain values for one. It raises `RecordError` for
an argument that it does not accept. The message names the key, the value and what was expected. A ``what`` parameter
is the first word of that message. Images and files are read in `trackhub.writer.images` and
`trackhub.writer.artifacts`.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any

from trackhub.errors import RecordError
from trackhub.records import MAX_STEP, Histogram, Params, Table, Tags, Text, key_problem

__all__ = [
    "param_or_text",
    "plain_text",
    "read_histogram",
    "read_key",
    "read_metrics",
    "read_params",
    "read_step",
    "read_table",
    "read_tags",
    "read_text",
    "shown",
]

_KNOWN_KEYS_MAX = 10_000
_MAX_DEPTH = 20
_SHOWN_CHARS = 80


def read_metrics(metrics: Any, known_keys: set[str]) -> dict[str, float]:
    """Return scalars as key to float.

    Args:
        metrics: a mapping of key to number.
        known_keys: keys that were accepted before. Accepted keys are added, up to a limit.

    Raises:
        RecordError: it is not a mapping, it is empty, or a key or value is not accepted.
    """
    return {
        _read_cached_key(key, known_keys): value if type(value) is float else _read_number("metric", key, value)
        for key, value in _items("log", metrics)
    }


def read_params(params: Any) -> Params:
    """Return hyperparameters as plain values.

    Raises:
        RecordError: it is not a mapping, it is empty, or a key or value is not accepted.
    """
    return Params({read_key(key): _read_param(str(key), value) for key, value in _items("log_params", params)})


def read_tags(tags: Any) -> Tags:
    """Return labels as key to text.

    Raises:
        RecordError: it is not a mapping, it is empty, or a key or value is not accepted.
    """
    return Tags({read_key(key): _read_tag(key, value) for key, value in _items("set_tags", tags)})


def read_text(key: Any, text: Any) -> Text:
    """Return a text under its key.

    Raises:
        RecordError: the key is not accepted, or the text is not a str that can be encoded.
    """
    key = read_key(key)
    if not isinstance(text, str):
        raise RecordError(f"text {key!r}: {shown(text)} is a {type(text).__name__}; expected a str; use str()")
    return Text(key, plain_text("text", key, text))


def read_histogram(key: Any, values: Any, bins: Any, edges: Any, counts: Any) -> Histogram:
    """Return a distribution, either counted from values or as it was given.

    Args:
        key: the histogram's key.
        values: an array of finite numbers; None if edges and counts are given.
        bins: how many equal bins to count the values into.
        edges: n + 1 finite, rising bin limits; None if values are given.
        counts: n counts >= 0; None if values are given.

    Raises:
        RecordError: neither or both are given, or they are not as described.
    """
    key = read_key(key)
    if (values is None) == (edges is None) or (edges is None) != (counts is None):
        raise RecordError(f"histogram {key!r}: expected either values, or edges and counts")
    if values is not None:
        edges, counts = _count_values(key, values, bins)
    try:
        limits = [_read_number("histogram", key, edge) for edge in edges]
        numbers = [_read_number("histogram", key, count) for count in counts]
    except TypeError as e:
        raise RecordError(f"histogram {key!r}: {e}; expected edges and counts to be lists of numbers") from e
    rising = all(a < b for a, b in itertools.pairwise(limits))
    if len(limits) != len(numbers) + 1 or not numbers or not rising or not all(map(math.isfinite, limits)):
        raise RecordError(
            f"histogram {key!r}: {len(limits)} edges and {len(numbers)} counts; expected n + 1 finite rising edges and "
            "n counts"
        )
    if not all(number >= 0 and math.isfinite(number) for number in numbers):
        raise RecordError(f"histogram {key!r}: a count is negative or not finite; expected counts >= 0")
    return Histogram(key, limits, numbers)


def read_table(key: Any, columns: Any, rows: Any) -> Table:
    """Return a table; each cell becomes None, bool, int, float or str.

    Args:
        key: the table's key.
        columns: column names.
        rows: rows of cells, each as long as ``columns``.

    Raises:
        RecordError: the key or a cell is not accepted, or a row has another length.
    """
    key = read_key(key)
    table: list[list[Any]] = []
    try:
        names = [plain_text("table", key, name if isinstance(name, str) else str(name)) for name in columns]
        for i, row in enumerate(rows):
            what = f"row {i} of table"
            cells = [_read_cell(what, key, cell) for cell in row]
            if len(cells) != len(names):
                raise RecordError(f"{what} {key!r} has {len(cells)} cells; expected {len(names)}")
            table.append(cells)
    except TypeError as e:
        raise RecordError(f"table {key!r}: {e}; expected a list of column names and a list of rows") from e
    return Table(key, names, table)


def read_key(key: Any) -> str:
    """Return a key as a plain str.

    Raises:
        RecordError: it is not a str, or ``trackhub.records.key_problem`` finds a problem.
    """
    if not isinstance(key, str):
        raise RecordError(f"key {shown(key)} is a {type(key).__name__}; expected a str")
    plain = str.__str__(key)  # the encoder takes no subclass of str
    if problem := key_problem(plain):
        raise RecordError(f"key {shown(plain)} {problem}")
    return plain


def read_step(step: Any) -> int | None:
    """Return a step as a plain int; None stays None.

    Raises:
        RecordError: it is not a whole number from 0 to ``MAX_STEP``.
    """
    if step is None:
        return None
    try:
        if isinstance(step, bool):
            raise TypeError
        value = operator.index(step)
    except (TypeError, ValueError, RuntimeError) as e:
        raise RecordError(f"step {shown(step)} is a {type(step).__name__}; expected an int >= 0, or None") from e
    if not 0 <= value <= MAX_STEP:
        raise RecordError(f"step {shown(value)} is out of range; expected 0 to {MAX_STEP}, or None")
    return value


def param_or_text(value: Any, depth: int = 0) -> Any:
    """Return the value if a param can hold it, else its text: what MLflow's own functions make of a param.

    Args:
        value: any value; lists and dicts are looked into.
        depth: how many lists and dicts are around it.
    """
    if _is_plain(value) or hasattr(value, "item") or depth > _MAX_DEPTH:
        return value
    if isinstance(value, list | tuple):
        return [param_or_text(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return {str(key): param_or_text(item, depth + 1) for key, item in value.items()}
    return str(value)


def plain_text(what: str, key: Any, text: str) -> str:
    """Return a text as a plain str: the encoder takes no subclass of it, such as numpy's and enums' strings.

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
    """Return the beginning of a value's ``repr`` for a message. Never raises."""
    try:
        text = repr(value)
        return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
    except Exception as e:  # noqa: BLE001  # a foreign class may raise anything; an int of 5000 digits raises ValueError
        return f"<{type(value).__name__} without a repr: {type(e).__name__}>"


def _items(method: str, values: Any) -> Iterable[tuple[Any, Any]]:
    if not isinstance(values, Mapping):
        name = type(values).__name__
        raise RecordError(f"{method}: expected a mapping of key to value, got {name}: {shown(values)}")
    if not values:
        raise RecordError(f"{method}: the mapping is empty; expected at least one key")
    return values.items()


def _read_cached_key(key: Any, known_keys: set[str]) -> str:
    if type(key) is str and key in known_keys:
        return key
    checked = read_key(key)
    if len(known_keys) < _KNOWN_KEYS_MAX:
        known_keys.add(checked)
    return checked


def _read_number(what: str, key: Any, value: Any) -> float:
    plain = _unwrap(what, key, value)
    if isinstance(plain, bool | int | float):
        try:
            return float(plain)
        except OverflowError as e:
            raise RecordError(f"{what} {key!r}: {shown(plain)} is too large for a float64") from e
    raise RecordError(
        f"{what} {key!r}: {shown(value)} is a {type(value).__name__}; expected a number (bool, int, float, or a numpy "
        "or torch value with one element)"
    )


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


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _read_plain(what: str, key: Any, value: Any) -> Any:
    """Return a value of exactly the type None, bool, int, float or str: the encoder takes no subclasses of them."""
    if isinstance(value, str):
        return plain_text(what, key, value)
    if isinstance(value, float):
        return float(value)
    return value if value is None or isinstance(value, bool) else int(value)


def _read_param(path: str, value: Any, depth: int = 0) -> Any:
    value = _unwrap("param", path, value)
    if _is_plain(value):
        return _read_plain("param", path, value)
    if isinstance(value, os.PathLike):
        return plain_text("param", path, os.fsdecode(value))
    if depth == _MAX_DEPTH:
        raise RecordError(f"param {path[:80]!r}... is nested more than {_MAX_DEPTH} deep; convert it with str()")
    if isinstance(value, Mapping):
        return {read_key(key): _read_param(f"{path}.{key}", item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_read_param(f"{path}[{i}]", item, depth + 1) for i, item in enumerate(value)]
    raise RecordError(
        f"param {path!r}: {shown(value)} is a {type(value).__name__}; expected None, bool, int, float, str, a path, or "
        "lists and dicts of these; convert it with str()"
    )


def _read_tag(key: Any, value: Any) -> str:
    value = _unwrap("tag", key, value)
    if _is_plain(value):
        return plain_text("tag", key, value if isinstance(value, str) else str(value))
    raise RecordError(f"tag {key!r}: {shown(value)} is a {type(value).__name__}; expected a str; use str()")


def _read_cell(what: str, key: Any, value: Any) -> Any:
    value = _unwrap(what, key, value)
    if _is_plain(value):
        return _read_plain(what, key, value)
    raise RecordError(
        f"{what} {key!r}: {shown(value)} is a {type(value).__name__}; expected None, bool, int, float or str; use str()"
    )


def _count_values(key: str, values: Any, bins: Any) -> tuple[list[float], list[float]]:
    import numpy as np  # lazy: the rest of the writer works without

    if hasattr(values, "detach"):
        values = values.detach().cpu().double()  # NumPy has no bfloat16
    try:
        counts, edges = np.histogram(np.asarray(values, dtype=np.float64).ravel(), bins=bins)
    except (ValueError, TypeError) as e:
        raise RecordError(f"histogram {key!r}: {e}; expected an array of finite numbers and bins >= 1") from e
    return edges.tolist(), counts.astype(np.float64).tolist()
