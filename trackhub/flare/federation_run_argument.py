# SPDX-License-Identifier: Apache-2.0
"""The receiver's argument ``federation`` in a job's configuration: what the job's federation run holds.

`trackhub.flare.recipe` writes it, and `trackhub.flare.receiver_widget` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import msgspec

from trackhub.delivery import FederationOptions
from trackhub.errors import ConfigError
from trackhub.plain_values_to_structs import convert

__all__ = ["FederationSettings", "check_has_federation_run"]


class FederationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the federation run holds.

    Attributes:
        aggregate, aggregate_weight: as in `FederationOptions`.
        update_statistics: measure what each site changed in the model.
    """

    aggregate: tuple[str, ...] | None = None
    aggregate_weight: str | None = None
    update_statistics: bool = False

    @classmethod
    def of(cls, value: object) -> Self | None:
        """Read a component's argument: settings by name, or True or False. None without a federation run.

        Raises:
            ConfigError: it has another form.
        """
        if isinstance(value, bool):
            return cls() if value else None
        if not isinstance(value, Mapping):
            raise ConfigError(f"tracking: federation: expected true, false or settings by name, got {value!r}")
        patterns, weight = value.get("aggregate"), value.get("aggregate_weight")
        is_list = isinstance(patterns, list | tuple) and all(isinstance(p, str) and p for p in patterns)
        if patterns is not None and not is_list:
            raise ConfigError(f"tracking: aggregate: expected a list of patterns such as 'val/*', got {patterns!r}")
        if weight is not None and not (isinstance(weight, str) and weight):
            raise ConfigError(f"tracking: aggregate_weight: expected a key such as 'train/samples', got {weight!r}")
        if weight is not None and patterns is not None and not patterns:
            raise ConfigError(
                f"tracking: aggregate_weight: {weight!r} is the weight of statistics, but aggregate is an empty "
                "list, so there are no statistics. Leave out one of the two"
            )
        return convert(value, cls, "tracking")

    def options(self) -> FederationOptions:
        """Return the settings that the receiver itself needs."""
        return FederationOptions(self.aggregate, self.aggregate_weight)

    @classmethod
    def argument(
        cls, federation: bool, aggregate: Sequence[str] | None, aggregate_weight: str | None, update_statistics: bool
    ) -> bool | dict[str, Any]:
        """Check these arguments of `add_tracking`, and return the component's argument for them, as JSON values.

        Args:
            federation, aggregate, aggregate_weight, update_statistics: as for `add_tracking`.

        Raises:
            ConfigError: one of them is wrong.
        """
        given = {
            "aggregate": aggregate, "aggregate_weight": aggregate_weight, "update_statistics": bool(update_statistics)
        }  # fmt: skip
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(cls.of(given)))
        return (plain or True) if federation else False


def check_has_federation_run(federation: bool, has_server: bool, **given: object) -> None:
    """Refuse arguments about the federation run if the job has no such run.

    Args:
        federation: as for `add_tracking`.
        has_server: there are backends on the server.
        given: the arguments, by name. None, False and an empty list ask for nothing.

    Raises:
        ConfigError: the job has no federation run, so one of the arguments would do nothing.
    """
    name = next((name for name, value in given.items() if value), None)
    if name is None or (federation and has_server):
        return
    value = given[name]
    if not has_server:
        raise ConfigError(
            f"tracking: {name}={value!r} is about the federation run, and this job has none, since no backend is on "
            f"the server. Give server={{backend: options}} as well, or leave out {name}"
        )
    raise ConfigError(
        f"tracking: {name}={value!r} contradicts federation={federation!r}, which turns the federation run off. Leave "
        "out one of the two"
    )
