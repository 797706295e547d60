# SPDX-License-Identifier: Apache-2.0
"""The installed backends: list them without importing any, load one by name, and check its options.

A backend is found by its entry point in the group ``trackhub.backends``. The entry point has the backend's name.
Trackhub's own backends are found in the same way. The receiver, `trackhub.flare.recipe` and the commands call this
module.
"""

from __future__ import annotations

import difflib
import errno
import functools
import importlib.util
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import msgspec

from trackhub.conceal import conceal, remember_secret
from trackhub.errors import (
    BackendConflictError,
    BackendLoadError,
    ConfigError,
    IncompatibleBackendError,
    InvalidOptionError,
    UnknownBackendError,
)
from trackhub.operator_file import FILE_NAME, OperatorFile
from trackhub.plain_values_to_structs import describe, one_at_a_time
from trackhub.secrets import (
    refuse_literal_secrets,
    refuse_references,
    remember_logins_in_urls,
    require_reference,
    resolve_secrets,
)
from trackhub.spi import SPI_VERSION, Backend, Capabilities, Credentials, Kind, OptionMark

__all__ = [
    "GROUP",
    "BackendEntry",
    "available",
    "build_options",
    "check_class",
    "check_options",
    "load",
    "load_entry",
    "may_be_elsewhere",
    "option_marks",
    "permitted_options",
]

GROUP = "trackhub.backends"
"""The entry-point group in which plugins name their backend class."""

_OURS = ("jsonl", "mlflow", "tensorboard", "wandb")
"""The backends that trackhub itself has, each but the first in a distribution of its own."""

_MISSPELT = 0.8
"""A name that is at least this similar to another one, by difflib, counts as its misspelling."""

RESERVED = frozenset({"none", "trackhub"})
"""Names that no backend can have: ``none`` turns tracking off, and the core's own folder is called ``trackhub``."""

# A backend's name is also a folder's name and the first part of ``NAME.KEY=VALUE``.
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_VALUE = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\s*:\s*(?P<attr>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")

_log = logging.getLogger(__name__)


class BackendEntry(msgspec.Struct, frozen=True):
    """One entry point: a backend that some installed distribution provides.

    Attributes:
        name: the backend's name.
        distribution, version: which distribution provides it.
        value: what the entry point names: ``module:Class``.
        state: ``conflict``: another distribution provides the same name. ``broken``: it cannot be loaded. Otherwise
            ``ok``. Nothing was imported for this, so an import may still fail.
        problem: why it is not ``ok``; empty if it is.
    """

    name: str
    distribution: str
    version: str
    value: str
    state: Literal["ok", "broken", "conflict"]
    problem: str


def available() -> list[BackendEntry]:
    """Return every backend that installed distributions name, sorted by name, without importing any of them."""
    found = sorted(set(_entry_points()))
    entries = []
    for name, distribution, version, value in found:
        rivals = [other for other in found if other[0] == name]
        problem = _visible_problem(name, value)
        state: Literal["ok", "broken", "conflict"] = "broken" if problem else "ok"
        if len(rivals) > 1:
            state, problem = "conflict", _conflict(name, rivals)
        entries.append(BackendEntry(name, distribution, version, value, state, problem))
    return entries


def load(name: str, *, allowed: Collection[str] | None = None) -> type[Backend[Any]]:
    """Import the backend of this name, and no other plugin, and check that it can be used.

    Args:
        name: the name of its entry point.
        allowed: the backends that the operator of this site allows; None for all.

    Raises:
        UnknownBackendError: no installed distribution provides it. The message names the installed backends.
        ConfigError: it is installed, but not allowed at this site.
        BackendConflictError: several distributions provide it.
        BackendLoadError: it does not import, or is not a usable backend class.
        IncompatibleBackendError: it was written for another version of the SPI.
        OSError: the process has too many open files, so nobody knows what is installed.
    """
    return load_entry(name, available(), allowed=allowed)


def load_entry(
    name: str, entries: Sequence[BackendEntry], *, allowed: Collection[str] | None = None
) -> type[Backend[Any]]:
    """Load the backend of this name as `load` does, without looking for the installed backends again.

    Args:
        name, allowed: as for `load`.
        entries: what `available` has returned just now.

    Raises:
        PluginError, ConfigError: as for `load`.
    """
    matches = [entry for entry in entries if entry.name == name]
    if not matches:
        raise UnknownBackendError(_unknown(name, entries))
    if allowed is not None and name not in allowed:
        raise ConfigError(
            f"backend {name!r} is not allowed at this site; its operator allows: "
            f"{', '.join(sorted(allowed)) or 'none'}. "
            f"The operator can add it to backends_allowed in local/{FILE_NAME}"
        )
    entry = matches[0]
    if entry.state == "conflict":
        raise BackendConflictError(entry.problem)
    origin = f"backend {name!r} ({entry.value}, from {entry.distribution} {entry.version})"
    if entry.state == "broken":
        raise BackendLoadError(f"{origin} cannot be used: {entry.problem}")
    try:
        loaded = metadata.EntryPoint(name, entry.value, GROUP).load()
    except (Exception, SystemExit) as error:  # a plugin's import runs anybody's code and may raise anything
        raise BackendLoadError(
            f"{origin} cannot be imported: {type(error).__name__}: {error}. "
            f"Install what it is missing, or reinstall {entry.distribution}"
        ) from error
    return check_class(loaded, origin)


def check_class(loaded: Any, origin: str) -> type[Backend[Any]]:
    """Check that a plugin's object is a usable backend class, and return it.

    Args:
        loaded: the object.
        origin: what it is and where it comes from; messages begin with it.

    Raises:
        BackendLoadError: it is not a usable backend class. The message says what it lacks.
        IncompatibleBackendError: it was written for another version of the SPI.
    """
    if not (isinstance(loaded, type) and issubclass(loaded, Backend)):
        raise BackendLoadError(f"{origin} is not a subclass of trackhub.spi.Backend")
    if not hasattr(loaded, "spi"):
        raise IncompatibleBackendError(
            f"{origin} does not say which version of trackhub's SPI it was written for. Write `spi = {SPI_VERSION}` "
            "into the class"
        )
    if loaded.spi != SPI_VERSION:
        raise IncompatibleBackendError(
            f"{origin} was written for version {loaded.spi!r} of trackhub's SPI, but this trackhub has version "
            f"{SPI_VERSION}. Install versions of the plugin and of flare-trackhub that belong together"
        )
    if loaded.open_run is Backend.open_run:
        raise BackendLoadError(f"{origin} does not implement open_run(info)")
    if not isinstance(loaded.capabilities, Capabilities):
        raise BackendLoadError(f"{origin}: its `capabilities` must be a trackhub.spi.Capabilities")
    if not isinstance(loaded.credentials, Credentials):
        raise BackendLoadError(f"{origin}: its `credentials` must be a trackhub.spi.Credentials")
    if problem := _capability_problem(loaded.capabilities):
        raise BackendLoadError(f"{origin}: its capabilities are wrong: {problem}")
    options = loaded.Options
    if not (isinstance(options, type) and issubclass(options, msgspec.Struct)):
        raise BackendLoadError(f"{origin}: its `Options` must be a msgspec.Struct")
    if not options.__struct_config__.forbid_unknown_fields:
        # Otherwise a misspelt option would silently be dropped.
        raise BackendLoadError(f"{origin}: its `Options` must be declared with forbid_unknown_fields=True")
    return loaded


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Check a backend's options when a job is written, and return them as JSON can hold them.

    Literal secrets are refused in any case. The names and types of options can be checked only if the backend is
    installed here. If it is not, this raises what `load` raises, after the rest has been checked.

    Args:
        name: the backend's name.
        options: option name to value. Secrets are references such as ``${secret:NAME}``, which stay as they are.

    Raises:
        InvalidOptionError: an option is unknown, has a value of the wrong type, or holds a literal secret.
        ConfigError: a value is not what JSON can hold.
        UnknownBackendError: the backend is not installed here.
        PluginError: the backend is installed here, but cannot be used.
    """
    refuse_literal_secrets(name, options)
    try:
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(dict(options)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the options of {name!r} travel in the job, so they must be what JSON can hold: {error}"
        ) from error
    cls = load(name)
    _check_names(name, cls, plain)
    _convert(name, cls, plain)
    return plain


def may_be_elsewhere(name: str) -> bool:
    """Return whether a backend that is not installed here may be installed at another site.

    False for a name that no backend can have. Also False for a name that differs in a letter or two from a known
    backend: it is probably misspelt. True for a longer name that contains a known one, such as ``wandb-eu``.
    """
    if _NAME.fullmatch(name) is None or name in RESERVED:
        return False
    near = _nearest(name, _usable(available()), cutoff=_MISSPELT)
    return near is None or near in name


def build_options(name: str, cls: type[Backend[Any]], options: Mapping[str, Any]) -> msgspec.Struct:
    """Return the backend's Options from a plain mapping, with secret references resolved.

    Call it only at the receiver. Do not store or log the result.

    A value from a command line is always a string. So an option that cannot be a string also takes ``"5"`` for a
    number, ``"true"`` for a boolean and ``"null"`` for None.

    Args:
        name: the backend's name, for messages.
        cls: the backend's class.
        options: option name to value.

    Raises:
        InvalidOptionError: an option is unknown, has a value of the wrong type, or holds a literal secret.
        ConfigError: a secret reference cannot be resolved.
        BackendLoadError: an option has a type that no plain value can be converted into.
    """
    refuse_literal_secrets(name, options)
    _check_names(name, cls, options)
    _remember_environment(cls)
    return _convert(name, cls, {key: resolve_secrets(f"{name}.{key}", value) for key, value in options.items()})


def permitted_options(
    name: str, options: Mapping[str, Any], operator: OperatorFile, run_folder: Path
) -> dict[str, Any]:
    """Return the options with which a backend runs at this site: the job's and the operator's fixed ones.

    Call it at the receiver before training, and give the result to the receiver. Secret references stay as they are.

    Args:
        name: the backend's name.
        options: what the job gives.
        operator: the site's operator's file.
        run_folder: the job's run folder at this site.

    Raises:
        ConfigError: the operator does not allow one of the job's options, or an option is wrong.
        UnknownBackendError: the backend is not installed here.
        PluginError: the backend cannot be used.
    """
    refuse_literal_secrets(name, options)
    cls = load(name, allowed=operator.backends_allowed)
    _check_names(name, cls, options)
    _remember_environment(cls)
    return operator.permitted_options(
        name,
        options,
        marks=option_marks(cls),
        credentials=cls.credentials,
        run_folder=run_folder,
        environ=os.environ,
    )


def _remember_environment(cls: type[Backend[Any]]) -> None:
    """Conceal the secrets in this process's environment that the backend and its network libraries read."""
    for variable in cls.credentials.variables:
        remember_secret(os.environ.get(variable))
    remember_logins_in_urls(os.environ, cls.credentials.host_variables)


def option_marks(cls: type[Backend[Any]]) -> dict[str, frozenset[OptionMark]]:
    """Return option -> marks, for a backend's options: which hold a secret, a host, a path or something shared."""
    hints = get_type_hints(cls.Options, include_extras=True)
    return {
        field.encode_name: frozenset(mark for mark in _annotations(hints[field.name]) if isinstance(mark, OptionMark))
        for field in msgspec.structs.fields(cls.Options)
    }


def _annotations(hint: Any) -> Iterator[Any]:
    yield from getattr(hint, "__metadata__", ())
    for part in get_args(hint):
        yield from _annotations(part)


def _check_names(name: str, cls: type[Backend[Any]], options: Mapping[str, Any]) -> None:
    marks = option_marks(cls)
    for key, value in options.items():
        if key not in marks:
            raise InvalidOptionError(_unknown_option(name, str(key), list(marks), cls.moved_options))
        if OptionMark.SECRET in marks[key]:
            require_reference(f"{name}.{key}", value)
        else:
            refuse_references(f"{name}.{key}", value, [k for k in marks if OptionMark.SECRET in marks[k]])


def _convert(name: str, cls: type[Backend[Any]], values: Mapping[str, Any]) -> msgspec.Struct:
    try:
        with one_at_a_time:
            return msgspec.convert(values, cls.Options, strict=False, dec_hook=functools.partial(_decode, name))
    except msgspec.ValidationError as error:
        # The error is not chained: its text and the values in its traceback may hold a resolved secret.
        raise InvalidOptionError(_wrong_value(name, cls, error)) from None


def _entry_points() -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, distribution, version, value) of each entry point in the group."""
    for distribution in metadata.distributions():
        try:
            # Metadata is slow to parse, and few of the hundred distributions of an environment are plugins.
            if GROUP not in (distribution.read_text("entry_points.txt") or "") or _is_shadowed(distribution):
                continue
            for point in distribution.entry_points.select(group=GROUP):
                yield point.name, distribution.name, distribution.version or "unknown", point.value
        except Exception as error:  # metadata that is malformed or half removed must not hide other plugins
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # no metadata can be read now; a backend that is installed must not be called missing
            _log.warning("the metadata of %s cannot be read; its backends are not seen", distribution, exc_info=True)


def _is_shadowed(distribution: metadata.Distribution) -> bool:
    """Return whether another copy of this distribution comes before it on ``sys.path``.

    An old copy may be further down, or the metadata of a build may be beside an editable install. The first copy
    counts, as for imports.
    """
    first = metadata.distribution(distribution.name)
    return first.locate_file("") != distribution.locate_file("") or first.version != distribution.version


def _visible_problem(name: str, value: str) -> str:
    """Return what is wrong with an entry point, without importing it. Empty if no problem is found."""
    if _NAME.fullmatch(name) is None:
        return "a backend's name is made of a-z, 0-9, - and _, starts with a letter and has at most 64 characters"
    if name in RESERVED:
        return f"the name {name!r} is reserved"
    match = _VALUE.fullmatch(value.strip())
    if match is None:
        return f"the entry point {value!r} is not of the form 'module:Class'"
    # Look only for the top-level package: finding a submodule would import its parents.
    top_level = match["module"].partition(".")[0]
    try:
        spec = importlib.util.find_spec(top_level)
    except (ImportError, ValueError):
        spec = None
    return "" if spec is not None else f"there is no module {top_level!r}; was the distribution moved or half removed?"


def _conflict(name: str, rivals: list[tuple[str, str, str, str]]) -> str:
    claims = " and ".join(f"{distribution} {version} ({value})" for _, distribution, version, value in rivals)
    return f"backend {name!r} is provided more than once: by {claims}. Uninstall all but one of them"


def _unknown(name: str, entries: Sequence[BackendEntry]) -> str:
    usable = _usable(entries)
    message = f"there is no backend {name!r} here; available: {', '.join(sorted(usable)) or 'none'}."
    if name in _OURS:
        message += f" Install flare-trackhub-{name} where the backend runs (in a clone: pip install -e backends/{name})"
    elif near := _nearest(name, usable):
        message += f" Did you mean {near!r}?"
        if near not in usable:
            message += f" It is not installed here either: it is in flare-trackhub-{near} (in a clone: backends/{near})"
    elif _NAME.fullmatch(str(name)) and name not in RESERVED:
        message += " If it is a plugin, install its distribution where the backend runs"
    return message


def _usable(entries: Sequence[BackendEntry]) -> set[str]:
    return {entry.name for entry in entries if entry.state == "ok"}


def _nearest(name: str, usable: Collection[str], cutoff: float = 0.6) -> str | None:
    """Return the known backend whose name is most like this one; None if none is."""
    return next(iter(difflib.get_close_matches(str(name).lower(), sorted({*usable, *_OURS}), 1, cutoff)), None)


def _unknown_option(name: str, key: str, known: list[str], moved: Mapping[str, str]) -> str:
    if key in moved:
        return f"{name}.{key}: unknown option. {moved[key]}"
    near = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listing = f"its options: {', '.join(sorted(known))}" if known else f"backend {name!r} has no options"
    return f"{name}.{key}: unknown option; {listing}{hint}"


def _wrong_value(name: str, cls: type[Backend[Any]], error: msgspec.ValidationError) -> str:
    message = conceal(describe(error, name, cls.Options))
    if "expected `array`" in message:
        message += "; a list is written as JSON: [1, 2]"
    if "expected `bool`" in message:
        message += "; use true or false"
    return message


def _decode(name: str, expected: type, value: Any) -> Any:
    """Let options be paths, which msgspec does not know. It calls this for each type that it does not know."""
    if isinstance(expected, type) and issubclass(expected, Path) and isinstance(value, str):
        return expected(value)
    raise BackendLoadError(
        f"backend {name!r}: one of its options has the type {getattr(expected, '__name__', expected)}, which cannot be "
        f"made of {type(value).__name__}; expected a type that msgspec knows, such as str, or a Path"
    )


def _capability_problem(capabilities: Capabilities) -> str:
    if not all(isinstance(kind, Kind) and kind is not Kind.GAP for kind in capabilities.kinds):
        return "kinds must be a set of trackhub.spi.Kind, without GAP"
    if capabilities.max_batch < 1:
        return "max_batch must be at least 1"
    if set(capabilities.key_rules) - set(Kind):
        return "key_rules must be a mapping of trackhub.spi.Kind to KeyRule"
    for rule in (capabilities.key_rule, *capabilities.key_rules.values()):
        for field in ("chars", "edge_chars"):
            try:
                re.compile(f"[{chars}]" if (chars := getattr(rule, field)) else "")
            except re.error as error:
                return f"KeyRule.{field} is not the inside of a character class: {error}"
    return ""
