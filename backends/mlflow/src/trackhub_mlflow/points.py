# SPDX-License-Identifier: Apache-2.0
"""Metric values as MLflow stores them, where no two logged points may become one."""

from __future__ import annotations

import math
import sys

from trackhub_mlflow.store import Point

__all__ = ["PointMaker", "milliseconds"]

_REMEMBERED = 20_000
_LARGEST = sys.float_info.max

_Identity = tuple[str, int, float | str, int]


def milliseconds(time: float) -> int:
    """Return whole milliseconds of unix seconds, rounded down as MLflow's own client does."""
    return max(0, int(time * 1000 + 0.0005))  # 1.7e9 and three decimals are not exact in a float


class PointMaker:
    """Makes a run's points.

    MLflow keeps points apart by key, step, value and millisecond, and takes one that agrees in all four for the same
    one sent again. Where two records agree in all, the later one is stored a millisecond later; and so again when it
    is handed over again, since records come in the same order.
    """

    def __init__(self) -> None:
        """Begin with nothing remembered."""
        self._owners: dict[_Identity, int] = {}

    def forget_old(self) -> None:
        """Forget points of long ago; call it between batches."""
        if len(self._owners) > _REMEMBERED:
            self._owners = dict(list(self._owners.items())[-_REMEMBERED // 2 :])

    def point(self, position: int, key: str, value: float, time_ms: int, step: int) -> Point:
        """Return the point for one value of the record at this position."""
        if math.isinf(value):
            value = math.copysign(_LARGEST, value)  # as MLflow's SQL store does, which has no infinity
        comparable = "NaN" if value != value else value
        while self._owners.setdefault((key, step, comparable, time_ms), position) != position:
            time_ms += 1
        return Point(key, value, time_ms, step)
