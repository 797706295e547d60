# SPDX-License-Identifier: Apache-2.0
"""What a job is configured with: which backends, with which options, on which side, within which limits.

The same configuration can come from flags, from a TOML file, or from a plain mapping::

    backends = ["tensorboard", "wandb"]
    sides = ["server"]

    [options.wandb]
    project = "cifar10"

    [limits]
    deadline_s = 60

`jobs/cifar10_fedavg` and `trackhub.cli` make it from flags. Nothing here imports a plugin: `trackhub.registry` checks
whether a backend exists and which options it takes.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from trackhub.errors import ConfigError
from trackhub.limits import Limits
from trackhub.plain_values_to_structs import convert

__all__ = ["TrackingConfig", "parse_option_flags"]

_Side = Literal["server", "client"]


class TrackingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One job's tracking.

    Attributes:
        backends: names of the backends, on every side. An empty tuple turns tracking off.
        client_backends: names of the backends at the clients, if they differ from ``backends``; otherwise None.
        options: backend name to its options, as plain values.
        sides: where the receivers are: ``server``, ``client`` or both.
        limits: the sizes, pauses and waits.
        aggregate: patterns of the keys whose statistics the federation run holds. None for the keys that two or more
            sites log with the round as their step.
        aggregate_weight: the key of the metric that weights the sites in weighted means; None for the number of steps.
        update_statistics: measure what each site changed in the model.
        context: log in each run how the job was made.
        system_metrics: seconds between two measurements of each site's host and processes. None measures nothing.
        log_model: which of FLARE's global models the federation run gets. None logs no model.

    Raises:
        ConfigError: the parts do not fit together.
    """

    backends: tuple[str, ...] = ("tensorboard",)
    client_backends: tuple[str, ...] | None = None
    options: dict[str, dict[str, Any]] = {}
    sides: tuple[_Side, ...] = ("server",)
    limits: Limits = Limits()
    aggregate: tuple[str, ...] | None = None
    aggregate_weight: str | None = None
    update_statistics: bool = False
    context: bool = True
    system_metrics: float | None = None
    log_model: Literal["best", "last"] | None = None

    def __post_init__(self) -> None:
        for field, names in (("backends", self.backends), ("client_backends", self.client_backends or ())):
            for name in names:
                if not name or names.count(name) > 1:
                    problem = "is given more than once; name it once" if name else "is not the name of a backend"
                    raise ConfigError(f"{field}: {name!r} {problem}")
        if self.client_backends is not None and self.sides and "client" not in self.sides:
            raise ConfigError(
                f"client_backends: {list(self.client_backends)} contradicts sides: {list(self.sides)}. "
                "Nothing runs at the clients. Add 'client' to sides (--streamed_to_clients), or omit client_backends"
            )
        named = {*self.backends, *(self.client_backends or ())}
        if named and not self.sides:
            raise ConfigError(
                "sides: backends are given, but no side to run them on; expected 'server', 'client' or both"
            )
        about_the_run = ("aggregate", "aggregate_weight", "update_statistics", "log_model")
        for name in about_the_run if self.sides == ("client",) else ():
            if getattr(self, name):
                raise ConfigError(
                    f"{name}: it is about the federation run, which contradicts sides: ['client']. Only a server has a "
                    f"federation run. Add 'server' to sides (--streamed_to_server), or leave {name} out"
                )
        running = {*(self.server or ()), *(self.clients or ())}
        for name in self.options:
            if name not in running:
                raise ConfigError(
                    f"options.{name}: there is no backend {name!r} in this job; it has: "
                    f"{', '.join(sorted(running)) or 'none'}. Add the backend, or leave its options out"
                )

    @property
    def server(self) -> dict[str, dict[str, Any]] | None:
        """The server's backends and their options, in the form that ``add_tracking(server=...)`` takes."""
        return self._receiver(self.backends) if "server" in self.sides else None

    @property
    def clients(self) -> dict[str, dict[str, Any]] | None:
        """Each client's backends and their options, in the form that ``add_tracking(clients=...)`` takes."""
        names = self.backends if self.client_backends is None else self.client_backends
        return self._receiver(names) if "client" in self.sides else None

    def _receiver(self, names: tuple[str, ...]) -> dict[str, dict[str, Any]] | None:
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
        aggregate: Iterable[str] | None = None,
        aggregate_weight: str | None = None,
        update_statistics: bool = False,
        context: bool = True,
        system_metrics: float | None = None,
        log_model: str | None = None,
    ) -> Self:
        """Return the configuration that command line flags describe.

        Args:
            backends: names; the single name ``none`` turns tracking off.
            client_backends: names at the clients, if they differ.
            options: ``NAME.KEY=VALUE`` strings.
            streamed_to_server: run the backends on the server.
            streamed_to_clients: run the backends at each client.
            limits: sizes, pauses and waits; None for the defaults.
            aggregate: patterns of the keys whose statistics the federation run holds; None for the default.
            aggregate_weight, update_statistics: as in the attributes of this class.
            context, system_metrics, log_model: as in the attributes of this class.

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
        return convert(
            {
                "backends": names,
                "client_backends": clients,
                "options": parse_option_flags(options),
                "sides": sides,
                "limits": limits or Limits(),
                "aggregate": None if aggregate is None else list(aggregate),
                "aggregate_weight": aggregate_weight,
                "update_statistics": update_statistics,
                "context": context,
                "system_metrics": system_metrics,
                "log_model": log_model,
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
            raise ConfigError(f"{unknown[0]}: unknown key; expected one of {', '.join(cls.__struct_fields__)}")
        limits = values.get("limits", {})
        if not isinstance(limits, Limits | Mapping):
            raise ConfigError(f"limits: expected a table of limits, got {limits!r}")
        if not isinstance(limits, Limits):
            limits = Limits.from_mapping(limits, environ=os.environ if environ is None else environ)
        return convert({**values, "limits": limits}, cls, "tracking")

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

    A valid JSON list or object becomes one: ``wandb.tags=["a", "b"]``. All other values stay strings, which
    `trackhub.registry` converts to the option's type.

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
            raise ConfigError(f"--option {name}.{key}: given twice, with different values; give it once")
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
            raise ConfigError(f"{flag}: 'none' turns tracking off and cannot stand beside other backends; leave it out")
        return []
    return names
