# SPDX-License-Identifier: Apache-2.0
"""The channel: what carries a sender's request to a receiver and brings the reply back.

A transport implements it, for example over FLARE, over HTTP or as a plain call. The sender calls it from its own
thread, with one request at a time. `docs/receiver-api.md` says what a transport must guarantee.
"""

from __future__ import annotations

from collections.abc import Callable

from trackhub.errors import ChannelError

__all__ = ["Channel", "ChannelError"]

Channel = Callable[[bytes, float], bytes]
"""``channel(request, timeout_s) -> reply``: carries the bytes of one request, and returns the bytes of its reply.

It raises `ChannelError` when it has no reply after ``timeout_s`` seconds, or cannot send. The sender then makes the
same request again. Any other exception has the same effect, and is logged as a defect of the channel.
"""
