# SPDX-License-Identifier: Apache-2.0
"""How long the upload of an artifact may take, by the rate of earlier uploads.

`RestStore` asks before each upload, and reports the result. A proxy may take the whole file at once and pass it on
slowly, so a long silence need not be an error. The lane uploads files beside metrics, so a long wait delays no metrics.
"""

from __future__ import annotations

__all__ = ["UploadLimit"]

_FIRST_RATE = 64 << 10  # bytes per second: a slow network, until the first upload
_LOWEST_RATE = 1 << 10
_SLACK = 4.0  # an upload may be this many times as slow as the last one
_MIN_BYTES = 256 << 10  # a smaller file says nothing about the rate


class UploadLimit:
    """The time limit of uploads to one server. Two threads may use it. They share one rate."""

    def __init__(self) -> None:
        """Start with the rate of a slow network."""
        self._rate = float(_FIRST_RATE)

    def seconds(self, size: int) -> float:
        """Return how long the upload of this many bytes may take."""
        return size / self._rate

    def succeeded(self, size: int, took_s: float) -> None:
        """Learn the rate from an upload that went through."""
        if size >= _MIN_BYTES:
            self._rate = max(_LOWEST_RATE, size / max(took_s, 1e-3) / _SLACK)

    def timed_out(self) -> None:
        """Allow twice the time from now on."""
        self._rate = max(_LOWEST_RATE, self._rate / 2)
