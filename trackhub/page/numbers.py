# SPDX-License-Identifier: Apache-2.0
"""How the report page writes numbers, times and sizes. The templates use these functions as filters."""

from __future__ import annotations

import math
import time

__all__ = ["duration", "moment", "number", "size"]


def number(value: float | None) -> str:
    """Return a number with five significant digits, such as ``0.58721`` or ``1.2e-07``; an integer whole."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return f"{int(value):,}" if value == int(value) and abs(value) < 1e9 else f"{value:.5g}"


def duration(seconds: float | None) -> str:
    """Return a duration such as ``3.2 s``, ``4 min 10 s`` or ``2 h 5 min``."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def moment(unix_s: float) -> str:
    """Return a time such as ``2026-01-31 09:05 UTC``; empty for 0, which stands for none."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s)) if unix_s else ""


def size(count: int) -> str:
    """Return a number of bytes such as ``12 kB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:,.1f} GB"
