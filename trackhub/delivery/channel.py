# SPDX-License-Identifier: Apache-2.0
"""The channel: what carries a sender's request to a receiver and brings the reply back.

A transport implements it, over FLARE, HTTP or a plain call. `trackhub.delivery.sender` calls it.
"""

from __future__ import annotations

from collections.abc import Callable

from trackhub.errors import ChannelError

__all__ = ["Channel", "ChannelError"]

Channel = Callable[[bytes, float], bytes]
"""``channel(request, timeout_s) -> reply``. Raises `ChannelError` when there is no reply within ``timeout_s`` seconds."""
