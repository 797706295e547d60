# SPDX-License-Identifier: Apache-2.0
"""The rules that a job or an operator may write. This module checks them, and turns them into plain values and back.

The recipe, the operator's file and the FLARE widgets make them. `trackhub.policy.judge` applies them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from typing import Annotated, Any, Final, NamedTuple, Self

import msgspec
from msgspec import Meta

from trackhub.errors import ConfigError
from trackhub.plain_values_to_structs import convert
from trackhub.records import Kind

__all__ = ["JOB", "KINDS", "OPERATOR", "KeyPattern", "Policy", "SiteRules", "check_kinds"]

JOB: Final = "job"
OPERATOR: Final = "operator"
"""Who gave a policy. The names of rules in counts start with it."""

KINDS: Final[Mapping[str, Kind]] = {kind.name.lower(): kind for kind in Kind if kind is not Kind.GAP}
"""The kinds of records by the names that rules use: ``metrics``, ``params``, ``image``, ..."""

_ANY_KIND = "*"


class KeyPattern(NamedTuple):
    """A pattern of a rule, ``KEY`` or ``KIND:KEY``.

    Attributes:
        text: the pattern as it was written.
        kind: the kind that it holds for; None for all.
        key: matches whole keys.
    """

    text: str
    kind: Kind | None
    key: re.Pattern[str]

    @classmethod
    def parse(cls, text: str, where: str) -> KeyPattern:
        """Return the pattern in this text.

        Args:
            text: ``KEY`` or ``KIND:KEY``. ``*``, ``?`` and ``[abc]`` in a key are as in file names; ``*`` matches
                ``/`` as well.
            where: the path to the text, for messages.

        Raises:
            ConfigError: the text before the colon is not a kind. Without the error, a misspelt kind would deny nothing.
        """
        front, colon, rest = text.partition(":")
        kind, key = (front, rest) if colon else (_ANY_KIND, text)
        if kind != _ANY_KIND and kind not in KINDS:
            raise ConfigError(
                f"{where}: {text!r} has {kind!r} in front of the colon; expected one of {', '.join(KINDS)}, or * for "
                "a key that has a colon itself"
            )
        if not key:
            raise ConfigError(f"{where}: {text!r} has no pattern for keys; expected KEY or KIND:KEY, such as image:*")
        return cls(text, KINDS.get(kind), re.compile(translate(key)))

    def matches(self, kind: Kind, key: str) -> bool:
        """Return whether the pattern matches this key of a record of this kind."""
        return self.kind in (None, kind) and self.key.match(key) is not None


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What may leave a site, as a job or an operator says. The default restricts nothing.

    Attributes:
        allow: patterns of what may leave, ``KEY`` or ``KIND:KEY``; None for everything, an empty list for nothing.
        deny: patterns of what must not leave, even if ``allow`` names it.
        digits: how many significant digits the numbers in metrics, params, tables and histograms keep. None keeps all.
        clip: for a pattern, the lowest and the highest value of these numbers.
        every: a number N. Of the values that one process logs under a key, only every Nth may leave.
        interval_s: a number of seconds. Of these values, at most one may leave in this time.
        keep_last: the last value of a round may leave, whatever ``every`` and ``interval_s`` say.

    Raises:
        ConfigError: a pattern or a range is wrong.
    """

    allow: tuple[str, ...] | None = None
    deny: tuple[str, ...] = ()
    digits: Annotated[int, Meta(ge=1, le=17)] | None = None
    clip: dict[str, tuple[float, float]] = {}
    every: Annotated[int, Meta(ge=1, le=1_000_000_000)] = 1
    interval_s: Annotated[float, Meta(ge=0, le=31_536_000)] = 0.0
    keep_last: bool = False

    def __post_init__(self) -> None:
        for field, texts in (("allow", self.allow or ()), ("deny", self.deny), ("clip", self.clip)):
            for text in texts:
                KeyPattern.parse(text, f"policy.{field}")
        for text, (low, high) in self.clip.items():
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ConfigError(f"policy.clip: {text!r}: [{low}, {high}] is not a range; expected [LOW, HIGH]")
        if self.keep_last and not self.thins:
            raise ConfigError("policy.keep_last: it has no effect without every or interval_s; give one of these, too")

    @property
    def thins(self) -> bool:
        """True if a value may be withheld because of other values of the same key."""
        return self.every > 1 or self.interval_s > 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Return the policy in a plain mapping, as a job's configuration or TOML gives it.

        Raises:
            ConfigError: a key is unknown or a value is wrong; the message has the path to it.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"policy: expected a table of rules, got {values!r}")
        unknown = sorted(set(values) - set(cls.__struct_fields__))
        if unknown:
            raise ConfigError(f"policy.{unknown[0]}: unknown rule; expected one of {', '.join(cls.__struct_fields__)}")
        return convert(values, cls, "policy")

    def plain(self) -> dict[str, Any]:
        """Return the rules that differ from their defaults, as JSON values."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values


class SiteRules(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that restricts the records of one site. All policies apply, so the strictest one decides.

    Attributes:
        policies: pairs of who gave a policy, and the policy.
        forbid_kinds: kinds that the operator forbids; no receiver gets them, not even the site's own.
        operator_folder: the folder of the operator's file; empty if there is none. A replay reads it again.
    """

    policies: tuple[tuple[str, Policy], ...] = ()
    forbid_kinds: tuple[str, ...] = ()
    operator_folder: str = ""

    def __bool__(self) -> bool:
        """True if anything is restricted."""
        return bool(self.policies or self.forbid_kinds)

    @classmethod
    def of_job(cls, policy: Policy | None) -> Self:
        """Return what a job's policy restricts."""
        return cls(policies=((JOB, policy),) if policy is not None and policy != Policy() else ())

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Return the rules that a spool keeps.

        Raises:
            ConfigError: they are not readable.
        """
        return convert(values, cls, "policy of the spool")

    def plain(self) -> dict[str, Any]:
        """Return the rules as JSON values."""
        values: dict[str, Any] = msgspec.to_builtins(self)
        return values

    def with_operator(self, policy: Policy | None, forbid_kinds: Iterable[str]) -> SiteRules:
        """Return these rules with an operator's rules added. Added rules loosen nothing."""
        given = (OPERATOR, policy)
        more = (given,) if policy is not None and policy != Policy() and given not in self.policies else ()
        kinds = tuple(dict.fromkeys([*self.forbid_kinds, *forbid_kinds]))
        return msgspec.structs.replace(self, policies=(*self.policies, *more), forbid_kinds=kinds)


def check_kinds(where: str, names: Iterable[str]) -> None:
    """Check names of kinds.

    Raises:
        ConfigError: one of them is not the name of a kind.
    """
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"{where}: {name!r} is not a kind of record; expected one of {', '.join(KINDS)}")
