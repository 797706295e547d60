# SPDX-License-Identifier: Apache-2.0
"""Keeps a curve of any length in a fixed number of points, so that its lowest and highest values stay.

`trackhub.page.collect` has one `Series` for each key of a site. A series is divided into buckets of equal length, and
the lowest and the highest point of each are kept. `trackhub.page.render` thins a page with many curves once more.
"""

from __future__ import annotations

import math
from array import array
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curve", "Series", "keep_extremes"]

_CHUNK = 4096
_MAX_BUCKETS = 2048
_FIELDS = 4  # number in the series, step, time, value
_STEP, _TIME, _VALUE = 1, 2, 3

Array = NDArray[np.float64]


class Curve(NamedTuple):
    """The points of a series that are kept, in the order in which they were logged. A step may be NaN."""

    step: Array
    time: Array
    value: Array


class Series:
    """One key of one site. Takes the same memory for a thousand points and for a billion.

    Attributes:
        count: how many values were added.
        nonfinite: how many of them are NaN or infinite. They are in no curve.
        by_round: the last value of each round, up to `MAX_ROUNDS` rounds.
        first, last: the first and the last value, also if they are not finite.
        low, high: the lowest and the highest finite value; infinities if there is none.
    """

    MAX_ROUNDS = 5000

    __slots__ = (
        "_buckets", "_chunks", "_ends", "_pending", "_size",
        "by_round", "count", "first", "high", "last", "low", "nonfinite",
    )  # fmt: skip

    def __init__(self) -> None:
        """Start empty."""
        self._pending = array("d")
        self._buckets: Array = np.empty((0, 2, _FIELDS))
        self._size = 1  # points in a bucket, a power of two
        self._chunks = 0
        self._ends: tuple[tuple[float, ...], ...] = ()  # the first and the last point: they need not be extremes
        self.count = self.nonfinite = 0
        self.by_round: dict[int, float] = {}
        self.first = self.last = math.nan
        self.low, self.high = math.inf, -math.inf

    def add(self, step: int | None, round_: int | None, time: float, value: float) -> None:
        """Add a value.

        Args:
            step: its step.
            round_: its round.
            time: unix seconds of its log call.
            value: may be NaN or infinite.
        """
        if not self.count:
            self.first = value
        self.count += 1
        self.last = value
        if round_ is not None and (len(self.by_round) < self.MAX_ROUNDS or round_ in self.by_round):
            self.by_round[round_] = value
        if not math.isfinite(value):
            self.nonfinite += 1
            return
        self.low, self.high = min(self.low, value), max(self.high, value)
        point = (self.count - 1, math.nan if step is None else step, time, value)
        self._ends = (self._ends[0], point) if self._ends else (point, point)
        self._pending.extend(point)
        if len(self._pending) == _CHUNK * _FIELDS:
            self._fold()

    def _fold(self) -> None:
        """Reduce the pending points to the extremes of their buckets."""
        points = np.frombuffer(self._pending, dtype=np.float64).reshape(-1, _FIELDS).copy()
        self._pending = array("d")
        groups = max(1, _CHUNK // self._size)
        found = _extremes(points.reshape(groups, -1, _FIELDS))
        if self._size > _CHUNK and self._chunks % (self._size // _CHUNK):  # the last bucket is not full yet
            self._buckets[-1] = _extremes(np.concatenate([self._buckets[-1], found[0]])[None])[0]
        else:
            self._buckets = np.concatenate([self._buckets, found])
        self._chunks += 1
        while len(self._buckets) >= _MAX_BUCKETS and len(self._buckets) % 2 == 0:
            self._buckets = _extremes(self._buckets.reshape(len(self._buckets) // 2, -1, _FIELDS))
            self._size *= 2

    def curve(self, max_points: int) -> Curve:
        """Return the curve with at most this many points. The first, last, lowest and highest value are among them.

        Args:
            max_points: 8 or more.
        """
        pending = np.frombuffer(self._pending, dtype=np.float64).reshape(-1, _FIELDS)
        ends = np.array(self._ends, dtype=np.float64).reshape(-1, _FIELDS)
        points = np.concatenate([self._buckets.reshape(-1, _FIELDS), pending, ends])
        points = points[np.unique(points[:, 0], return_index=True)[1]]  # one value may be both extremes
        points = points[keep_extremes(points[:, _VALUE], max_points, points[:, 0])]
        return Curve(points[:, _STEP], points[:, _TIME], points[:, _VALUE])


def _extremes(groups: Array) -> Array:
    """Return the lowest and the highest point of each group.

    The shape changes from groups x points x fields to groups x 2 x fields.
    """
    values = groups[:, :, _VALUE]
    rows = np.arange(len(groups))
    return np.stack([groups[rows, values.argmin(axis=1)], groups[rows, values.argmax(axis=1)]], axis=1)


def keep_extremes(values: Array, max_points: int, numbers: Array | None = None) -> NDArray[np.intp]:
    """Return the indices of the values to draw: the lowest and highest of each stretch, and the first and last of all.

    Args:
        values: finite.
        max_points: how many at most; 8 or more.
        numbers: the index of each value in the whole series, rising, if some values are missing already. All
            stretches are equally long, measured in these indices.
    """
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    numbers = np.arange(count, dtype=np.float64) if numbers is None else numbers
    stretches = (max_points - 2) // 2
    limits = np.searchsorted(numbers, np.linspace(numbers[0], numbers[-1] + 1, stretches + 1)).tolist()
    found: list[int] = [0, count - 1]
    for start, end in pairwise(limits):
        if start < end:
            part = values[start:end]
            found += [start + int(part.argmin()), start + int(part.argmax())]
    return np.unique(np.array(found))
