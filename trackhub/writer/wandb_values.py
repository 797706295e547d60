# SPDX-License-Identifier: Apache-2.0
"""Logs what ``wandb.log`` takes: numbers as one record, and figures, texts and W&B's own types as one record each.

`WandBWriter` and the tracker for Accelerate call it. It calls `trackhub.Writer`. It recognises W&B's types by their
names, and does not import W&B.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

from trackhub.errors import SpoolError
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.writer.bad_values import BadValues
from trackhub.writer.bounded_reading import Budget
from trackhub.writer.convert_figures_and_tables import table_of
from trackhub.writer.nested_mappings import pairs_of
from trackhub.writer.plain_values import require_new
from trackhub.writer.writer import Writer

__all__ = ["log_values"]

_Call = Callable[[Writer, str, Any], None]


def log_values(writer: Writer, values: Any, step: Any = None) -> None:
    """Log the values of a mapping, each as the kind of record that it is. Nested mappings get keys such as ``a/b``.

    Args:
        writer: the writer to log with.
        values: the mapping.
        step: the step.

    Raises:
        RecordError, SpoolError: only if the writer is strict, as for ``Writer.log``.
    """
    if writer._spool is None:
        return
    bad = BadValues(strict=writer._strict)
    numbers: dict[str, Any] = {}
    calls: dict[str, _Call] = {}
    try:
        if not isinstance(values, Mapping) or all(issubclass(type(value), int | float) for value in values.values()):
            writer.log(values, step)
            return
        for key, value in pairs_of("log", values, bad):
            _sort_out(key, value, numbers, calls, bad)
    except Exception as e:  # noqa: BLE001  # a foreign mapping may raise anything
        writer._drop_call("log", e)
        return
    writer._note_left_out("log", bad, has_rest=bool(numbers or calls))
    for key, call in calls.items():
        _log_one(call, writer, key, step)
    writer.log(numbers, step)


def _log_one(call: _Call, writer: Writer, key: str, step: Any) -> None:
    """Log one value. If it cannot be read, count it as dropped.

    Args:
        call: logs the value. A foreign value is read only now, and may raise anything.
        writer: the writer to log with.
        key: the value's key.
        step: the step.

    Raises:
        RecordError, SpoolError: only if the writer is strict.
    """
    try:
        call(writer, key, step)
    except SpoolError:  # the writer is strict and closed
        raise
    except Exception as e:  # noqa: BLE001  # a foreign value may raise anything
        bad = BadValues(strict=writer._strict)
        bad.add("value", key, e)
        writer._note_left_out("log", bad, has_rest=False)


def _sort_out(key: str, value: Any, numbers: dict[str, Any], calls: dict[str, _Call], bad: BadValues) -> None:
    """Put a value into ``numbers`` or ``calls``.

    A value of an unknown type goes into ``numbers``: ``Writer.log`` then counts it.

    Args:
        key: the key.
        value: its value.
        numbers: gets it if it may be a number.
        calls: gets the call that logs it, if there is one.
        bad: gets it if its key came before.
    """
    try:
        require_new(key, ChainMap[str, Any](numbers, calls))
    except Exception as e:  # noqa: BLE001  # `add` raises the error of a signal handler again
        bad.add("value", key, e)
        return
    try:
        call = _call_for(value)
    except Exception as e:  # noqa: BLE001  # a foreign value may raise anything
        raise_if_from_signal_handler(e)
        call = None
    if call is None:
        numbers[key] = value
    else:
        calls[key] = call


def _call_for(value: Any) -> _Call | None:
    """Return the function that logs this value. None if the value is a number, or of an unknown type."""
    if value is None or isinstance(value, int | float):
        return None
    if isinstance(value, str):
        return lambda writer, key, step: writer.log_text(key, value, step)
    if hasattr(value, "savefig") or (hasattr(value, "to_plotly_json") and hasattr(value, "to_html")):
        return lambda writer, key, step: writer.log_figure(key, value, step)
    if isinstance(value, list | tuple):
        return _call_for_list(value)
    if (image := _image(value)) is not None:
        return lambda writer, key, step: writer.log_image(key, image[0], step, image[1])
    if hasattr(value, "iter_rows") or hasattr(value, "itertuples"):  # a DataFrame of polars or pandas
        return lambda writer, key, step: _log_table(writer, key, *table_of(value), step)
    if hasattr(value, "dtype") and math.prod(getattr(value, "shape", ())) != 1:  # an array; W&B makes a histogram too
        return lambda writer, key, step: writer.log_histogram(key, value, step)
    return _call_for_wandb(value)


def _call_for_list(values: list[Any] | tuple[Any, ...]) -> _Call | None:
    """Return the function that logs each value under a key such as ``<key>/0``.

    None if there is no value, or if one of them is a text, a number or of an unknown type.
    """
    known: list[_Call] = []
    for one in values:
        call = None if isinstance(one, str) else _call_for(one)
        if call is None:  # asked one by one: a list of a million numbers takes seconds otherwise
            return None
        known.append(call)
    if not known:
        return None

    def log_each(writer: Writer, key: str, step: Any) -> None:
        for i, call in enumerate(known):
            _log_one(call, writer, f"{key}/{i}", step)

    return log_each


def _call_for_wandb(value: Any) -> _Call | None:
    """Return the function that logs a value of one of W&B's own types. None if it is of none of them."""
    if not _is_of_wandb(value):
        return None
    match type(value).__name__:
        case "Histogram":
            return lambda writer, key, step: writer.log_histogram(
                key, step=step, edges=value.bins, counts=value.histogram
            )
        case "Table":
            return lambda writer, key, step: _log_table(writer, key, value.columns, value.data, step)
        case "CustomChart":  # of wandb.plot: the table that it draws
            return lambda writer, key, step: _log_table(writer, key, value.table.columns, value.table.data, step)
        case "Html":
            return lambda writer, key, step: writer.log_text(key, value.html, step)
    return None


def _log_table(writer: Writer, key: str, columns: Any, rows: Any, step: Any) -> None:
    """Log a table. A cell with an image or the like gets a record of its own, and becomes the key of that record.

    Args:
        writer: the writer to log with.
        key: the table's key.
        columns: the names of the columns.
        rows: the rows of cells.
        step: the step.
    """
    plain = []
    budget = Budget(f"table {key!r}")
    for i, row in enumerate(Budget(f"table {key!r}", unit="rows").each(rows)):
        cells = list(budget.each(row))
        for j, cell in enumerate(cells):
            if _is_of_wandb(cell) and (call := _call_for(cell)) is not None:
                cells[j] = f"{key}/{i}/{columns[j]}"
                _log_one(call, writer, cells[j], step)
        plain.append(cells)
    writer.log_table(key, columns, plain, step)


def _image(value: Any) -> tuple[Any, str] | None:
    """Return the pixels and the caption of an image of Pillow or W&B. None if the value is not an image."""
    kind = type(value)
    if str(kind.__module__).startswith("PIL."):
        return value, ""
    if _is_of_wandb(value) and kind.__name__ == "Image":
        return value.image, "" if value._caption is None else str(value._caption)
    return None


def _is_of_wandb(value: Any) -> bool:
    return str(type(value).__module__).startswith("wandb.")
