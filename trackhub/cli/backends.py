# SPDX-License-Identifier: Apache-2.0
"""``trackhub backends``: what is installed, whether it can be used, and what it can store.

It asks `trackhub.registry`, and imports plugins but no tracking SDK.
"""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from trackhub import registry
from trackhub.cli.backend_option_help import option_help
from trackhub.cli.check_operator_file import check_operator_file
from trackhub.cli.output import print_json, print_lines, print_table
from trackhub.errors import PluginError
from trackhub.spi import SPI_VERSION, Backend, Capabilities, KeyRule, OptionMark

__all__ = ["backends", "describe"]

JSON_VERSION = 1
"""Version of the JSON document. New keys do not raise it. No key is removed, and none changes its meaning."""

_TEXT_WIDTH = 110


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; its keys are stable.")
@click.option("--check", is_flag=True, help="Do what a job does before training: is each backend ready, and logged in?")
@click.option(
    "--workspace",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="With --check: check the operator's file local/trackhub.toml in this workspace of a FLARE site instead.",
)
def backends(name: str | None, as_json: bool, check: bool, workspace: Path | None) -> None:
    """List the installed backends and what each can store.

    With NAME, say more about that one: its options, what confirms a record, and which keys it can store. A backend that
    cannot be used is listed with the reason. The command imports plugins, but no tracking SDK.

    With --check, set up each backend as a job without options would, with the environment of this shell, and say
    whether it is ready. That imports its SDK, and may ask its server. With --check and --workspace, validate what the
    operator of a FLARE site lets jobs do, and show it. The status is 1 if a backend is not ready, or if something in
    the operator's file is wrong.

    \b
    Examples:
      trackhub backends wandb               # what it can store, and its options
      trackhub backends --check             # can I use them here, and am I logged in?
      trackhub backends --check --workspace /opt/flare/site-1

    The JSON document is {"version": 1, "spi": N, "backends": [...]}. Each backend has name, distribution,
    distribution_version, entry_point, state ("ok", "broken" or "conflict") and problem, which is empty if the state is
    ok. The other keys are null unless the state is ok: spi, contract, options, option_marks, option_help and
    capabilities. contract is the version of the contract kit that the backend passed, 0 for none. options are the names
    of its options. option_marks has the marks of each option: "secret", "host", "path", "shared". option_help has for
    each option default, which is text or null if it must be given, and meaning. capabilities are those of
    trackhub.spi.Capabilities; kinds are names, also in key_rules and files_beside. With --check, the document is
    {"version": 1, "checked": [...]}. Each has name, ready ("yes", "no" or "not now") and remark.
    """
    if workspace is not None:
        if not check or name is not None or as_json:
            raise click.UsageError("--workspace goes with --check, and with neither NAME nor --json")
        check_operator_file(workspace)
        return
    if check:
        _check(name, as_json)
        return
    found = describe(name)
    if as_json:
        print_json({"version": JSON_VERSION, "spi": SPI_VERSION, "backends": found})
    elif name is not None:
        print_lines(*(line for backend in found for line in _details(backend)))
    elif found:
        _show_table(found)
    else:
        print_lines("No backend is installed.")


def _check(name: str | None, as_json: bool) -> None:
    """Say which backends are ready. Exit with 1 if one is not."""
    from trackhub.preflight import Readiness, check_ready  # here, since only this loads SDKs

    entries = registry.available()
    if name is not None and not any(entry.name == name for entry in entries):
        registry.load_entry(name, entries)  # raises the error that names the installed backends
    found = {entry.name: check_ready(entry.name, {}) for entry in entries if name in (None, entry.name)}
    if as_json:
        backends = [{"name": each, "ready": str(was.word), "remark": was.remark} for each, was in found.items()]
        print_json({"version": JSON_VERSION, "checked": backends})
    else:
        print_table(["backend", "ready", "remarks"], [[each, was.word, was.remark] for each, was in found.items()])
    if any(was.word != Readiness.YES for was in found.values()):
        sys.exit(1)


def describe(name: str | None = None) -> list[dict[str, Any]]:
    """Return what is known of each installed backend, sorted by name. Import the plugins that look usable.

    Args:
        name: describe only this backend.

    Raises:
        UnknownBackendError: no backend of this name is installed.
    """
    entries = registry.available()
    if name is not None and not any(entry.name == name for entry in entries):
        registry.load_entry(name, entries)  # raises the error that names the installed backends
    return [_describe(entry, entries) for entry in entries if name in (None, entry.name)]


def _describe(entry: registry.BackendEntry, entries: list[registry.BackendEntry]) -> dict[str, Any]:
    state, problem = str(entry.state), entry.problem
    cls: type[Backend[Any]] | None = None
    marks: dict[str, frozenset[OptionMark]] = {}
    helps: dict[str, dict[str, str | None]] = {}
    if entry.state == "ok":
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints must not become part of our JSON
                cls = registry.load_entry(entry.name, entries)
            marks = registry.option_marks(cls)
            helps = option_help(cls.Options)
        except PluginError as error:
            state, problem = "broken", str(error)
        except Exception as error:  # noqa: BLE001 - type hints run a plugin's code, and one plugin must not hide the others
            cls, state = None, "broken"
            problem = f"the types of its options cannot be read: {type(error).__name__}: {error}"
    return {
        "name": entry.name,
        "distribution": entry.distribution,
        "distribution_version": entry.version,
        "entry_point": entry.value,
        "state": state,
        "problem": problem,
        "spi": cls.spi if cls else None,
        "contract": cls.contract if cls else None,
        "options": list(marks) if cls else None,
        "option_marks": {option: sorted(marked) for option, marked in marks.items()} if cls else None,
        "option_help": helps if cls else None,
        "capabilities": _plain(cls.capabilities) if cls else None,
    }


def _plain(capabilities: Capabilities) -> dict[str, Any]:
    plain = msgspec.structs.asdict(capabilities)
    return {
        **plain,
        "kinds": [kind.name.lower() for kind in sorted(capabilities.kinds)],
        "files_beside": [kind.name.lower() for kind in sorted(capabilities.files_beside)],
        "redelivery": capabilities.redelivery.value,
        "confirmed_by": capabilities.confirmed_by.value,
        "key_rule": _plain_rule(capabilities.key_rule),
        "key_rules": {kind.name.lower(): _plain_rule(rule) for kind, rule in sorted(capabilities.key_rules.items())},
    }


def _plain_rule(rule: KeyRule) -> dict[str, Any]:
    plain = msgspec.structs.asdict(rule)
    return {**plain, "reserved_keys": sorted(rule.reserved_keys), "reserved_prefixes": list(rule.reserved_prefixes)}


def _show_table(found: Sequence[Mapping[str, Any]]) -> None:
    print_table(
        ["name", "distribution", "version", "state", "stores", "redelivery", "confirmed by", "contract"],
        [
            [
                backend["name"],
                backend["distribution"],
                backend["distribution_version"],
                backend["state"],
                " ".join(backend["capabilities"]["kinds"]) if backend["capabilities"] else "-",
                backend["capabilities"]["redelivery"] if backend["capabilities"] else "-",
                backend["capabilities"]["confirmed_by"] if backend["capabilities"] else "-",
                "-" if backend["contract"] is None else str(backend["contract"] or "none"),
            ]
            for backend in found
        ],
    )
    print_lines(*(f"{backend['name']}: {backend['problem']}" for backend in found if backend["problem"]))


def _details(backend: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a person reads of one backend."""
    yield f"{backend['name']}: {backend['distribution']} {backend['distribution_version']}, {backend['state']}"
    capabilities = backend["capabilities"]
    if capabilities is None:
        yield backend["problem"]
        return
    rows = {
        "stores": " ".join(capabilities["kinds"]),
        "redelivery": capabilities["redelivery"],
        "confirmed by": capabilities["confirmed_by"],
        "metrics may be": "NaN and infinite" if capabilities["nonfinite"] else "finite only",
        "steps may be": ", ".join(
            [
                "lower than earlier ones" if capabilities["late_steps"] else "not lower than earlier ones",
                "left out" if capabilities["optional_step"] else "counted where left out",
            ]
        ),
        "params": "may change" if capabilities["changing_params"] else "keep their first value",
        "batches": f"at most {capabilities['max_batch']:,} records",
        "contract kit": f"version {backend['contract']}" if backend["contract"] else "none",
        "keys": _rule_text(capabilities["key_rule"]),
        **{f"keys of {kind}": _rule_text(rule) for kind, rule in capabilities["key_rules"].items()},
    }
    width = max(map(len, rows))
    for label, text in rows.items():
        yield f"  {label.ljust(width)}  {text}"
    yield f"Options, as {backend['name']}.NAME=VALUE" if backend["option_help"] else "It has no options."
    for option, text in backend["option_help"].items():
        default = "must be given" if text["default"] is None else f"default: {text['default']}"
        marks = "".join(f", {mark}" for mark in backend["option_marks"][option])
        yield f"  {option} ({default}{marks})"
        if text["meaning"]:
            yield textwrap.fill(text["meaning"], _TEXT_WIDTH, initial_indent="      ", subsequent_indent="      ")


def _rule_text(rule: Mapping[str, Any]) -> str:
    """Return a key rule in words; trackhub changes every other key."""
    parts = []
    if rule["max_chars"] is not None:
        parts.append(f"at most {rule['max_chars']:,} characters")
    if rule["chars"]:
        parts.append(f"of [{rule['chars']}]")
    if rule["edge_chars"]:
        parts.append(f"first and last of [{rule['edge_chars']}]")
    if rule["is_path"]:
        parts.append("a relative path")
    if reserved := [*rule["reserved_keys"], *(f"{prefix}..." for prefix in rule["reserved_prefixes"])]:
        parts.append(f"none of {' '.join(reserved)}")
    return ", ".join(parts) or "any"
