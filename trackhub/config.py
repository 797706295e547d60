# SPDX-License-Identifier: Apache-2.0
"""What a job is configured with: which backends, with which options, on which side, within which limits.

The same configuration can come from flags, from a TOML file, or from a plain mapping::

    backends = ["tensorboard", "wandb"]
    sides = ["server"]

    [options.wandb]
    project = "cifar10"

    [limits]
    deadline_s = 60

Nothing here imports a plugin: whether a backend exists and takes an option is for ``trackhub.registry`` to say.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import msgspec

from trackhub.errors import ConfigError
from trackhub.secrets import refuse_literal_secrets

__all__ = ["ENV_PREFIX", "Limits", "TrackingConfig", "parse_option_flags"]

ENV_PREFIX = "TRACKHUB_"
"""Environment variables that set a limit are this followed by its name in capitals: ``TRACKHUB_DEADLINE_S=60``."""

_StructT = TypeVar("_StructT", bound=msgspec.Struct)
_Side = Literal["server", "client"]

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
    """Most records in one message from a site to the sink; 1 to 100,000. Default 1000: larger batches are no faster,
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
    Default 1 GiB: some ten million scalars, hours of a sink that is away."""

    request_s: float = 10.0
    """Longest wait in seconds of a site for the sink's answer to one message, before it is sent again; 0.1 to 600.
    Default 10; half of ``silence_s`` where that is less, or one lost answer would make the site look dead."""

    barrier_s: float = 10.0
    """Longest wait in seconds, once per round, before a task's result is sent, until what was logged is acked; 0 (do
    not wait) to 3600. Default 10. A sink that does not answer costs this once, not once per round."""

    gate_s: float = 30.0
    """Longest time in seconds that the server holds its end of job until every site said that it is done; 0 to 3600.
    Default 30. Records that come later are not in the sink's journal; they stay in the site's spool."""

    deadline_s: float = 30.0
    """Longest time in seconds, for all lanes together, to bring what is journaled into the backends at the end of the
    job; 0 to 86,400. Default 30. What is left stays in the journal for ``trackhub replay``."""

    preflight_s: float = 10.0
    """Longest time in seconds for a backend's check before training starts; 0.1 to 600. Default 10. A check that takes
    longer counts as "not now": training starts, and the records wait in the journal."""

    keepalive_s: float = 2.0
    """Seconds between two signs of life of a site that has nothing to send; 0.1 to 60. Default 2."""

    silence_s: float = 7.0
    """Seconds without any message after which the sink takes a site for gone; 0.2 to 3600, and at least twice
    ``keepalive_s``, or one late message would count as death. Default 7: three signs of life missed."""

    durability: Literal["normal", "full"] = "normal"
    """What an acked record survives: ``normal`` the death of the sink's process, ``full`` also the machine's loss of
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
        return _convert({**found, **values}, cls, "limits")


class TrackingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One job's tracking.

    Attributes:
        backends: names of the backends, on every side. Empty turns tracking off.
        client_backends: names of the backends at the clients where those differ; None for the same.
        options: backend name to its options, as plain values.
        sides: where the sinks are: ``server``, ``client`` or both.
        limits: how much, how often and how long.

    Raises:
        ConfigError: the parts do not fit together, or an option holds a literal secret.
    """

    backends: tuple[str, ...] = ("tensorboard",)
    client_backends: tuple[str, ...] | None = None
    options: dict[str, dict[str, Any]] = {}
    sides: tuple[_Side, ...] = ("server",)
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        for field, names in (("backends", self.backends), ("client_backends", self.client_backends or ())):
            for name in names:
                if not name or names.count(name) > 1:
                    raise ConfigError(f"{field}: {name!r} is {'given more than once' if name else 'not a name'}")
        named = {*self.backends, *(self.client_backends or ())}
        for name, options in self.options.items():
            if name not in named:
                raise ConfigError(
                    f"options.{name}: there is no backend {name!r} in this job; it has: "
                    f"{', '.join(sorted(named)) or 'none'}"
                )
            refuse_literal_secrets(name, options)
        if named and not self.sides:
            raise ConfigError(
                "sides: backends are given, but no side to run them on; expected 'server', 'client' or both"
            )

    @property
    def server(self) -> dict[str, dict[str, Any]] | None:
        """The server's backends and their options, in the form that ``add_tracking(server=...)`` takes."""
        return self._sink(self.backends) if "server" in self.sides else None

    @property
    def clients(self) -> dict[str, dict[str, Any]] | None:
        """Each client's backends and their options, in the form that ``add_tracking(clients=...)`` takes."""
        names = self.backends if self.client_backends is None else self.client_backends
        return self._sink(names) if "client" in self.sides else None

    def _sink(self, names: tuple[str, ...]) -> dict[str, dict[str, Any]] | None:
        return {name: dict(self.options.get(name, {})) for name in names} or None

    @classmethod
    def from_flags(
        cls,
        backends: Iterable[str],
        *,
        client_backends: Iterable[str] | None = None,
        options: Iterable[str] = (),
        streamed_to_server: bool = True,
        streamed_to_clients: bool = False,
        limits: Limits | None = None,
    ) -> Self:
        """Return the configuration that command line flags describe.

        Args:
            backends: names; the single name ``none`` turns tracking off.
            client_backends: names at the clients, where they differ.
            options: ``NAME.KEY=VALUE`` strings.
            streamed_to_server: run the backends on the server.
            streamed_to_clients: run the backends at each client.
            limits: how much, how often and how long; None for the defaults.

        Raises:
            ConfigError: tracking is on but on no side, or the flags contradict each other.
        """
        names = _names(backends, "--backend")
        clients = None if client_backends is None else _names(client_backends, "--client_backend")
        if (names or clients) and not (streamed_to_server or streamed_to_clients):
            raise ConfigError(
                "tracking has no side to run on: give --streamed_to_server or --streamed_to_clients (or both), or turn "
                "it off with --backend none"
            )
        sides = [side for side, on in (("server", streamed_to_server), ("client", streamed_to_clients)) if on]
        return _convert(
            {
                "backends": names,
                "client_backends": clients,
                "options": parse_option_flags(options),
                "sides": sides,
                "limits": limits or Limits(),
            },
            cls,
            "tracking",
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> Self:
        """Return the configuration in a plain mapping, as TOML or JSON give it.

        Args:
            values: the attributes of this class; ``limits`` as a mapping.
            environ: where to look for limits that are not given; None for this process's environment.

        Raises:
            ConfigError: a key is unknown or a value wrong; the message has the path to it.
        """
        unknown = sorted(set(values) - set(cls.__struct_fields__))
        if unknown:
            raise ConfigError(f"{unknown[0]}: unknown key; there are: {', '.join(cls.__struct_fields__)}")
        limits = values.get("limits", {})
        if not isinstance(limits, Limits | Mapping):
            raise ConfigError(f"limits: expected a table of limits, got {limits!r}")
        if not isinstance(limits, Limits):
            limits = Limits.from_mapping(limits, environ=os.environ if environ is None else environ)
        return _convert({**values, "limits": limits}, cls, "tracking")

    @classmethod
    def from_toml(cls, path: str | Path, *, environ: Mapping[str, str] | None = None) -> Self:
        """Return the configuration in a TOML file.

        Raises:
            ConfigError: the file cannot be read, is not TOML, or what it says is wrong.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: is not valid TOML: {error}") from error
        try:
            return cls.from_mapping(values, environ=environ)
        except ConfigError as error:
            raise type(error)(f"{path}: {error}") from error


def parse_option_flags(flags: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return ``{name: {key: value}}`` from ``NAME.KEY=VALUE`` strings.

    Values stay strings, to be converted by the option's type, except that a valid JSON list or object becomes one:
    ``wandb.tags=["a", "b"]``.

    Raises:
        ConfigError: a flag is not of this form, or gives a key a second, different value.
    """
    options: dict[str, dict[str, Any]] = {}
    for flag in flags:
        path, equals, text = flag.partition("=")
        name, dot, key = path.strip().partition(".")
        if not (equals and dot and name and key):
            # The text after "=" is not shown: it may be a secret.
            raise ConfigError(f"--option {path.strip()!r}: expected NAME.KEY=VALUE, such as tensorboard.logdir=curves")
        value = _flag_value(text)
        earlier = options.setdefault(name, {})
        if key in earlier and earlier[key] != value:
            raise ConfigError(f"--option {name}.{key}: given twice, with different values")
        earlier[key] = value
    return options


def _flag_value(text: str) -> Any:
    if text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _names(values: Iterable[str], flag: str) -> list[str]:
    if isinstance(values, str):
        raise ConfigError(f"{flag}: expected a list of names, got the string {values!r}")
    names = list(dict.fromkeys(values))
    if "none" in names:
        if len(names) > 1:
            raise ConfigError(f"{flag}: 'none' turns tracking off and cannot stand beside other backends")
        return []
    return names


def _convert(values: Mapping[str, Any], into: type[_StructT], root: str) -> _StructT:
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
