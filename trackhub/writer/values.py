# SPDX-License-Identifier: Apache-2.0
"""Checks the arguments of `Writer`'s methods, and turns them into plain values.

Each function takes arguments of a log call. It returns a payload, or the plain values that go into one. It raises
`RecordError` for an argument that it does not accept. The message names the key, the value and what was expected. Where
a call has several values, `BadValues` collects the errors instead, and the good values are kept. Images and files are
read in `trackhub.writer.images` and `trackhub.writer.read_artifact`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from trackhub.errors import RecordError
from trackhub.records import (
    MAX_STEP,
    MAX_VALUES_OF_RECORD,
    Histogram,
    Params,
    Summary,
    Table,
    Tags,
    Text,
    key_problem,
)
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.writer.bad_values import BadValues, WrongCallError
from trackhub.writer.bounded_reading import Budget
from trackhub.writer.convert_figures_and_tables import chosen_columns, table_of
from trackhub.writer.fit_into_records import parts_that_fit, value_problem
from trackhub.writer.nested_mappings import pairs_of
from trackhub.writer.plain_values import (
    array_of,
    holds_numbers,
    key_text,
    masked_arrays,
    plain_number,
    plain_param,
    plain_text,
    require_new,
    shown,
)

__all__ = [
    "known_numbers",
    "read_histogram",
    "read_key",
    "read_metrics",
    "read_params",
    "read_step",
    "read_summary",
    "read_table",
    "read_tags",
    "read_text",
]

_KNOWN_KEYS_MAX = 10_000
_MAX_BINS = (MAX_VALUES_OF_RECORD - 1) // 2  # a histogram has one edge more than it has counts
_Value = TypeVar("_Value")


def known_numbers(metrics: Any, known_keys: set[str]) -> dict[str, float] | None:
    """Return metrics as key -> float if all are Python numbers under known keys. If not, return None.

    The caller then calls `read_metrics`, which takes longer.

    Args:
        metrics: a mapping of key to number.
        known_keys: keys that were accepted before.
    """
    found = {}
    if type(metrics) is not dict:
        return None
    for key, value in metrics.items():
        if type(key) is not str or key not in known_keys or not issubclass(type(value), float | int):
            return None
        try:
            found[key] = float(value)
        except Exception as e:  # noqa: BLE001  # `read_metrics` then finds which value it is
            raise_if_from_signal_handler(e)
            return None
    return found


def read_metrics(metrics: Any, known_keys: set[str], bad: BadValues) -> dict[str, float]:
    """Return metrics as key -> float. Nested mappings become keys such as ``train/loss``.

    Args:
        metrics: a mapping of key to number. An empty one gives an empty dict.
        known_keys: keys that were accepted before. Accepted keys are added, up to a limit.
        bad: gets the values that are not accepted.

    Raises:
        WrongCallError: it is not a mapping.
    """
    found: dict[str, float] = {}
    for key, value in pairs_of("log", metrics, bad):
        try:
            plain = _read_cached_key(key, known_keys)
            number = value if type(value) is float else plain_number("metric", plain, value)
            require_new(plain, found)
        except Exception as e:  # noqa: BLE001  # a foreign value may raise anything
            bad.add("metric", key, e)
        else:
            found[plain] = number
    return found


def read_params(params: Any, bad: BadValues) -> list[Params]:
    """Return hyperparameters as plain values, in as many payloads as they need: in most cases one.

    Nested mappings become keys such as ``optim/lr``.

    Args:
        params: a mapping, or an object with fields: a dataclass, an ``argparse.Namespace``, a pydantic model, ...
        bad: gets the values that are not accepted.

    Raises:
        WrongCallError: ``params`` is neither a mapping nor such an object.
    """
    leaves = pairs_of("log_params", params, bad, has_fields=True)
    return [Params(part) for part in _accepted("param", leaves, bad, plain_param)]


def read_summary(values: Any, bad: BadValues) -> list[Summary]:
    """Return final values as plain values, as `read_params` does.

    Args:
        values: a mapping, or an object with fields.
        bad: gets the values that are not accepted.

    Raises:
        WrongCallError: ``values`` is neither a mapping nor such an object.
    """
    leaves = pairs_of("summarize", values, bad, has_fields=True)
    return [Summary(part) for part in _accepted("final value", leaves, bad, plain_param)]


def read_tags(tags: Any, bad: BadValues) -> list[Tags]:
    """Return tags as key -> text, in as many payloads as they need.

    Args:
        tags: a mapping of key to value; each value becomes text.
        bad: gets the values that are not accepted.

    Raises:
        WrongCallError: it is not a mapping.
    """
    leaves = pairs_of("set_tags", tags, bad, is_nested=False)
    return [Tags(part) for part in _accepted("tag", leaves, bad, _plain_tag)]


def _plain_tag(what: str, key: str, value: Any) -> str:
    param = plain_param(what, key, value)
    return plain_text(what, key, param if isinstance(param, str) else str(param))


def _accepted(
    what: str, leaves: Iterable[tuple[Any, Any]], bad: BadValues, read: Callable[[str, str, Any], _Value]
) -> list[dict[str, _Value]]:
    """Convert each value with ``read``. Return the converted values, one dict for each record that they need.

    Values that fail, and values that are too large for a record, are added to ``bad``.
    """
    found: dict[str, _Value] = {}
    for key, value in leaves:
        try:
            plain = read_key(key)
            kept = read(what, plain, value)
            if problem := value_problem(kept):
                raise RecordError(f"{what} {plain!r}: {problem}")
            require_new(plain, found)
        except Exception as e:  # noqa: BLE001  # a foreign value may raise anything
            bad.add(what, key, e)
        else:
            found[plain] = kept
    return parts_that_fit(found)


def read_text(key: Any, text: Any) -> Text:
    """Return a text under its key.

    Raises:
        RecordError: the key is not accepted, or the text is not a str that can be encoded.
    """
    key = read_key(key)
    if not isinstance(text, str):
        raise RecordError(f"text {key!r}: {shown(text)} is a {type(text).__name__}; expected a str; use str()")
    return Text(key, plain_text("text", key, text))


def read_histogram(key: Any, values: Any, bins: Any, edges: Any, counts: Any, bad: BadValues) -> Histogram:
    """Return a histogram, either counted from the finite values or as it was given.

    Args:
        key: the histogram's key.
        values: an array of numbers; those that are not finite are left out. None if edges and counts are given.
        bins: how many equal bins to count the values into.
        edges: n + 1 finite, rising bin limits; None if values are given.
        counts: n counts >= 0; None if values are given.
        bad: gets one error for all values that are not finite.

    Raises:
        RecordError: an argument is not as described. Give either values, or edges and counts.
    """
    key = read_key(key)
    if (values is None) == (edges is None) or (edges is None) != (counts is None):
        raise RecordError(f"histogram {key!r}: expected either values, or edges and counts")
    if values is not None:
        edges, counts = _count_values(key, values, bins, bad)
    try:
        budget = Budget(f"histogram {key!r}")
        limits = [plain_number("histogram", key, edge) for edge in budget.each(edges)]
        numbers = [plain_number("histogram", key, count) for count in budget.each(counts)]
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


def read_table(key: Any, columns: Any, rows: Any, bad: BadValues) -> Table:
    """Return a table; each cell becomes None, bool, int, float or str.

    Args:
        key: the table's key.
        columns: column names, or the whole table.
        rows: rows of cells, each as long as ``columns``, or a whole table; None if ``columns`` is the whole table.
        bad: gets the cells that are not accepted. None takes their place.

    Raises:
        RecordError: the key is not accepted, this is not a table, or a row has another length.
    """
    key = read_key(key)
    table: list[list[Any]] = []
    try:
        if rows is None:
            columns, rows = table_of(columns)
        else:
            columns = list(Budget(f"table {key!r}").each(columns))
            rows = chosen_columns(columns, rows)
        names = [plain_text("table", key, name if isinstance(name, str) else str(name)) for name in columns]
        budget = Budget(f"table {key!r}")
        for i, row in enumerate(Budget(f"table {key!r}", unit="rows").each(rows)):
            what = f"row {i} of table"
            if isinstance(row, str | bytes):
                raise TypeError(f"row {i} is a {type(row).__name__}")
            cells = [_read_cell(what, key, cell, bad) for cell in budget.each(row)]
            if len(cells) != len(names):
                raise RecordError(f"{what} {key!r} has {len(cells)} cells; expected {len(names)}")
            table.append(cells)
    except RecordError:
        raise
    except (TypeError, ValueError) as e:
        raise RecordError(f"table {key!r}: {e}; expected a list of column names and a list of rows") from e
    return Table(key, names, table)


def read_key(key: Any) -> str:
    """Return a key as a plain str, as ``key_text`` does.

    Raises:
        RecordError: it can be no key, or ``trackhub.records.key_problem`` finds a problem.
    """
    plain = key_text(key)
    if problem := key_problem(plain):
        raise RecordError(f"key {shown(plain)} {problem}")
    return plain


def read_step(step: Any) -> int | None:
    """Return a step as a plain int; None stays None.

    Raises:
        WrongCallError: it is not a whole number from 0 to ``MAX_STEP``.
    """
    if step is None:
        return None
    try:
        value = _whole(step)
    except Exception as e:
        raise WrongCallError(
            f"step {shown(step)} is a {type(step).__name__}; expected a whole number >= 0, or None"
        ) from e
    if not 0 <= value <= MAX_STEP:
        raise WrongCallError(f"step {shown(value)} is out of range; expected 0 to {MAX_STEP}, or None")
    return value


def _whole(step: Any) -> int:
    """Return a whole number as a plain int: an int, a float, or a numpy or torch value. Raise for anything else."""
    if isinstance(step, bool | str | bytes | bytearray):
        raise TypeError
    try:
        return operator.index(step)
    except TypeError:
        number = float(step)
        if not number.is_integer():
            raise
        return int(number)


def _read_cached_key(key: Any, known_keys: set[str]) -> str:
    if type(key) is str and key in known_keys:
        return key
    checked = read_key(key)
    if len(known_keys) < _KNOWN_KEYS_MAX:
        known_keys.add(checked)
    return checked


def _read_cell(what: str, key: str, value: Any, bad: BadValues) -> Any:
    """Return a cell. If it cannot be stored, add it to ``bad`` and return None."""
    try:
        cell = plain_param(what, key, value)
        if isinstance(cell, list | dict):
            cell = plain_text(what, key, str(cell))
        if isinstance(cell, str) and (problem := value_problem(cell)):
            raise RecordError(f"{what} {key!r}: {problem}")
    except Exception as e:  # noqa: BLE001  # a foreign value may raise anything
        bad.add(what, key, e)
        return None
    return cell


def _count_values(key: str, values: Any, bins: Any, bad: BadValues) -> tuple[list[float], list[float]]:
    import numpy as np  # imported late: the rest of the writer works without NumPy

    try:
        array = array_of(values)
        array = array.compressed() if isinstance(array, masked_arrays().MaskedArray) else array
        if not holds_numbers(array):
            raise TypeError(f"the values are of the type {array.dtype}")
        array = array.astype(np.float64).ravel()
        finite = array[np.isfinite(array)]
        if array.size and not finite.size:
            raise ValueError("none of the values is finite")
    except (ValueError, TypeError) as e:
        raise RecordError(f"histogram {key!r}: {e}; expected an array of numbers, at least one of them finite") from e
    if left_out := array.size - finite.size:
        bad.add(
            "histogram",
            key,
            RecordError(
                f"histogram {key!r}: {left_out} of {array.size} values are not finite; the histogram leaves them out"
            ),
        )
    return _equal_bins(finite, _read_bins(key, bins))


def _read_bins(key: str, bins: Any) -> int:
    try:
        number = _whole(bins)
    except (ValueError, TypeError) as e:
        raise_if_from_signal_handler(e)
        number = 0
    if not 1 <= number <= _MAX_BINS:
        raise RecordError(f"histogram {key!r}: bins {shown(bins)}; expected a whole number from 1 to {_MAX_BINS}")
    return number


def _equal_bins(finite: Any, bins: int) -> tuple[list[float], list[float]]:
    """Return edges and counts. There are fewer bins if too few floats lie between the lowest and the highest value."""
    import numpy as np

    edges: Any = ()
    try:
        with np.errstate(all="ignore"):
            counts, edges = np.histogram(finite, bins)
    except ValueError as e:  # the values are too close to each other, or too far apart
        raise_if_from_signal_handler(e)
    if not len(edges) or not np.isfinite(edges).all():
        largest = np.finfo(np.float64).max
        low, high = finite.min(), finite.max()
        if low == high:
            with np.errstate(over="ignore"):
                low, high = np.clip(np.nextafter(low, (-np.inf, np.inf)), -largest, largest)
        part = np.linspace(0.0, 1.0, bins + 1)
        with np.errstate(over="ignore"):
            edges = np.unique(np.clip(low * (1.0 - part) + high * part, low, high))
        counts, edges = np.histogram(finite, edges)
    return edges.tolist(), counts.astype(np.float64).tolist()
