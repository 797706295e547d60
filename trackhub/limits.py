# SPDX-License-Identifier: Apache-2.0
"""How much, how often and how long: every bound and every wait of trackhub, with its default and its range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

import msgspec

from trackhub.errors import ConfigError

__all__ = ["ENV_PREFIX", "Limits", "convert"]

ENV_PREFIX = "TRACKHUB_"
"""Environment variables that set a limit are this followed by its name in capitals: ``TRACKHUB_DEADLINE_S=60``."""

_StructT = TypeVar("_StructT", bound=msgspec.Struct)

_RANGES: dict[str, tuple[float, float]] = {
    "batch_records": (1, 100_000),
    "batch_bytes": (4096, 8 << 20),
    "poll_s": (0.001, 10),
    "linger_s": (0, 60),
    "spool_bytes": (1 << 20, 1 << 50),
    "request_s": (0.1, 600),
    "barrier_s": (0, 3600),
    "gate_s": (0, 3600),
    "deadline_s": (0, 86_400),
    "preflight_s": (0.1, 600),
    "keepalive_s": (0.1, 60),
    "silence_s": (0.2, 3600),
    "flush_s": (0.01, 600),
}
_WHOLE = frozenset({"batch_records", "batch_bytes", "spool_bytes"})


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much, how often and how long. Every wait in trackhub has its limit here.

    Raises:
        ConfigError: a value is of the wrong type or out of its range.
    """

    batch_records: int = 1000
    """Most records in one message from a site to the receiver; 1 to 100,000. Default 1000: larger batches are no faster,
    and one lost message costs more to send again."""

    batch_bytes: int = 1 << 20
    """Most bytes of frames in one message, and the size of the pieces of a file; 4 KiB to 8 MiB. A single larger
    record travels alone. Default 1 MiB, which FLARE's channels carry without streaming."""

    poll_s: float = 0.05
    """Seconds between two looks at the spool while it is idle; 0.001 to 10. Default 0.05: charts feel live, and an idle
    site costs next to nothing."""

    linger_s: float = 1.0
    """Seconds that records may wait at the site after a message, so that the next one carries more; 0 (never) to 60.
    Default 1: a message through FLARE takes some milliseconds of Python in the process that trains, and one for each
    training step would slow down steps that take as little. The end of a round, and 64 KiB of records, wait for
    nothing."""

    spool_bytes: int = 1 << 30
    """Most bytes of a site's spool on disk; 1 MiB to 1 PiB. When it is full, new records are dropped and counted.
    Default 1 GiB: some ten million scalars, hours of a receiver that is away."""

    request_s: float = 10.0
    """Longest wait in seconds of a site for the receiver's answer to one message, before it is sent again; 0.1 to 600.
    Default 10; half of ``silence_s`` where that is less, or one lost answer would make the site look dead."""

    barrier_s: float = 10.0
    """Longest wait in seconds, once per round, before a task's result is sent, until what was logged is acked; 0 (do
    not wait) to 3600. Default 10. A receiver that does not answer costs this once, not once per round."""

    gate_s: float = 30.0
    """Longest time in seconds that the server holds its end of job until every site said that it is done; 0 to 3600.
    Default 30. Records that come later are not in the receiver's journal; they stay in the site's spool."""

    deadline_s: float = 30.0
    """Longest time in seconds, for all lanes together, to bring what is journaled into the backends at the end of the
    job; 0 to 86,400. Default 30. What is left stays in the journal for ``trackhub replay``."""

    preflight_s: float = 10.0
    """Longest time in seconds for a backend's check before training starts; 0.1 to 600. Default 10. A check that takes
    longer counts as "not now": training starts, and the records wait in the journal."""

    keepalive_s: float = 2.0
    """Seconds between two signs of life of a site that has nothing to send; 0.1 to 60. Default 2."""

    silence_s: float = 7.0
    """Seconds without any message after which the receiver takes a site for gone; 0.2 to 3600, and at least twice
    ``keepalive_s``, or one late message would count as death. Default 7: three signs of life missed."""

    durability: Literal["normal", "full"] = "normal"
    """What an acked record survives: ``normal`` the death of the receiver's process, ``full`` also the machine's loss of
    power, at about 3 ms of disk time for every batch. Default ``normal``."""

    flush_s: float = 1.0
    """Seconds at most from handing records to a backend that buffers to asking it to make them durable; 0.01 to 600.
    Default 1: a crash costs at most a second's worth of records sent again."""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            numeric = int if name in _WHOLE else (int, float)
            if isinstance(value, bool) or not isinstance(value, numeric):
                expected = "a whole number" if name in _WHOLE else "a number"
                raise ConfigError(f"limits.{name}: expected {expected}, got {value!r}")
            if not (math.isfinite(value) and low <= value <= high):
                raise ConfigError(f"limits.{name}: {value!r} is out of range; expected {low:,} to {high:,}")
        if self.durability not in ("normal", "full"):
            raise ConfigError(f"limits.durability: expected 'normal' or 'full', got {self.durability!r}")
        if self.silence_s < 2 * self.keepalive_s:
            raise ConfigError(
                f"limits.silence_s: {self.silence_s} must be at least twice limits.keepalive_s ({self.keepalive_s}), "
                f"or a site whose one message is late is taken for gone"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> Self:
        """Return limits with these values; those not given come from ``environ`` where set there, else the defaults.

        Args:
            values: limit name to value; strings are accepted for numbers.
            environ: environment variables to read, named ``TRACKHUB_<LIMIT>``; None reads none.

        Raises:
            ConfigError: a limit is unknown, or its value is of the wrong type or out of range.
        """
        unknown = sorted(set(values) - set(cls.__struct_fields__))
        if unknown:
            raise ConfigError(f"limits.{unknown[0]}: unknown limit; there are: {', '.join(cls.__struct_fields__)}")
        found = {}
        for name in cls.__struct_fields__:
            if environ is not None and (variable := ENV_PREFIX + name.upper()) in environ:
                found[name] = environ[variable]
        return convert({**found, **values}, cls, "limits")


def convert(values: Mapping[str, Any], into: type[_StructT], root: str) -> _StructT:
    try:
        return msgspec.convert(values, into, strict=False)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        what, _, path = str(error).rpartition(" - at `$")
        what = what or str(error)
        where = f"{root}{path.rstrip('`')}" if what != str(error) else root
        raise ConfigError(f"{where}: {what[:1].lower()}{what[1:]}") from None
