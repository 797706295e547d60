# SPDX-License-Identifier: Apache-2.0
"""Count what became of a stream's records. The sender's end of the spool calls it for the delivery report."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from trackhub.spool.damage import DAMAGED
from trackhub.spool.layout import Ack

__all__ = ["StreamCount", "count_stream"]

_WITHHELD = "withheld"


class StreamCount(msgspec.Struct, frozen=True):
    """How many records of a stream were logged, and what became of them.

    ``logged`` is the sum of the others.

    Attributes:
        logged: log calls that returned.
        dropped: what the writer dropped or damage took, by reason.
        withheld: what a policy of the site kept back.
        acked: what the receiver acknowledged.
        refused: what the receiver refused, by reason.
        spooled: what is in the spool and not acknowledged yet.
    """

    logged: int
    dropped: dict[str, int]
    withheld: int
    acked: int
    refused: dict[str, int]
    spooled: int


def count_stream(
    ack: Ack, *, logged: int, dropped: Mapping[str, int], spooled: int, explained: Mapping[str, int]
) -> StreamCount:
    """Return the count of a stream, whose sum is right whatever is damaged.

    Args:
        ack: how far the reader got.
        logged: log calls that the writer counted or that are in the spool, whichever are more.
        dropped: what the writer's ledger counts as dropped, by reason.
        spooled: records that can be read in the spool behind ``ack``.
        explained: records that gaps account for, before and behind ``ack``, by reason.
    """
    withheld = explained.get(_WITHHELD, 0)
    # The writer's ledger counts its drops even if their gap never got into the stream.
    reasons = {*dropped, *explained} - {DAMAGED, _WITHHELD}
    drops = {reason: max(dropped.get(reason, 0), explained.get(reason, 0)) for reason in reasons}
    # What has no other explanation was in a damaged place.
    damaged = logged - withheld - sum(drops.values()) - sum(ack.refused.values()) - ack.acked - spooled
    if damaged > 0:
        drops[DAMAGED] = damaged
    return StreamCount(logged, drops, withheld, ack.acked, ack.refused, spooled)
