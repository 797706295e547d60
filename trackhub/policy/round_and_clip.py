# SPDX-License-Identifier: Apache-2.0
"""Makes numbers less precise: rounds them to significant digits, and clips them to a range.

`trackhub.policy.judge` calls it for single numbers and for histograms. A result never has more digits than allowed.
Only the bounds of a range may have more, since they reveal nothing about the data.
"""

from __future__ import annotations

import math
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Context
from typing import TypeVar

__all__ = ["clipped", "merged_histogram", "rounded"]

_MIN_INT, _MAX_INT = -(1 << 63), (1 << 64) - 1  # what a record can hold
_Number = TypeVar("_Number", int, float)


def rounded(value: _Number, digits: int) -> _Number:
    """Return the number rounded to this many significant digits, as the nearest number that can be stored.

    NaN and infinities stay as they are.
    """
    if not math.isfinite(value):
        return value
    number: float
    if isinstance(value, int):
        number = int(Context(prec=digits, rounding=ROUND_HALF_EVEN).create_decimal(value))
        is_too_large = not _MIN_INT <= number <= _MAX_INT
    else:
        number = float(f"{value:.{digits - 1}e}")  # this also rounds half to even, and takes a tenth of the time
        is_too_large = not math.isfinite(number)
    return type(value)(Context(prec=digits, rounding=ROUND_DOWN).create_decimal(value) if is_too_large else number)


def clipped(value: float, low: float, high: float) -> float:
    """Return the number, or the nearest bound if it is outside the range. NaN stays NaN.

    Args:
        value: the number.
        low, high: the range.
    """
    if value < low:
        return low
    return high if value > high else value


def merged_histogram(edges: list[float], counts: list[float]) -> tuple[list[float], list[float]] | None:
    """Return a histogram without empty ranges: the count of a bin whose two edges are the same goes to its neighbour.

    Args:
        edges: the limits of the bins, not falling. Rounding and clipping may have made some of them the same.
        counts: the count of each bin.

    Returns:
        The new edges, which rise, and their counts. None if there is no range at all.
    """
    new_edges, new_counts, carried = edges[:1], [], 0.0
    for edge, count in zip(edges[1:], counts, strict=True):
        if edge > new_edges[-1]:
            new_edges.append(edge)
            new_counts.append(count + carried)
            carried = 0.0
        elif new_counts:
            new_counts[-1] += count
        else:
            carried += count
    return (new_edges, new_counts) if new_counts else None
