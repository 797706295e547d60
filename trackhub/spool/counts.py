# SPDX-License-Identifier: Apache-2.0
"""Counts what became of a stream's records. The sender's end of the spool calls it for the delivery report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from trackhub.spool.acks import Ack, Retired
from trackhub.spool.skip_damage import DAMAGED
from trackhub.spool.writer_ledger import LedgerCounts

__all__ = ["StreamCount", "add_up", "count_by_ledger", "count_retired", "count_stream"]

_WITHHELD = "withheld"


class StreamCount(msgspec.Struct, frozen=True):
    """How many records of a stream were logged, and what became of them.

    ``logged`` is the sum of ``dropped``, ``withheld``, ``acked``, ``refused``, ``spooled`` and ``unreadable``.

    Attributes:
        logged: log calls that returned.
        dropped: reason -> records that the writer dropped or that damage destroyed.
        withheld: records that a policy of the site withheld.
        acked: records that the receiver acknowledged.
        refused: reason -> records that the receiver refused.
        spooled: records in the spool that are not acknowledged yet.
        unreadable: records in the spool that the reader cannot read, for example for lack of permission.
        altered: reason -> values (not records) that the writer left out of records.
        is_complete: False if the stream may have records that are not counted here.
        withheld_by_rule: rule of the policy -> records that it withheld. These counts do not leave the site.
        altered_by_rule: rule of the policy -> values that it left out or changed. These counts do not leave the site.
    """

    logged: int
    dropped: dict[str, int]
    withheld: int
    acked: int
    refused: dict[str, int]
    spooled: int
    unreadable: int = 0
    altered: dict[str, int] = {}
    is_complete: bool = True
    withheld_by_rule: dict[str, int] = {}
    altered_by_rule: dict[str, int] = {}


def count_stream(
    ack: Ack, *, logged: int, dropped: Mapping[str, int], spooled: int, explained: Mapping[str, int]
) -> StreamCount:
    """Return the count of a stream that was read to its end. Its numbers add up even if the stream is damaged.

    Args:
        ack: how far the reader got.
        logged: the number of log calls, by the writer's ledger or by the records' numbers, whichever is higher.
        dropped: reason -> records that the writer's ledger counts as dropped.
        spooled: readable records in the spool after ``ack``.
        explained: reason -> records that gaps replace, before and after ``ack``.
    """
    withheld = explained.get(_WITHHELD, 0)
    # The writer's ledger also counts drops whose gap never got into the stream.
    reasons = {*dropped, *explained} - {DAMAGED, _WITHHELD}
    drops = {reason: max(dropped.get(reason, 0), explained.get(reason, 0)) for reason in reasons}
    # A record without any other explanation was in a damaged place.
    damaged = logged - withheld - sum(drops.values()) - sum(ack.refused.values()) - ack.acked - spooled
    if damaged > 0:
        drops[DAMAGED] = damaged
    return StreamCount(
        logged,
        drops,
        withheld,
        ack.acked,
        ack.refused,
        spooled,
        withheld_by_rule=ack.withheld,
        altered_by_rule=ack.altered,
    )


def count_by_ledger(ack: Ack, ledger: LedgerCounts, *, is_readable: bool = True) -> StreamCount:
    """Return the count of a stream without reading the records after ``ack``. Damage among these is not counted.

    Args:
        ack: how far the reader got.
        ledger: what the writer counted.
        is_readable: False if the records after ``ack`` cannot be read.
    """
    explained = ack.explained
    drops = {reason: max(n, explained.get(reason, 0)) for reason, n in ledger.dropped.items()}
    drops.update({reason: n for reason, n in explained.items() if reason not in drops and reason != _WITHHELD})
    passed = sum(n for reason, n in explained.items() if reason != _WITHHELD)
    # The records after ``ack`` are the drops whose gap was not read yet, and ``rest``.
    rest = max(0, ledger.logged - ack.next_seq - (sum(drops.values()) - passed))
    gone = explained.get(_WITHHELD, 0) + sum(drops.values()) + ack.acked + sum(ack.refused.values())
    return StreamCount(
        logged=gone + rest,
        dropped=drops,
        withheld=explained.get(_WITHHELD, 0),
        acked=ack.acked,
        refused=ack.refused,
        spooled=rest if is_readable else 0,
        unreadable=0 if is_readable else rest,
        altered=ledger.left_out,
        # A stream that cannot be read, and whose ledger is missing too, may hold any number of records.
        is_complete=(ledger.is_counted and (is_readable or ledger.logged > 0)) or (is_readable and ack.next_seq > 0),
        withheld_by_rule=ack.withheld,
        altered_by_rule=ack.altered,
    )


def count_retired(retired: Retired) -> StreamCount:
    """Return the count of all retired streams together."""
    counts = retired.logged, retired.dropped, retired.withheld, retired.acked, retired.refused
    return StreamCount(
        *counts,
        spooled=0,
        altered=retired.altered,
        withheld_by_rule=retired.withheld_by_rule,
        altered_by_rule=retired.altered_by_rule,
    )


def add_up(counts: Iterable[StreamCount]) -> StreamCount:
    """Return the count of several streams together."""
    counts = list(counts)
    return StreamCount(
        logged=sum(count.logged for count in counts),
        dropped=_by_reason(count.dropped for count in counts),
        withheld=sum(count.withheld for count in counts),
        acked=sum(count.acked for count in counts),
        refused=_by_reason(count.refused for count in counts),
        spooled=sum(count.spooled for count in counts),
        unreadable=sum(count.unreadable for count in counts),
        altered=_by_reason(count.altered for count in counts),
        is_complete=all(count.is_complete for count in counts),
        withheld_by_rule=_by_reason(count.withheld_by_rule for count in counts),
        altered_by_rule=_by_reason(count.altered_by_rule for count in counts),
    )


def _by_reason(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for count in counts:
        total.update(count)
    return dict(total)
