# SPDX-License-Identifier: Apache-2.0
"""Computes mean, spread and count of some numbers. `trackhub.delivery.federation.aggregation` calls it.

The numbers are those of the sites for one key and one round. Any float may be among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["describe"]


def describe(values: Sequence[float], weights: Sequence[float | None] = ()) -> dict[str, float]:
    """Return mean, min, max, std and count of the finite values, and how many are not finite.

    ``std`` is the standard deviation of the population, as ``numpy.std`` computes it. ``nonfinite`` is left out if it
    is 0. ``weighted_mean`` is left out unless each finite value has a usable weight and the weights' sum is finite and
    above 0. If there is no finite value, only the counts are returned.

    Args:
        values: one for each site.
        weights: one for each value, None where it is not known; or no weights at all.
    """
    finite = [v for v in values if math.isfinite(v)]
    found: dict[str, float] = {}
    if finite:
        n = len(finite)
        mean = _mean(finite)
        found = {"mean": mean, "min": min(finite), "max": max(finite)}
        found["std"] = math.hypot(*(v - mean for v in finite)) / math.sqrt(n)  # squares would overflow above 1e154
        if weights:
            weighted = _weighted_mean([(v, w) for v, w in zip(values, weights, strict=True) if math.isfinite(v)])
            found |= {} if weighted is None else {"weighted_mean": weighted}
    found["count"] = float(len(finite))
    if len(finite) < len(values):
        found["nonfinite"] = float(len(values) - len(finite))
    return found


def _mean(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # only the sum is above the largest float
        return math.fsum(v / len(values) for v in values)


def _weighted_mean(pairs: Sequence[tuple[float, float | None]]) -> float | None:
    usable = [(v, w) for v, w in pairs if w is not None and math.isfinite(w) and w >= 0]
    if len(usable) < len(pairs):
        return None
    try:
        total = math.fsum(w for _, w in usable)
        return math.fsum(v * (w / total) for v, w in usable) if total > 0 else None
    except OverflowError:
        return None
