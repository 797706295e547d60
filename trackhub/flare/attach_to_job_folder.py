# SPDX-License-Identifier: Apache-2.0
"""Adds tracking to an exported FLARE job: to the JSON and HOCON files in its folder.

``trackhub attach`` calls it. It reads which apps the job has, and inserts the components of
`trackhub.flare.recipe.tracking_components`. In a HOCON file it inserts them as text, so that comments stay. It then
parses the new text with FLARE's own parsers, and gives up if anything else has changed.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE

from trackhub.errors import ConfigError
from trackhub.flare.find_analytics_listeners import client_warning, is_of_a_product, server_warning
from trackhub.flare.recipe import MIN_SHUTDOWN_TIMEOUT_S

__all__ = ["ByHand", "Change", "clients_of", "plan_attach", "write_changes"]

Components = Mapping[str, list[dict[str, Any]]]
"""What `tracking_components` returns: the components by the name of the JSON file that gets them."""

_SERVER_FILE, _CLIENT_FILE = "config_fed_server.json", "config_fed_client.json"
_SIDES = {_SERVER_FILE: "server", _CLIENT_FILE: "client"}
_JSON, _HOCON, _YAML = (".json",), (".conf",), (".yml", ".yaml")  # in the order in which FLARE looks for them
_ALL_SITES, _SERVER = "@ALL", "server"
_ORIGINAL = ".orig"
_EXTERNAL = "external_process"
_RECEIVERS = ("AnalyticsReceiver", "MLflowReceiver", "WandBReceiver")


class Change(NamedTuple):
    """A file that gets tracking.

    Attributes:
        path: the file.
        old, new: its text.
        notes: what a person should know or also do, one sentence each.
    """

    path: Path
    old: str
    new: str
    notes: list[str]

    def diff(self) -> str:
        """Return the change as a unified diff."""
        names = (f"{self.path}{_ORIGINAL}", str(self.path))
        lines = difflib.unified_diff(self.old.splitlines(), self.new.splitlines(), *names, lineterm="", n=1)
        return "\n".join(lines)


class ByHand(NamedTuple):
    """A file that a person must change.

    Attributes:
        path: the file.
        block: what to put into it.
        reason: why trackhub cannot change the file.
    """

    path: Path
    block: str
    reason: str


def plan_attach(job: Path, components: Components) -> tuple[list[Change], list[ByHand], list[str]]:
    """Return what to change in a job's folder, and change nothing.

    Args:
        job: the folder with the job's meta file.
        components: what to insert.

    Returns:
        The files to change, the files that a person must change, and what the job's own receivers of analytics events
        will get, one sentence for each side that has some.

    Raises:
        ConfigError: the folder holds no job, an app has no configuration, or the job has tracking already.
    """
    changes, by_hand, tracked = [], [], []
    listening: dict[str, list[str]] = {name: [] for name in _SIDES}
    for folder, sides in _apps(job):
        for name, new in components.items():
            if _SIDES[name] in sides:
                listening[name] += _listeners(folder, name)
            if new and _SIDES[name] in sides:
                path = _config_file(folder, name)
                found = _attach(path, new)
                if found is None:
                    tracked.append(path)
                else:
                    changes.append(found) if isinstance(found, Change) else by_hand.append(found)
    if tracked:  # all at once, so that nobody has to call the command once for each file
        raise ConfigError(
            f"attach: the job has tracking already, in {', '.join(map(str, tracked))}. To change it, put the originals "
            f"back first: {'; '.join(f'mv {quote(str(_original(path)))} {quote(str(path))}' for path in tracked)}"
        )
    if not changes and not by_hand:
        raise ConfigError(f"attach: {job}: no app of this job runs on a side that tracks")
    return changes, by_hand, _warnings(components, listening)


def write_changes(changes: list[Change]) -> None:
    """Write the changed files, and keep each original beside it, with ``.orig`` at the end of its name.

    Raises:
        ConfigError: other originals are there already. The message names all of them.
        OSError: a file cannot be written. The files before it are written.
    """
    kept = [(_original(change.path), change) for change in changes]
    others = [str(file) for file, change in kept if file.exists() and file.read_text(encoding="utf-8") != change.old]
    if others:
        raise ConfigError(
            f"attach: originals are there already, and differ from the present files: {', '.join(others)}. "
            "Move them away first"
        )
    for change in changes:
        _original(change.path).write_text(change.old, encoding="utf-8")
        new = change.path.with_name(f"{change.path.name}.new")
        new.write_text(change.new, encoding="utf-8")
        os.replace(new, change.path)


def clients_of(job: Path) -> int:
    """Return how many clients a job needs, as its meta file says; 2 if it does not say."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return max(1, int(_read(_file_of(job, "meta") or job).get("min_clients", 2)))
    return 2


def _original(path: Path) -> Path:
    return path.with_name(path.name + _ORIGINAL)


def _apps(job: Path) -> Iterator[tuple[Path, set[str]]]:
    """Yield the configuration folder of each app, and the sides on which the app runs."""
    path = _file_of(job, "meta")
    if path is None:
        inner = sorted(path.parent.name for path in job.glob("*/meta.*"))
        hint = f"; give one of these: {', '.join(inner)}" if inner else "; export the job first: recipe.export(FOLDER)"
        raise ConfigError(f"attach: {job}: expected the folder of a job, with its meta.json{hint}")
    try:
        meta = _read(path)
    except Exception as e:
        raise ConfigError(f"attach: {path} cannot be read: {e}") from e
    deploy_map = meta.get("deploy_map") if isinstance(meta, dict) else None
    if not isinstance(deploy_map, dict) or not deploy_map:
        raise ConfigError(f"attach: {path}: expected a deploy_map that names the job's apps")
    for app, targets in deploy_map.items():
        sites = {target if isinstance(target, str) else str(target.get("sites")) for target in targets or ["@ALL"]}
        server = bool(sites & {_ALL_SITES, _SERVER})
        clients = bool(sites - {_SERVER})
        yield job / app / "config", {side for side, on in (("server", server), ("client", clients)) if on}


def _file_of(folder: Path, stem: str) -> Path | None:
    """Return the file that FLARE would read for this name: the one whose ending FLARE tries first."""
    paths = (folder / f"{stem}{ending}" for ending in (*_JSON, *_HOCON, *_YAML))
    return next((path for path in paths if path.is_file()), None)


def _config_file(folder: Path, name: str) -> Path:
    """Return the app's configuration file for one side.

    Raises:
        ConfigError: there is none.
    """
    stem = name.removesuffix(".json")
    if (path := _file_of(folder, stem)) is None:
        raise ConfigError(f"attach: {folder}: expected {stem}.json, .conf or .yml in this folder")
    return path


def _listeners(folder: Path, name: str) -> list[str]:
    """Return the components of one side that listen to FLARE's analytics events, each as ``id (class)``.

    FLARE's receivers listen. A component of another package or of the app's own code counts as a listener if its module
    or an argument names the event. Nothing is returned for a file that cannot be read: `_attach` says so, if it has to
    change it.
    """
    try:
        components = _components(_read(_config_file(folder, name)))
    except Exception:  # a parser of HOCON or YAML may raise anything
        return []
    found = []
    for component in components:
        path = str(component.get("path") or "")
        kind = path or str(component.get("name") or "")  # FLARE looks for a name among its own classes
        is_own = bool(path) and not is_of_a_product(path)
        names_event = is_own and (_names_event(component.get("args")) or _source_names_event(folder.parent, path))
        if kind.endswith(_RECEIVERS) or names_event:
            found.append(f"{component.get('id')} ({kind.rpartition('.')[2]})")
    return found


def _names_event(value: object) -> bool:
    return ANALYTIC_EVENT_TYPE in json.dumps(value, default=str)


def _source_names_event(app: Path, kind: str) -> bool:
    source = (app / "custom").joinpath(*kind.split(".")[:-1]).with_suffix(".py")
    try:
        text = source.read_text(encoding="utf-8") if source.is_file() else ""
    except (OSError, ValueError):
        return False
    return ANALYTIC_EVENT_TYPE in text or "ANALYTIC_EVENT_TYPE" in text


def _warnings(components: Components, listening: Mapping[str, list[str]]) -> list[str]:
    """Return what becomes of the listeners of both sides, in sentences."""
    senders = [component["args"] for component in components[_CLIENT_FILE] if "take_over" in component["args"]]
    take_over = senders[0]["take_over"] if senders else True  # the default is left out
    has_server_side = bool(components[_SERVER_FILE])
    found = [
        server_warning(listening[_SERVER_FILE], take_over, has_server_side=has_server_side),
        client_warning(listening[_CLIENT_FILE], take_over),
    ]
    return [warning.removeprefix("trackhub: ") for warning in found if warning]


def _attach(path: Path, new: list[dict[str, Any]]) -> Change | ByHand | None:
    """Return the change of one file. None if it has tracking already.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        old = path.read_text(encoding="utf-8")
        before = _parse(path, old)
        present = _components(before)
    except Exception as e:
        raise ConfigError(f"attach: {path} cannot be read: {e}") from e
    if any(str(c.get("path", "")).startswith("trackhub.flare.") for c in present):
        return None
    if path.suffix in _YAML:
        import yaml  # type: ignore[import-untyped]  # a dependency of FLARE

        block = yaml.safe_dump({"components": new}, sort_keys=False, width=100)
        return ByHand(path, block, "trackhub does not change YAML; add these to its list of components")
    after, notes = _with_components(before, new, path)
    text = _json_text(old, after) if path.suffix in _JSON else _hocon_text(old, new)
    try:
        if _parse(path, text) != after:
            raise ValueError("more than its components would change")
    except Exception as e:
        return ByHand(path, json.dumps({"components": new}, indent=2), f"trackhub cannot change this file ({e})")
    return Change(path, old, text, notes)


def _with_components(before: Any, new: list[dict[str, Any]], path: Path) -> tuple[Any, list[str]]:
    """Return the configuration with the new components, and notes. In JSON, external trainers get time to end."""
    after, notes = copy.deepcopy(before), []
    after["components"] = [*_components(before), *new]
    for arguments in _trainers_without_time(after):
        if path.suffix in _JSON:
            arguments["shutdown_timeout"] = MIN_SHUTDOWN_TIMEOUT_S
            notes.append(f"shutdown_timeout was 0. It is now {MIN_SHUTDOWN_TIMEOUT_S:.0f} s.")
        else:
            notes.append(
                f"shutdown_timeout of the executor is 0, so FLARE may kill a trainer before its last lines run. "
                f"Set it to {MIN_SHUTDOWN_TIMEOUT_S:.0f}."
            )
    return after, notes


def _trainers_without_time(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the arguments of each component that starts external trainers and does not wait for their end."""
    executors = [entry.get("executor") for entry in config.get("executors") or [] if isinstance(entry, dict)]
    parts = [part for part in [*executors, *_components(config)] if isinstance(part, dict)]
    for part in parts:
        arguments = part.get("args")
        if isinstance(arguments, dict):
            # A launcher's default is 0. The executor's default is not 0.
            otherwise = 0 if str(part.get("path", "")).endswith(".SubprocessLauncher") else None
            is_external = otherwise == 0 or arguments.get("execution_mode") == _EXTERNAL
            if is_external and arguments.get("shutdown_timeout", otherwise) == 0:
                yield arguments


def _components(config: Any) -> list[dict[str, Any]]:
    if not isinstance(config, dict) or not isinstance(config.get("components") or [], list):
        raise TypeError("expected a mapping with a list of components")
    return [component for component in config.get("components") or [] if isinstance(component, dict)]


def _read(path: Path) -> Any:
    return _parse(path, path.read_text(encoding="utf-8"))


def _parse(path: Path, text: str) -> Any:
    if path.suffix in _JSON:
        return json.loads(text)
    if path.suffix in _YAML:
        import yaml

        return yaml.safe_load(text)
    from pyhocon import ConfigFactory  # type: ignore[import-untyped]  # a dependency of FLARE, which reads jobs with it

    return _plain(ConfigFactory.parse_string(text, basedir=str(path.parent)).as_plain_ordered_dict())


def _plain(value: Any) -> Any:
    """Return what pyhocon parsed as plain dicts and lists. pyhocon keeps a key's quotes; they are removed."""
    if isinstance(value, dict):
        return {str(key).strip('"'): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _json_text(old: str, after: Any) -> str:
    """Return the configuration as JSON with the indentation of the old text."""
    second = next((line for line in old.splitlines()[1:] if line.strip()), "  ")
    indent = len(second) - len(second.lstrip())
    return json.dumps(after, indent=indent or 2, ensure_ascii=False) + ("\n" if old.endswith("\n") else "")


def _hocon_text(old: str, new: list[dict[str, Any]]) -> str:
    """Return the text with the components at its end. HOCON adds them to the list that is there."""
    # HOCON reads a key with a dot as a path, unless the key is quoted. JSON quotes all keys.
    block = f"components += {json.dumps(new, indent=2, ensure_ascii=False)}\n"
    body = old.rstrip()
    if not _has_outer_braces(body):
        return f"{body}\n\n{block}"
    inner = body[: body.rindex("}")].rstrip()
    indented = "".join(f"  {line}\n" for line in block.splitlines())
    return f"{inner}\n\n{indented}}}\n"


def _has_outer_braces(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith(("#", "//"))]
    return bool(lines) and lines[0].lstrip().startswith("{") and lines[-1].rstrip().endswith("}")
