# SPDX-License-Identifier: Apache-2.0
"""How much, how often and how long: every bound and every wait of trackhub, with its default and its range.

A job, the environment, the operator's file and `trackhub.local` set them. Sender, receiver and lanes read them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self, get_type_hints

import msgspec

from trackhub.errors import ConfigError
from trackhub.plain_values_to_structs import convert

__all__ = ["ENV_PREFIX", "Limits"]

ENV_PREFIX = "TRACKHUB_"
"""A limit's environment variable is this prefix and the limit's name in capitals: ``TRACKHUB_DEADLINE_S=60``."""


class _Range(NamedTuple):
    """The lowest and the highest value of a limit. Both are allowed."""

    low: float
    high: float


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much, how often and how long. Every wait in trackhub has its limit here.

    Raises:
        ConfigError: a value is of the wrong type or out of its range.
    """

    batch_records: Annotated[int, _Range(1, 100_000)] = 1000
    """Most records in one message from a site to the receiver. Larger batches are no faster, and one lost message costs
    more to send again."""

    batch_bytes: Annotated[int, _Range(4096, 8 << 20)] = 1 << 20
    """Most bytes of frames in one message, and of a file in one piece. A single larger record travels alone. FLARE's
    channels carry 1 MiB without streaming."""

    poll_s: Annotated[float, _Range(0.001, 10)] = 0.05
    """Seconds between two looks at the spool while it is idle. With the default, charts seem live, and an idle site
    costs almost nothing."""

    linger_s: Annotated[float, _Range(0, 60)] = 1.0
    """Most seconds that the sender batches records before it sends the next message; 0 sends at once. A message through
    FLARE takes some milliseconds of Python in the process that trains. One message for each training step would slow
    down short steps. The sender does not wait at the end of a round, or when it has 64 KiB of records."""

    spool_bytes: Annotated[int, _Range(1 << 20, 1 << 50)] = 1 << 30
    """Most bytes of a site's spool on disk. When it is full, new records are dropped and counted. The default holds
    some ten million scalars: hours without a receiver."""

    request_s: Annotated[float, _Range(0.1, 600)] = 10.0
    """Longest time in seconds that a site waits for the receiver's reply before it sends a message again. It is at most
    half of ``silence_s``: otherwise one lost reply would make the receiver regard the site as gone."""

    barrier_s: Annotated[float, _Range(0, 3600)] = 10.0
    """Longest wait in seconds, once per round, until what was logged is acked. The sender waits before FLARE sends a
    task's result; 0 does not wait. A receiver that does not reply costs this wait once, not in every round."""

    sites_s: Annotated[float, _Range(0, 3600)] = 30.0
    """Longest time in seconds that the server delays the end of the job until every site said that it is done. Records
    that come later are not in the receiver's journal. They stay in the site's spool."""

    files_s: Annotated[float, _Range(0, 86_400)] = 120.0
    """Longest time in seconds that a site and the server wait at the end of the job while images and artifacts still
    arrive. Both may wait until ``sites_s``. They wait longer only while bytes of a file still arrive. A file that has
    not arrived completely stays in the site's spool."""

    deadline_s: Annotated[float, _Range(0, 86_400)] = 30.0
    """Longest time in seconds, for all lanes together, to bring what is journaled into the backends at the end of the
    job. What is left stays in the journal for ``trackhub replay``."""

    preflight_s: Annotated[float, _Range(0.1, 600)] = 10.0
    """Longest time in seconds for a backend's check before training starts. A check that takes longer counts as "not
    now": training starts, and the records wait in the journal."""

    keepalive_s: Annotated[float, _Range(0.1, 60)] = 2.0
    """Seconds between two keep-alive messages of a site."""

    silence_s: Annotated[float, _Range(0.2, 3600)] = 7.0
    """Seconds without any message after which the receiver regards a site as gone. At least twice ``keepalive_s``:
    otherwise one late message would be enough. The default allows three missing keep-alive messages."""

    durability: Literal["normal", "full"] = "normal"
    """What an acked record survives. ``normal``: the death of the receiver's process. ``full``: also the machine's loss
    of power, at about 3 ms of disk time for every batch."""

    flush_s: Annotated[float, _Range(0.01, 600)] = 1.0
    """Most seconds between handing records to a backend that buffers and asking it to make them durable. With the
    default, a crash means that at most one second of records is sent again."""

    def __post_init__(self) -> None:
        for name, (number, allowed) in _RANGES.items():
            _check(name, getattr(self, name), number, allowed)
        if self.durability not in ("normal", "full"):
            raise ConfigError(f"limits.durability: expected 'normal' or 'full', got {self.durability!r}")
        if self.silence_s < 2 * self.keepalive_s:
            raise ConfigError(
                f"limits.silence_s: {self.silence_s} must be at least twice limits.keepalive_s ({self.keepalive_s}). "
                f"Otherwise one late message makes the receiver regard a site as gone"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> Self:
        """Return limits with these values. Other limits come from ``environ``, or are the defaults.

        Args:
            values: limit name to value; strings are accepted for numbers.
            environ: environment variables to read, named ``TRACKHUB_<LIMIT>``; None reads none.

        Raises:
            ConfigError: a limit is unknown, or its value is of the wrong type or out of range.
        """
        unknown = sorted(set(values) - set(cls.__struct_fields__))
        if unknown:
            raise ConfigError(f"limits.{unknown[0]}: unknown limit; expected one of {', '.join(cls.__struct_fields__)}")
        variables = {name: ENV_PREFIX + name.upper() for name in cls.__struct_fields__ if name not in values}
        found = (
            {name: environ[variable] for name, variable in variables.items() if variable in environ} if environ else {}
        )
        try:
            return convert({**found, **values}, cls, "limits")
        except ConfigError as error:
            guilty = [variables[name] for name in found if re.search(rf"\blimits\.{name}\b", str(error))]
            if not guilty:
                raise
            raise ConfigError(f"the environment variable {' or '.join(guilty)}: {error}") from error


def _check(name: str, value: Any, number: type, allowed: _Range) -> None:
    if isinstance(value, bool) or not isinstance(value, int if number is int else (int, float)):
        expected = "a whole number" if number is int else "a number"
        raise ConfigError(f"limits.{name}: expected {expected}, got {value!r}")
    if not (math.isfinite(value) and allowed.low <= value <= allowed.high):
        raise ConfigError(f"limits.{name}: {value!r} is out of range; expected {allowed.low:,} to {allowed.high:,}")


_RANGES: dict[str, tuple[type, _Range]] = {
    name: (hint.__origin__, hint.__metadata__[0])
    for name, hint in get_type_hints(Limits, include_extras=True).items()
    if hasattr(hint, "__metadata__")
}
