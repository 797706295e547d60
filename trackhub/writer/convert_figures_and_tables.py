# SPDX-License-Identifier: Apache-2.0
"""Converts figures, images, histograms, curves and tables of other libraries into values that `trackhub.Writer` takes.

The adapters and the writer call it. Each function may raise whatever a foreign object raises, and the caller counts the
log call as dropped. A function that needs NumPy imports it when it is called: a script that passes an array has NumPy.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.writer.bounded_reading import Budget
from trackhub.writer.plain_values import array_of, masked_arrays

__all__ = [
    "as_torch_grid",
    "as_torch_image",
    "chosen_columns",
    "close_figure",
    "figure_png",
    "histogram_of_buckets",
    "pr_curve",
    "table_of",
]

_GRID_COLUMNS = 8  # as torch's SummaryWriter.add_images
_MAX_CHANNELS = 4
_SMALLEST_COUNT = 1e-7  # as in torch: what a sum of 0 is divided by
_PR_COLUMNS = ("threshold", "tp", "fp", "tn", "fn", "precision", "recall")


def figure_png(figure: Any, save_kwargs: Mapping[str, Any] | None = None) -> bytes:
    """Return a figure of matplotlib or plotly as the bytes of a PNG file.

    Args:
        figure: has ``savefig``, as matplotlib's figures, or ``to_image``, as plotly's.
        save_kwargs: further arguments of that method.

    Raises:
        TypeError: this is not a figure.
    """
    more = {name: value for name, value in (save_kwargs or {}).items() if name != "format"}
    if hasattr(figure, "savefig"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", **more)
        return buffer.getvalue()
    if hasattr(figure, "to_image"):
        return bytes(figure.to_image(format="png", **more))
    raise TypeError(f"a {type(figure).__name__} is not a figure; expected one of matplotlib or plotly")


def close_figure(figure: Any) -> None:
    """Close a figure of matplotlib, so that pyplot does not keep it. Leaves anything else as it is."""
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None and hasattr(figure, "savefig"):
        try:
            pyplot.close(figure)
        except Exception as e:  # noqa: BLE001  # the image is what matters
            raise_if_from_signal_handler(e)


def as_torch_image(image: Any, dataformats: str | None) -> Any:
    """Return an image as an array ``[H, W, C]`` or ``[H, W]``, for an adapter whose callers name the axes.

    `trackhub.writer.images` reads the axes from the shape: it prefers channels last, and torch prefers them first.

    Args:
        image: an array or tensor.
        dataformats: the names of its axes, such as ``CHW``. None means ``CHW``, as in torch, if the image has three
            axes and the first has 1 to 4 entries. Any other image is returned as it is.

    Raises:
        ValueError: the array has another number of axes.
    """
    if dataformats is None:
        shape: Sequence[int] = getattr(image, "shape", ())
        if len(shape) != 3 or not 1 <= shape[0] <= _MAX_CHANNELS:
            return image
        dataformats = "CHW"
    array, axes = _unmasked(image), dataformats.upper()
    if len(axes) != array.ndim:
        raise ValueError(f"the shape {list(array.shape)} does not fit dataformats={dataformats!r}; name each axis once")
    return array.transpose([axes.index(axis) for axis in "HWC" if axis in axes])


def as_torch_grid(batch: Any, dataformats: str = "NCHW") -> Any:
    """Return a batch of images of one size as one image, in rows of eight and without gaps, as torch does.

    Args:
        batch: an array or tensor.
        dataformats: the names of its axes. Without ``N``, ``batch`` is one image.

    Raises:
        ValueError: the array has another number of axes, or no image.
    """
    import numpy as np

    array, axes = _unmasked(batch), dataformats.upper()
    if "N" not in axes:
        return as_torch_image(array, axes)
    if len(axes) != array.ndim or not array.shape[axes.index("N")]:
        raise ValueError(f"the shape {list(array.shape)} does not fit dataformats={dataformats!r}, or has no image")
    images = array.transpose([axes.index(axis) for axis in "NHWC" if axis in axes])
    columns = min(len(images), _GRID_COLUMNS)
    rows = math.ceil(len(images) / columns)
    images = np.concatenate([images, np.zeros_like(images[:1]).repeat(rows * columns - len(images), axis=0)])
    return np.concatenate([np.concatenate(images[i * columns : (i + 1) * columns], axis=1) for i in range(rows)])


def _unmasked(image: Any) -> Any:
    """Return an array of pixels. Masked ones become black, as in `Writer.log_image`."""
    return masked_arrays().filled(array_of(image), 0)


def histogram_of_buckets(
    low: float, limits: Sequence[float], counts: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return the edges and counts of a histogram, from the form in which TensorBoard stores it.

    Args:
        low: the smallest value that was counted.
        limits: the right limit of each bucket.
        counts: how many values are in each bucket.
    """
    rights = [float(limit) for limit in Budget("the buckets").each(limits)]
    first = float(low) if low < rights[0] else math.nextafter(rights[0], -math.inf)
    return [first, *rights], [float(count) for count in Budget("the buckets").each(counts)]


def pr_curve(
    labels: Any, predictions: Any, num_thresholds: int = 127, weights: Any = None
) -> tuple[tuple[str, ...], list[list[float]]]:
    """Return a precision-recall curve as the columns and rows of a table, one row for each threshold.

    Args:
        labels: for each example, 1 or True if it is positive, or how probable that is.
        predictions: the probability that each example is positive, 0 to 1.
        num_thresholds: how many thresholds between 0 and 1, both included; at most 127.
        weights: the weight of each example; None for 1.
    """
    import numpy as np

    positive = array_of(labels).astype(float).ravel()
    weight = np.broadcast_to(1.0 if weights is None else array_of(weights).astype(float).ravel(), positive.shape)
    count = min(int(num_thresholds), 127)
    # As compute_curve of torch 2.14: a prediction counts for all thresholds up to the one below it.
    below = np.floor(array_of(predictions).ravel() * (count - 1)).astype(np.int32)
    tp, fp = (
        np.histogram(below, bins=count, range=(0, count - 1), weights=part * weight)[0][::-1].cumsum()[::-1]
        for part in (positive, 1.0 - positive)
    )
    tn, fn = fp[0] - fp, tp[0] - tp
    precision, recall = (tp / np.maximum(_SMALLEST_COUNT, tp + other) for other in (fp, fn))
    rows = np.stack([np.linspace(0.0, 1.0, count), tp, fp, tn, fn, precision, recall], axis=1).tolist()
    return _PR_COLUMNS, rows


def table_of(data: Any) -> tuple[list[str], Iterable[Sequence[Any]]]:
    """Return the columns and rows of a DataFrame, of a mapping of columns, or of a list of mappings.

    The labels of the rows become the first columns, unless they have no name and only number the rows. Labels come from
    a pandas index, or from columns that are Series or mappings of label to cell.

    Raises:
        TypeError: this is not a table.
        ValueError: the columns are not equally long.
    """
    if hasattr(data, "to_frame") and not hasattr(data, "columns"):  # a Series
        data = data.to_frame()
    if hasattr(data, "iter_rows"):  # polars
        return list(map(str, data.columns)), data.iter_rows()
    if hasattr(data, "itertuples"):
        return _table_of_pandas(data)
    if (
        isinstance(data, Sequence)
        and data
        and all(isinstance(row, Mapping) for row in Budget("the table", unit="rows").each(data))
    ):
        names = list(dict.fromkeys(name for row in data for name in row))
        return list(map(str, names)), [[row.get(name) for name in names] for row in data]
    if isinstance(data, str | bytes) or not hasattr(data, "__getitem__") or not hasattr(data, "keys"):
        raise TypeError(f"a {type(data).__name__} is not a table")
    return _table_of_columns([(str(name), data[name]) for name in data])


def chosen_columns(names: Sequence[Any], data: Any) -> Iterable[Any]:
    """Return rows with one cell for each of these columns.

    Args:
        names: the columns. If a whole table has all of these, they are chosen. If it has as many columns with other
            names, its columns get these names.
        data: a whole table as for ``table_of``, or rows: each a sequence of cells or a mapping of column to cell.

    Raises:
        TypeError: ``data`` is neither.
        ValueError: the table has other columns.
    """
    if not any(hasattr(data, name) for name in ("keys", "to_frame", "iter_rows", "itertuples")):
        return ([row.get(name) for name in names] if isinstance(row, Mapping) else row for row in data)
    found, rows = table_of(data)
    wanted = list(map(str, names))
    if wanted == found:
        return rows
    if set(wanted) <= set(found):
        places = [found.index(name) for name in wanted]
        return ([row[place] for place in places] for row in rows)
    if len(found) != len(wanted):
        raise ValueError(f"the table has the columns {found}; expected {wanted}")
    return rows


def _table_of_pandas(frame: Any) -> tuple[list[str], Iterable[Sequence[Any]]]:
    columns, rows = list(map(str, frame.columns)), frame.itertuples(index=False, name=None)
    if _only_number_rows(frame.index, len(frame)) and frame.index.name is None:
        return columns, rows
    count = frame.index.nlevels
    names = ["index" if count == 1 else f"level_{i}" for i in range(count)]
    names = [own if name is None else str(name) for own, name in zip(names, frame.index.names, strict=True)]
    for i in range(count):
        while names[i] in columns or names[i] in names[:i]:
            names[i] += "_index"
    labels = zip(*(frame.index.get_level_values(i) for i in range(count)), strict=True)
    return names + columns, ((*label, *row) for label, row in zip(labels, rows, strict=True))


def _table_of_columns(columns: list[tuple[str, Any]]) -> tuple[list[str], Iterable[Sequence[Any]]]:
    """Return a table of columns that are sequences, or have a label for each cell. A single value stands in each row.

    Cells with the same label come into one row, as in pandas.
    """
    own = [_labels_of(column) for _, column in columns]
    lists = [found for found in own if found is not None]
    is_same = all(found == lists[0] for found in lists)
    labels = lists[0] if lists and is_same else list(dict.fromkeys(label for found in lists for label in found))
    whole = [
        _cells(column, found, None if is_same else labels) for (_, column), found in zip(columns, own, strict=True)
    ]
    lengths = {len(cells) for cells in whole if cells is not None}
    if len(lengths) > 1:
        raise ValueError(f"the columns have {sorted(lengths)} cells; expected as many in each")
    size = lengths.pop() if lengths else min(1, len(columns))
    filled = [[column] * size if cells is None else cells for (_, column), cells in zip(columns, whole, strict=True)]
    names = [name for name, _ in columns]
    label_name = next((name for _, column in columns if (name := _name_of_labels(column)) is not None), None)
    if labels and (label_name is not None or not _only_number_rows(labels, size)):
        label_name = "index" if label_name is None else label_name
        if label_name in names:
            label_name = "row_index" if label_name == "index" else f"{label_name}_index"
        filled, names = [labels, *filled], [label_name, *names]
    return names, zip(*filled, strict=True)


def _labels_of(column: Any) -> list[Any] | None:
    """Return the label of each cell of a column that is a mapping or a Series of pandas; None for any other column."""
    if isinstance(column, Mapping):
        return list(column)
    return list(column.index) if _is_pandas_series(column) else None


def _name_of_labels(column: Any) -> str | None:
    """Return what the labels of a Series of pandas are called. None if they have no name, or it is no such Series."""
    name = column.index.name if _is_pandas_series(column) else None
    return None if name is None else str(name)


def _is_pandas_series(column: Any) -> bool:
    return hasattr(column, "to_frame") and hasattr(column, "index") and not callable(column.index)


def _only_number_rows(labels: Any, size: int) -> bool:
    """Return whether the labels are 0, 1, 2, ... up to the number of rows."""
    return len(labels) == size and all(_is_whole(label) and label == i for i, label in enumerate(labels))


def _is_whole(label: Any) -> bool:
    return type(label) is int or getattr(getattr(label, "dtype", None), "kind", "") in ("i", "u")


def _cells(column: Any, own: list[Any] | None, labels: list[Any] | None) -> list[Any] | None:
    """Return the cells of a column. None if it is a single value.

    Args:
        column: the column.
        own: the label of each cell, if it has labels.
        labels: the labels of the rows; None if they are the column's own.

    Raises:
        ValueError: a label comes twice, so the column does not say which cell belongs into which row.
    """
    if own is not None:
        cells = list(column.values()) if isinstance(column, Mapping) else list(column)
        if labels is None:
            return cells
        found = dict(zip(own, cells, strict=True))
        if len(found) < len(own):
            raise ValueError("a label comes twice in a column, and another column has other labels")
        return [found.get(label) for label in labels]
    is_single = (
        isinstance(column, str | bytes) or not hasattr(column, "__iter__") or getattr(column, "shape", None) == ()
    )
    return None if is_single else list(Budget("a column").each(column))
