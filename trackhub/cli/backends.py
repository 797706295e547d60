# SPDX-License-Identifier: Apache-2.0
"""``trackhub backends``: what is installed, whether it can be used, and what it can store."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click
import msgspec

from trackhub import registry
from trackhub.cli.output import print_json, print_lines, print_table
from trackhub.errors import PluginError
from trackhub.spi import SPI_VERSION, Backend, Capabilities

__all__ = ["backends", "describe"]

JSON_VERSION = 1
"""Version of the JSON document. Keys are added without raising it; none is removed or changes its meaning."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON; its keys are stable.")
def backends(as_json: bool) -> None:
    """List the installed backends and what each can store.

    A backend that cannot be used is listed with the reason. Plugins are imported for it, tracking SDKs are not.

    The JSON document is {"version": 1, "spi": N, "backends": [...]}. Each backend has name, distribution,
    distribution_version, entry_point, state ("ok", "broken" or "conflict"), problem (empty if ok), and where it is ok:
    spi, contract (version of the contract kit that it passed, 0 for none), options (their names) and capabilities;
    else these are null.
    """
    found = describe()
    if as_json:
        print_json({"version": JSON_VERSION, "spi": SPI_VERSION, "backends": found})
        return
    if not found:
        print_lines("No backend is installed.")
        return
    print_table(
        ["name", "distribution", "version", "state", "stores", "redelivery", "contract"],
        [
            [
                backend["name"],
                backend["distribution"],
                backend["distribution_version"],
                backend["state"],
                " ".join(backend["capabilities"]["kinds"]) if backend["capabilities"] else "-",
                backend["capabilities"]["redelivery"] if backend["capabilities"] else "-",
                "-" if backend["contract"] is None else str(backend["contract"] or "none"),
            ]
            for backend in found
        ],
    )
    print_lines(*(f"{backend['name']}: {backend['problem']}" for backend in found if backend["problem"]))


def describe() -> list[dict[str, Any]]:
    """Return what is known of each installed backend, by name, importing those that look usable."""
    entries = registry.available()
    return [_describe(entry, entries) for entry in entries]


def _describe(entry: registry.BackendEntry, entries: list[registry.BackendEntry]) -> dict[str, Any]:
    state, problem = str(entry.state), entry.problem
    cls: type[Backend[Any]] | None = None
    if entry.state == "ok":
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints while imported is not ours
                cls = registry.load_entry(entry.name, entries)
        except PluginError as error:
            state, problem = "broken", str(error)
    return {
        "name": entry.name,
        "distribution": entry.distribution,
        "distribution_version": entry.version,
        "entry_point": entry.value,
        "state": state,
        "problem": problem,
        "spi": cls.spi if cls else None,
        "contract": cls.contract if cls else None,
        "options": [field.encode_name for field in msgspec.structs.fields(cls.Options)] if cls else None,
        "capabilities": _plain(cls.capabilities) if cls else None,
    }


def _plain(capabilities: Capabilities) -> dict[str, Any]:
    plain = msgspec.structs.asdict(capabilities)
    plain["kinds"] = [kind.name.lower() for kind in sorted(capabilities.kinds)]
    plain["redelivery"] = capabilities.redelivery.value
    return plain
