# SPDX-License-Identifier: Apache-2.0
"""Thins: lets only some of the values pass that one process logs under a key.

`trackhub.spool.apply_policy` asks it for each value, in the order of the stream. The spool's reader stores what
thinning remembers together with its own place in the stream. So a batch that is sent again after a crash has the same
records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from trackhub.policy.rules import Policy

__all__ = ["MAX_KEYS", "Seen", "Thinning", "thinning_of"]

MAX_KEYS = 10_000
"""How many keys of a stream are remembered. The values of further keys are withheld."""

Seen = dict[str, tuple[int, float]]
"""Key of a stream -> the number of its next value modulo ``every``, and the time of its last value that passed."""


class Thinning(NamedTuple):
    """How values are thinned.

    Attributes:
        every: a number N. Every Nth value passes.
        interval_s: at most one value passes in this many seconds.
        keep_last: the last value of a round also passes.
        every_rule, interval_rule: the names by which withheld values are counted.
    """

    every: int
    interval_s: float
    keep_last: bool
    every_rule: str
    interval_rule: str

    def take(self, seen: Seen, key: str, time: float) -> str | None:
        """Note one more value of a key.

        Args:
            seen: what is remembered of the stream. This call changes it.
            key: the key, with its kind.
            time: when it was logged, in unix seconds. The clock may have been set back.

        Returns:
            The rule that withholds the value; None if the value passes.
        """
        count, passed_at = seen.get(key, (0, -math.inf))
        if key not in seen and len(seen) >= MAX_KEYS:
            return f"more than {MAX_KEYS} keys to thin"
        rule = None
        if count:
            rule = self.every_rule
        elif abs(time - passed_at) < self.interval_s:
            rule = self.interval_rule
        seen[key] = ((count + 1) % self.every, passed_at if rule else time)
        return rule


def thinning_of(policies: Iterable[tuple[str, Policy]]) -> Thinning | None:
    """Return the strictest thinning of these policies. None if none of them thins.

    Args:
        policies: pairs of who gave a policy, and the policy.
    """
    thinning = [(owner, policy) for owner, policy in policies if policy.thins]
    if not thinning:
        return None
    by_count = max(thinning, key=lambda given: given[1].every)
    by_time = max(thinning, key=lambda given: given[1].interval_s)
    return Thinning(
        by_count[1].every,
        by_time[1].interval_s,
        all(policy.keep_last for _, policy in thinning),
        f"{by_count[0]}.every",
        f"{by_time[0]}.interval_s",
    )
