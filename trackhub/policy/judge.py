# SPDX-License-Identifier: Apache-2.0
"""Decides which part of one record may leave the site. `trackhub.spool.apply_policy` asks it for each record.

It looks only at the record itself. Only thinning depends on earlier records (`trackhub.policy.thinning`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from trackhub.policy.round_and_clip import clipped, merged_histogram, rounded
from trackhub.policy.rules import OPERATOR, KeyPattern, Policy, SiteRules
from trackhub.policy.thinning import Thinning, thinning_of
from trackhub.records import KEYED, KIND_OF, Gap, Histogram, Kind, Payload, Table

__all__ = ["UNREADABLE", "Judge", "Judgement", "judge_of"]

UNREADABLE = "unreadable"
"""The rule that withholds a record that cannot be read, or that cannot be changed as another rule demands."""

_MAX_KNOWN = 100_000  # keys whose rules are remembered
_NESTED = (Kind.PARAMS, Kind.SUMMARY)  # kinds whose values may be lists and dicts
_NOTHING = object()  # stands for a value of a param that must not leave at all


class Judgement(NamedTuple):
    """What may leave of one record.

    Attributes:
        payload: what may leave; None if nothing may. If everything may leave unchanged, this is the same object.
        rule: if nothing may leave, the rule that withheld the record; otherwise empty.
        altered: values that were left out or changed, by rule.
    """

    payload: Payload | None
    rule: str
    altered: Counter[str]


class _KeyRules(NamedTuple):
    """What the rules say of one key.

    Attributes:
        withheld_by: the rule that withholds the key; None if it may leave.
        clips: the ranges of its numbers, in the order in which they apply: rule, lowest and highest value.
    """

    withheld_by: str | None
    clips: tuple[tuple[str, float, float], ...]


class Judge:
    """The rules of one site for one receiver. Used by one thread.

    Attributes:
        thinning: how values are thinned; None if they are not.
    """

    def __init__(self, policies: tuple[tuple[str, Policy], ...], forbidden: tuple[str, ...]) -> None:
        """Prepare to judge.

        Args:
            policies: pairs of who gave a policy, and the policy. All of them apply.
            forbidden: the kinds that the operator forbids.
        """
        self.thinning: Thinning | None = thinning_of(policies)
        self._allow = [(owner, _parsed(p.allow)) for owner, p in policies if p.allow is not None]
        denied = [(f"{owner}.deny {text}", text) for owner, p in policies for text in p.deny]
        denied += [(f"{OPERATOR}.forbid_kinds {kind}", f"{kind}:*") for kind in forbidden]
        self._deny = [(rule, KeyPattern.parse(text, rule)) for rule, text in denied]
        # The operator's ranges are applied last, so that they hold.
        self._clips = [
            (f"{owner}.clip {text}", KeyPattern.parse(text, "clip"), low, high)
            for owner, p in sorted(policies, key=lambda given: given[0] == OPERATOR)
            for text, (low, high) in p.clip.items()
        ]
        digits = [(p.digits, owner) for owner, p in policies if p.digits is not None]
        self._digits, owner = min(digits) if digits else (0, "")
        self._digits_rule = f"{owner}.digits"
        self._known: dict[tuple[Kind, str], _KeyRules] = {}

    def judge(self, payload: Payload) -> Judgement:
        """Return what may leave of this payload.

        Raises:
            RecursionError: its params are nested too deep to look at.
        """
        if isinstance(payload, Gap):
            return Judgement(payload, "", Counter())
        return _Case(self, KIND_OF[type(payload)]).judge(payload)

    def rules(self, kind: Kind, key: str) -> _KeyRules:
        """Return what the rules say of a key. For a value inside a param, the key is the whole path, ``model/lr``."""
        found = self._known.get((kind, key))
        if found is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            found = self._known[kind, key] = self._find(kind, key)
        return found

    def _find(self, kind: Kind, key: str) -> _KeyRules:
        for rule, pattern in self._deny:
            if any(pattern.matches(kind, part) for part in _with_parents(kind, key)):
                return _KeyRules(rule, ())
        for owner, patterns in self._allow:
            if not any(pattern.matches(kind, key) for pattern in patterns):
                return _KeyRules(f"{owner}.allow", ())
        clips = tuple((rule, low, high) for rule, p, low, high in self._clips if p.matches(kind, key))
        return _KeyRules(None, clips)

    def number(self, value: Any, clips: tuple[tuple[str, float, float], ...], altered: Counter[str]) -> Any:
        """Return a number with the allowed digits and in its range. Return anything else as it is.

        Args:
            value: what a record holds.
            clips: the ranges, as `_KeyRules` has them.
            altered: counts changes by rule. This call adds to it.
        """
        if type(value) not in (float, int):
            return value
        if self._digits:
            new = rounded(value, self._digits)
            if new != value and value == value:
                altered[self._digits_rule] += 1
            value = new
        for rule, low, high in clips:
            new = clipped(value, low, high)
            if new is not value:
                altered[rule] += 1
            value = new
        return value


class _Case:
    """One record that is judged."""

    def __init__(self, judge: Judge, kind: Kind) -> None:
        self._judge = judge
        self._kind = kind
        self._altered: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def judge(self, payload: Payload) -> Judgement:
        new: Payload | None
        if isinstance(payload, KEYED):
            found = {key: self._value(key, value) for key, value in payload.values.items()}
            values = {key: value for key, value in found.items() if value is not _NOTHING}
            new = msgspec.structs.replace(payload, values=values) if values else None
        else:
            assert not isinstance(payload, Gap)
            rules = self._judge.rules(self._kind, payload.key)
            if rules.withheld_by is not None:
                self._left_out[rules.withheld_by] += 1
                new = None
            else:
                new = self._whole(payload, rules)
        if new is None:
            return Judgement(None, next(iter(self._left_out), UNREADABLE), Counter())
        altered = self._altered + self._left_out
        return Judgement(new if altered else payload, "", altered)

    def _value(self, path: str, value: Any) -> Any:
        """Return what may leave of a value; `_NOTHING` if nothing may. Looks into params and final values."""
        if self._kind in _NESTED and value and isinstance(value, dict):
            found = {key: self._value(f"{path}/{key}", item) for key, item in value.items()}
            return {key: item for key, item in found.items() if item is not _NOTHING} or _NOTHING
        if self._kind in _NESTED and value and isinstance(value, list):
            return [new for item in value if (new := self._value(path, item)) is not _NOTHING] or _NOTHING
        rules = self._judge.rules(self._kind, path)
        if rules.withheld_by is not None:
            self._left_out[rules.withheld_by] += 1
            return _NOTHING
        return self._judge.number(value, rules.clips, self._altered)

    def _whole(self, payload: Any, rules: _KeyRules) -> Payload | None:
        """Return a record of one key with its numbers rounded and clipped. None if no range is left in a histogram."""
        number, clips, altered = self._judge.number, rules.clips, self._altered
        if isinstance(payload, Table):
            rows = [[number(cell, clips, altered) for cell in row] for row in payload.rows]
            return msgspec.structs.replace(payload, rows=rows)
        if isinstance(payload, Histogram):
            if len(payload.edges) != len(payload.counts) + 1:
                return None
            merged = merged_histogram([number(edge, clips, altered) for edge in payload.edges], payload.counts)
            if merged is None:
                self._left_out.update(altered)
                return None
            edges, counts = merged
            return msgspec.structs.replace(payload, edges=edges, counts=[number(n, (), altered) for n in counts])
        return payload  # type: ignore[no-any-return]


def judge_of(rules: SiteRules, *, leaves_site: bool) -> Judge | None:
    """Return the judge of the records for one receiver; None if nothing is restricted.

    Args:
        rules: all rules of the site.
        leaves_site: True if the receiver is outside the site. Inside the site, only forbidden kinds are withheld.
    """
    policies = rules.policies if leaves_site else ()
    return Judge(policies, rules.forbid_kinds) if policies or rules.forbid_kinds else None


def _parsed(texts: tuple[str, ...]) -> list[KeyPattern]:
    return [KeyPattern.parse(text, "allow") for text in texts]


def _with_parents(kind: Kind, key: str) -> Iterator[str]:
    """Yield the key and, for params, the keys above it.

    A rule that denies ``model`` also denies ``model/lr``.
    """
    yield key
    while kind in _NESTED and "/" in key:
        key = key.rpartition("/")[0]
        yield key
