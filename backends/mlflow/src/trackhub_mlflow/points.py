# SPDX-License-Identifier: Apache-2.0
"""Metric values as MLflow's points, made so that no two logged values become one.

`MLflowRun` has one `PointMaker` and asks it for the point of every value that a site logged.
"""

from __future__ import annotations

import math
import sys

from trackhub_mlflow.store import Point

__all__ = ["PointMaker", "milliseconds"]

_REMEMBERED = 20_000
_LARGEST = sys.float_info.max

_Identity = tuple[str, int, float | str, int]


def milliseconds(time: float) -> int:
    """Return unix seconds as whole milliseconds, rounded down as MLflow's own client does."""
    return max(0, int(time * 1000 + 0.0005))  # a float does not hold 1.7e9 and three decimals exactly


class PointMaker:
    """Makes the points of one run.

    MLflow tells points apart by key, step, value and millisecond. If a point agrees in all four with a stored one,
    MLflow takes it for the stored point and drops it. If two records agree in all four, the later one gets a time one
    millisecond later. It gets the same time on every delivery, because the lane hands over records in the same order.
    """

    def __init__(self) -> None:
        """Start without points."""
        self._owners: dict[_Identity, int] = {}

    def forget_old(self) -> None:
        """Forget points of long ago, so that memory stays bounded. Call it between batches."""
        if len(self._owners) > _REMEMBERED:
            self._owners = dict(list(self._owners.items())[-_REMEMBERED // 2 :])

    def point(self, position: int, key: str, value: float, time_ms: int, step: int) -> Point:
        """Return the point for one value of a record.

        Args:
            position: the record's position in its run.
            key: the metric's name.
            value: a number. Infinity becomes the largest finite number, as in MLflow's SQL store.
            time_ms: the time of the log call, in milliseconds since 1970, UTC.
            step: the step, >= 0.
        """
        if math.isinf(value):
            value = math.copysign(_LARGEST, value)
        comparable = "NaN" if value != value else value
        while self._owners.setdefault((key, step, comparable, time_ms), position) != position:
            time_ms += 1
        return Point(key, value, time_ms, step)
