# SPDX-License-Identifier: Apache-2.0
"""Computes mean, spread and count of the sites' metrics for each federated round.

`FederationRun` gives `Aggregation` the journal's records in their order, and stores the statistics that it returns.
`Aggregation` uses no clock: the same records in the same order give the same output. So a receiver that is started
again goes on where the last one stopped.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from trackhub.delivery.federation.describe_values import describe
from trackhub.delivery.federation.row_digest import RowDigest, is_step_its_round
from trackhub.job_and_run_info import FEDERATION, SERVER
from trackhub.printable import printable
from trackhub.records import MAX_KEY_CHARS, Metrics, Record

__all__ = ["FACTS", "JOB_ENDED", "Aggregation", "Output", "in_records", "key_patterns"]

FACTS = "fl/"
"""The prefix of the federation run's own facts. A key with this prefix is not aggregated if a site logs it."""

_WEIGHT = "fl/steps/"  # before the name of a site: the weight of its values in the weighted mean
_ROUND_BEGAN = "fl/rounds_started"
_ROUND_ENDED = "fl/round_seconds"
_MISSING = "fl/sites_missing"  # comes with the end of the round: how many sites have sent no result
JOB_ENDED = "fl/rounds"
"""The key of the fact that the job has ended. Its value is the number of rounds."""

_ALL_REPORTED = "fl/all_reported"
_LATE = "fl/late_values"

MAX_KEYS_OF_SITE = 1000
"""How many keys of one site are aggregated. Each makes up to seven numbers a round in every backend."""

MAX_KEYS = 5000  # how many keys of all sites together are aggregated

_MAX_HELD = 500_000  # values that wait for the end of their round
_MAX_HELD_OF_SITE = 50_000  # a site may send records of any rounds, so each site has a limit of its own
_MAX_IGNORED = 1_000_000
_MAX_KEPT = _MAX_HELD // 2  # of these, in closed rounds: it is not certain yet whether their keys are aggregated
_MAX_KEPT_OF_SITE = _MAX_HELD_OF_SITE // 2
_AT_ONCE = 1000  # numbers in one record
_SUFFIX_CHARS = len("/weighted_mean")
_log = logging.getLogger(__name__)


class Output(NamedTuple):
    """The content of one record of the federation run.

    Attributes:
        round: the round that the record is about, which is also its step.
        time: unix seconds of the record that made these numbers final. It closed this round or a later one, or said
            that the job has ended.
        values: the numbers.
    """

    round: int
    time: float
    values: dict[str, float]


def in_records(numbers: Mapping[str, float]) -> Iterator[dict[str, float]]:
    """Yield the numbers in parts, each for one record."""
    items = list(numbers.items())
    for i in range(0, len(items), _AT_ONCE):
        yield dict(items[i : i + _AT_ONCE])


def key_patterns(patterns: Iterable[str]) -> re.Pattern[str] | None:
    """Return one pattern that matches a key if any of these patterns does. None if there are no patterns.

    ``*`` means any characters, ``?`` means one, and ``[abc]`` means one of these.
    """
    # A pattern matches the key that equals it, too: keys of one class, such as val/iou[0], have brackets.
    joined = "|".join(rf"{fnmatch.translate(pattern)}|{re.escape(pattern)}\Z" for pattern in patterns)
    return re.compile(joined) if joined else None


class _Key:
    """What is known of a key that may be aggregated."""

    __slots__ = ("above_0", "counts_for", "is_proven", "sites")

    def __init__(self, site: str) -> None:
        self.counts_for = site  # the key counts against the key limit of the site that logged it first
        self.sites: set[str] = set()
        self.above_0 = False
        self.is_proven = False


class _Keys:
    """Decides which keys are aggregated.

    With patterns, a key is aggregated if it matches. Without patterns, it is aggregated if all of this holds:

    - Two or more sites log it.
    - In all its records that have a round, the step equals the round.
    - One of these rounds is above 0, or the job has only one round. Round 0 proves nothing in a longer job: a key with
      its own step counter also begins at step 0.

    Attributes:
        ignored: keys to skip, since they are not aggregated. The key of the weights is never among them.
        is_default: True if no patterns were given.
        weight: the key of the weights. None if the weights are the numbers of steps, in the facts ``fl/steps/<site>``.
        is_weight_only: True if the key of the weights serves as weight only, and is not aggregated itself.
        proven: the keys of which it has become certain that they are aggregated, since this list was emptied last.
        given_up: key -> how many of its values found no room while it was not certain that it is aggregated.
    """

    def __init__(self, patterns: Sequence[str] | None, weight: str | None) -> None:
        self.ignored: set[str] = set()
        self._patterns = None if patterns is None else key_patterns(patterns)
        self.is_default = patterns is None
        self.weight = weight
        self.is_weight_only = False
        self.proven: list[str] = []
        self.given_up = Counter[str]()
        self._keys: dict[str, _Key] = {}
        self._of_site = Counter[str]()
        self._warned: set[str] = set()

    def takes(self, site: str, key: str, number: int, *, step_is_round: bool) -> bool:
        """Return whether the key may still be aggregated, now that this site has logged it.

        Args:
            site: the site.
            key: the key.
            number: the round in which the site logged it.
            step_is_round: True if the step equals the round, in this record or in all records of this row.
        """
        known = self._keys.get(key)
        if self.is_default and not step_is_round:
            self._ignore(key)
            if known is not None:
                del self._keys[key]
                self._of_site[known.counts_for] -= 1
                self.given_up.pop(key, None)
            return False
        if known is None:
            if not self._may_begin(site, key):
                return False
            known = self._keys[key] = _Key(site)
            self._of_site[site] += 1
        known.sites.add(site)
        known.above_0 = known.above_0 or bool(number)
        if not known.is_proven and known.above_0 and len(known.sites) > 1:
            known.is_proven = True
            self.proven.append(key)
        return True

    def _may_begin(self, site: str, key: str) -> bool:
        if key.startswith(FACTS) or len(key) > MAX_KEY_CHARS - _SUFFIX_CHARS:
            self._ignore(key)
            return False
        if not self.is_default and (self._patterns is None or self._patterns.match(key) is None):
            self._ignore(key)
            return False
        if len(self._keys) >= MAX_KEYS or self._of_site[site] >= MAX_KEYS_OF_SITE:
            if site not in self._warned:
                self._warned.add(site)
                _log.warning("site %r: its key %r and its other new keys are not aggregated: at most %d keys of a site "
                             "are, and %d of all sites. Name the keys that matter: add_tracking(aggregate=[...])",
                             site[:80], key[:80], MAX_KEYS_OF_SITE, MAX_KEYS)  # fmt: skip
            self._ignore(key)
            return False
        return True

    def _ignore(self, key: str) -> None:
        if key == self.weight:
            self.is_weight_only = True
        elif len(self.ignored) < _MAX_IGNORED:  # further keys are checked again each time, which takes longer
            self.ignored.add(key)

    def is_ready(self, key: str, *, single_round: bool) -> bool:
        """Return True once it is certain that the key is aggregated.

        Args:
            key: the key.
            single_round: the job has ended after one round.
        """
        if not self.is_default:
            return True
        known = self._keys.get(key)
        return known is not None and (known.is_proven or (single_round and len(known.sites) > 1))

    def count_given_up(self, keys: Iterable[str]) -> int:
        """Return how many values of these keys found no room, and forget it. The keys are certainly aggregated."""
        return sum(self.given_up.pop(key, 0) for key in keys)


class _Round:
    """One round: the last value of each site and key."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.weights: dict[str, float] = {}  # site -> weight
        self.values: dict[str, dict[str, float]] = {}  # key -> site -> value
        self.is_announced = False
        self.is_closed = False


class Aggregation:
    """Aggregates the sites' metrics by round. Used by one thread.

    A round is closed when it ends, and not before: a site that has reported may get a further task of the round. Then
    the statistics of its keys are returned. If it is not certain yet whether a key is aggregated, its values are kept
    until it is, or the job ends. If there is no room for them, they are counted as late once it is certain. If a site
    logs a key several times in a round, the last value counts. A value that comes after the round is closed, or that
    finds no room, is counted as late. A record without a round is skipped.

    Attributes:
        last_time: unix seconds of the newest record that it used; 0 before the first.
    """

    def __init__(self, patterns: Sequence[str] | None = None, weight: str | None = None) -> None:
        """Begin with no record.

        Args:
            patterns: the keys to aggregate. None for the keys that two or more sites log with the round as their step.
            weight: the key of the metric that gives a site's weight in the weighted means of a round; None for the
                number of training steps in the facts.
        """
        self._keys = _Keys(patterns, weight)
        self._rounds: dict[int, _Round] = {}
        # Closed rounds with values of keys that may still be aggregated, in the order in which they were closed. If the
        # round has begun again since, it is here only, and `_rounds` has the new one.
        self._unsettled: dict[_Round, None] = {}
        # Key -> the rounds that hold its values. There may be thousands of rounds, too many for `_forget` to search.
        self._rounds_with: dict[str, set[_Round]] = {}
        self._held = Counter[str]()  # site -> how many of its values and weights are held
        self._held_in_all = 0
        self._kept = Counter[str]()  # site -> how many of its values the unsettled rounds hold
        self._kept_in_all = 0
        self._late = 0
        self._late_told = 0
        self.last_time = 0.0
        self._has_warned = False
        self._has_told_weight = False

    def digest(self) -> RowDigest:
        """Return an empty digest. Fill it with a row's records, then call ``add_digest``. Any thread may call this."""
        return RowDigest(self._keys.ignored)

    def add(self, site: str, records: Iterable[Record]) -> None:
        """Take a site's metrics in one row of the journal, in their order."""
        records = list(records)
        if not records:
            return
        digest = self.digest()
        digest.add(set[str]().union(*(r.payload.values for r in records)), records)  # type: ignore[union-attr]
        if self.add_digest(site, digest):
            return
        ignored = self._keys.ignored
        for record in records:
            if not ignored.issuperset(record.payload.values):  # type: ignore[union-attr]
                self._take(site, record, digest.time)

    def add_digest(self, site: str, digest: RowDigest) -> bool:
        """Add a row by its digest. The effect is that of ``add`` with the row's records.

        Returns:
            False if the digest is not enough. Then nothing was added: call ``add`` with the row's records.
        """
        keys = digest.keys - self._keys.ignored
        if not keys or site in (SERVER, FEDERATION):
            return True
        if not digest.is_usable():
            return False
        (number,) = digest.rounds
        if number is None:
            return True
        if number in self._rounds and self._rounds[number].is_closed:
            return False  # each value must be counted as late, and the digest has only the last one of each key
        if self._keys.is_default and not digest.steps_are_rounds and digest.keys != {self._keys.weight}:
            return False  # some of the keys have steps that are no rounds, and the digest does not say which
        for key in sorted(keys):
            self._take_value(site, key, digest.values[key], number, digest.time, digest.steps_are_rounds)
        return True

    def _take(self, site: str, record: Record, time: float) -> None:
        assert isinstance(record.payload, Metrics)
        if record.round is None:
            return
        for key, value in record.payload.values.items():
            if key not in self._keys.ignored:
                self._take_value(site, key, value, record.round, time, is_step_its_round(record))

    def _take_value(self, site: str, key: str, value: float, number: int, time: float, step_is_round: bool) -> None:
        """Take a value of a key that is not ignored.

        Args:
            site, key, value: what the site logged.
            number: the round in which the site logged it.
            time: unix seconds of the row.
            step_is_round: the step of the value is its round.
        """
        current = self._rounds.get(number)
        is_closed = current is not None and current.is_closed
        if key == self._keys.weight:
            if not is_closed:
                self._hold(number, None, site, value, time)
            if self._keys.is_weight_only:
                return
        if not self._keys.takes(site, key, number, step_is_round=step_is_round):
            self._forget(key)
        elif is_closed:
            self._late += 1
        else:
            self._hold(number, key, site, value, time)

    def _hold(self, number: int, key: str | None, site: str, value: float, time: float) -> None:
        """Hold a value until its round is closed, if there is room for it.

        Args:
            number: the round.
            key: the key of the value; None for the site's weight.
            site, value: the site, and what it logged.
            time: unix seconds of the row.
        """
        if self._held_in_all >= _MAX_HELD or self._held[site] >= _MAX_HELD_OF_SITE:
            if not self._has_warned:
                self._has_warned = True
                _log.warning("site %s: too many metrics wait for the end of their rounds: %d of this site (of at most "
                             "%d), %d in all (of %d). No more are aggregated until a round ends", printable(site),
                             self._held[site], _MAX_HELD_OF_SITE, self._held_in_all, _MAX_HELD)  # fmt: skip
            self._late += key is not None
            return
        current = self._round(number)
        by_site = current.weights if key is None else current.values.setdefault(key, {})
        if key is not None:
            self._rounds_with.setdefault(key, set()).add(current)
        self.last_time = max(self.last_time, time)
        if site not in by_site:
            self._held[site] += 1
            self._held_in_all += 1
        by_site[site] = value

    def _round(self, number: int) -> _Round:
        if number not in self._rounds:
            self._rounds[number] = _Round(number)
        return self._rounds[number]

    def _forget(self, key: str) -> None:
        """Drop the values of a key that is not aggregated after all."""
        for current in list(self._rounds_with.get(key, ())):
            self._pop(current, key)
            if not (current.values or current.weights or current.is_announced or current.is_closed):
                del self._rounds[current.number]  # otherwise a site could fill the memory with empty rounds
        self._rounds_with.pop(key, None)

    def _pop(self, current: _Round, key: str) -> dict[str, float]:
        """Take the values of a key out of a round. Return site -> value."""
        by_site = current.values.pop(key)
        self._rounds_with[key].discard(current)
        self._release(by_site)
        if current in self._unsettled:
            self._kept.subtract(by_site.keys())
            self._kept_in_all -= len(by_site)
            if not current.values:
                self._drop(current)
        return by_site

    def _release(self, by_site: Iterable[str]) -> None:
        sites = list(by_site)
        self._held.subtract(sites)
        self._held_in_all -= len(sites)

    def add_facts(self, records: Iterable[Record]) -> list[Output]:
        """Take facts of the federation run. Return the statistics of the rounds that they complete."""
        found: list[Output] = []
        for record in records:
            if record.round is None or not isinstance(record.payload, Metrics):
                continue
            values = record.payload.values
            self.last_time = max(self.last_time, record.time)
            if JOB_ENDED in values:
                found += self._end(record.time)
                continue
            current = self._round(record.round)
            if _ROUND_BEGAN in values and current.is_closed:  # a second workflow, or FLARE has started the job again
                current = self._rounds[record.round] = _Round(record.round)
            current.is_announced = True
            if self._keys.weight is None:
                current.weights |= {k[len(_WEIGHT) :]: v for k, v in values.items() if k.startswith(_WEIGHT)}
            if _ROUND_ENDED in values and not current.is_closed:
                found += self._close(current, record.time, all_reported=values.get(_MISSING) == 0)
        return found

    def is_unfinished(self) -> bool:
        """Return whether the end of the job would still give statistics.

        It would if a round is open, values are held, or late values are not reported yet.
        """
        if self._late > self._late_told or self._unsettled:
            return True
        return any(not one.is_closed and (one.values or one.is_announced) for one in self._rounds.values())

    def rounds(self) -> int:
        """Return how many rounds the server announced. If it announced none, count the rounds in which sites logged."""
        return len(self._of_job())

    def last_round(self) -> int:
        """Return the job's highest round; 0 if it had none."""
        return max(self._of_job(), default=0)

    def _of_job(self) -> list[int]:
        """Return the job's rounds. A site may log any round, so rounds of sites count only if none was announced."""
        announced = [number for number, current in self._rounds.items() if current.is_announced]
        return announced or list(self._rounds)

    def _end(self, time: float) -> list[Output]:
        found: list[Output] = []
        single_round = self.rounds() == 1
        # Rounds of one number stay in the order in which they were closed.
        for current in sorted({**self._unsettled, **dict.fromkeys(self._rounds.values())}, key=lambda one: one.number):
            said = {_ALL_REPORTED: 0.0} if current.is_announced and not current.is_closed else {}
            found += self._emit(current, time, said, single_round=single_round)
            self._drop(current)
            current.is_closed = True
        proven = [key for key in self._keys.given_up if self._keys.is_ready(key, single_round=single_round)]
        self._late += self._keys.count_given_up(proven)
        return found + self._tell_late(self.last_round(), time)

    def _close(self, current: _Round, time: float, *, all_reported: bool) -> list[Output]:
        found = self._emit_proven(time) + self._emit(current, time, {_ALL_REPORTED: float(all_reported)})
        self._keep(current)
        current.is_closed = True
        return found + self._tell_late(current.number, time)

    def _emit_proven(self, time: float) -> list[Output]:
        """Return the statistics of closed rounds for keys that are now certainly aggregated."""
        proven, self._keys.proven = self._keys.proven, []
        self._late += self._keys.count_given_up(proven)
        with_values = set[_Round]().union(*(self._rounds_with.get(key, ()) for key in proven))
        earlier = [current for current in self._unsettled if current in with_values] if with_values else []
        return [output for current in earlier for output in self._emit(current, time, {})]

    def _keep(self, current: _Round) -> None:
        """Keep what a round that closes still holds, as far as there is room. Without room, give up a key's values."""
        for key in sorted(current.values):  # in this order also if the rows are read again
            sites = current.values[key].keys()
            is_full = any(self._kept[site] >= _MAX_KEPT_OF_SITE for site in sites)
            if is_full or self._kept_in_all + len(sites) > _MAX_KEPT:
                self._keys.given_up[key] += len(sites)
                self._pop(current, key)
            else:
                self._kept.update(sites)
                self._kept_in_all += len(sites)
        if current.values:
            self._unsettled[current] = None
        else:
            self._drop(current)

    def _tell_late(self, number: int, time: float) -> list[Output]:
        if self._late == self._late_told:
            return []
        self._late_told = self._late
        return [Output(number, time, {_LATE: float(self._late)})]

    def _drop(self, current: _Round) -> None:
        """Drop what the round holds."""
        for key in list(current.values):
            self._pop(current, key)
        self._unsettled.pop(current, None)
        if self._keys.weight is not None:
            self._release(current.weights)
        current.weights = {}

    def _emit(
        self, current: _Round, time: float, first: dict[str, float], *, single_round: bool = False
    ) -> list[Output]:
        """Return the numbers in ``first``, and the statistics of the keys that are certainly aggregated.

        Forget the values of these keys.
        """
        number, weights = current.number, current.weights
        numbers = dict(first)
        for key in sorted(k for k in current.values if self._keys.is_ready(k, single_round=single_round)):
            by_site = self._pop(current, key)
            if self._keys.weight is not None and not weights and not self._has_told_weight:
                self._has_told_weight = True
                _log.warning("round %d: no site logged its weight %r, so there is no weighted mean. Log it at each "
                             "site in each round, or name another metric as aggregate_weight",
                             number, self._keys.weight)  # fmt: skip
            statistics = describe(list(by_site.values()), [weights.get(site) for site in by_site])
            numbers |= {f"{key}/{name}": value for name, value in statistics.items()}
        return [Output(number, time, part) for part in in_records(numbers)]
