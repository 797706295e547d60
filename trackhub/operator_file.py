# SPDX-License-Identifier: Apache-2.0
"""The operator's file, ``local/trackhub.toml``: what a site lets a job do with its backends, its disk and its secrets.

The FLARE widgets read it at each site before training, and `trackhub backends --check` validates it. Whoever submits a
job is not trusted with the site's files and credentials. So without the file, the rules of `permitted_options` hold in
their strictest form. ``docs/deploying.md`` shows every key::

    backends_allowed = ["tensorboard", "wandb"]
    state_dir = "/srv/trackhub"

    forbid_kinds = ["image"]

    [limits]
    sites_s = 60

    [policy]
    allow = ["val/*"]

    [backends.wandb]
    hosts = ["https://wandb.hospital.org"]
    secrets = ["WANDB_KEY_TEAM_A"]
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from trackhub.errors import ConfigError
from trackhub.limits import ENV_PREFIX, Limits
from trackhub.plain_values_to_structs import convert
from trackhub.policy import Policy, SiteRules, check_kinds
from trackhub.secrets import references, without_login
from trackhub.spi import Credentials, OptionMark

__all__ = ["FILE_NAME", "BackendRules", "OperatorFile", "named_hosts", "read_operator_file"]

FILE_NAME = "trackhub.toml"
"""The file's name in the folder ``local`` of a FLARE site's workspace."""

_PLACES = frozenset({OptionMark.HOST, OptionMark.PATH})
_PORTS = {"http": 80, "https": 443}
_PATH_SCHEME = re.compile(r"(?:sqlite(?:\+\w+)?|file):", re.IGNORECASE)

Marks = Mapping[str, frozenset[OptionMark]]
"""The marks of each option of a backend, as `trackhub.registry.option_marks` returns them."""


class BackendRules(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job may say of one backend: the table ``[backends.NAME]``.

    Attributes:
        options: the options that a job may give; None for all. They must also meet the rules below.
        fixed: options that the operator gives. They are used in place of the job's, and no other rule applies to them.
        values: option -> patterns of the values that a job may give, such as ``["team-a-*"]``.
        hosts: the hosts to which the backend may connect: ``https://HOST[:PORT]``, compared with scheme and port.
        paths: absolute folders, besides the job's own, in which the backend may read and write.
        secrets: the secrets that a job may refer to: ``NAME`` for ``${secret:NAME}``, or ``file:/path``.
    """

    options: tuple[str, ...] | None = None
    fixed: dict[str, Any] = {}
    values: dict[str, tuple[str, ...]] = {}
    hosts: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()


class OperatorFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one site's operator says. A missing file means the same as an empty one.

    Attributes:
        backends_allowed: the backends that a job may use here; None for all that are installed.
        state_dir: the absolute folder for spools and journals of all jobs; None for the run folder of each job.
        keep_days: when a receiver starts, it prunes the journals in ``state_dir`` whose jobs ended more than this many
            days ago, as ``trackhub prune`` does. None keeps them. Requires ``state_dir``, because FLARE removes run
            folders itself.
        take_over: with ``"events"``, trackhub changes nothing in trainers, even if the job asks for it. It then takes
            the records of FLARE's own writers from FLARE's events. None lets the job decide.
        limits: values of `trackhub.limits.Limits`, used in place of the job's.
        forbid_kinds: kinds of records that no receiver gets from this site, not even the site's own.
        policy: restricts what may leave this site, beside the job's policy: both must allow it. None restricts nothing.
        backends: name of a backend -> its rules.
    """

    backends_allowed: tuple[str, ...] | None = None
    state_dir: str | None = None
    keep_days: Annotated[float, Meta(ge=0)] | None = None
    take_over: Literal["events"] | None = None
    limits: dict[str, Any] = {}
    forbid_kinds: tuple[str, ...] = ()
    policy: Policy | None = None
    backends: dict[str, BackendRules] = {}

    def __post_init__(self) -> None:
        """Check what needs no plugin.

        Raises:
            ConfigError: a limit, a kind, a host or a path is wrong.
        """
        Limits.from_mapping(self.limits)
        check_kinds("forbid_kinds", self.forbid_kinds)
        if self.state_dir is not None:
            _require_absolute("state_dir", self.state_dir)
        elif self.keep_days is not None:
            raise ConfigError(
                "keep_days: it needs state_dir, the folder for the journals of all jobs; name that as well"
            )
        for name, rules in self.backends.items():
            for path in rules.paths:
                _require_absolute(f"backends.{name}.paths", path)
            for host in rules.hosts:
                if _origin(host) is None:
                    raise ConfigError(
                        f"backends.{name}.hosts: {host!r} is not a host; expected https://HOST or https://HOST:PORT"
                    )
            for secret in rules.secrets:
                if [*references(f"${{secret:{secret}}}")] != [secret]:
                    raise ConfigError(
                        f"backends.{name}.secrets: {secret!r} is neither the name of a variable nor file:/path"
                    )

    def limits_for(self, job: Mapping[str, Any], *, environ: Mapping[str, str]) -> Limits:
        """Return the limits that hold here: the file's, else the environment's, else the job's, else the defaults.

        Args:
            job: the limits that the job gives.
            environ: the environment of this process, which is the operator's.

        Raises:
            ConfigError: a limit is wrong, or two of them do not fit together.
        """
        names = Limits.__struct_fields__
        from_environ = {n: environ[v] for n in names if (v := ENV_PREFIX + n.upper()) in environ}
        return Limits.from_mapping({**job, **from_environ, **self.limits})

    def site_rules(self, job: Policy | None, folder: Path) -> SiteRules:
        """Return all that restricts the records of this site: the rules of the job and of this file.

        Args:
            job: the policy of the job.
            folder: the folder that this file is in. A replay reads the file again.
        """
        rules = SiteRules.of_job(job).with_operator(self.policy, self.forbid_kinds)
        return msgspec.structs.replace(rules, operator_folder=str(folder.absolute()))

    def state_dir_for(self, job: str | None, run_folder: Path) -> str | None:
        """Return the folder for spools and journals; None for the job's run folder.

        The operator's folder is for all jobs. Without one, the job may name a folder inside its run folder.

        Args:
            job: the ``state_dir`` that the job gives.
            run_folder: the job's run folder at this site.

        Raises:
            ConfigError: the job names a folder outside its run folder, and the operator names none.
        """
        if self.state_dir is not None or not job:
            return self.state_dir
        inside = str(run_folder / Path(job).expanduser())
        if not _is_within(inside, [run_folder]):
            _refuse(
                f"state_dir: the job names {job!r}, which is outside its own folder",
                "name the folder for all jobs as state_dir there, or leave state_dir out of the job",
            )
        return inside

    def permitted_options(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        marks: Marks,
        credentials: Credentials,
        run_folder: Path,
        environ: Mapping[str, str],
    ) -> dict[str, Any]:
        """Return the options with which a backend runs here: the job's options and the operator's fixed options.

        Args:
            name: the backend's name.
            options: what the job gives. Secrets are still references.
            marks: which of the backend's options hold a secret, a host, a path or something shared.
            credentials: what the backend takes from the environment.
            run_folder: the job's run folder at this site.
            environ: the environment of this process, which is the operator's.

        Raises:
            ConfigError: the operator does not allow one of the job's options. The message says what would allow it.
        """
        rules = self.backends.get(name, BackendRules())
        job = {key: value for key, value in options.items() if key not in rules.fixed}
        check = _Check(name, rules, credentials, run_folder, environ)
        for key, value in job.items():
            check.option(key, value, marks.get(key, frozenset()))
        effective = {**job, **rules.fixed}
        check.whole(effective, marks, job)
        return effective


class _Check:
    """Checks what one job says of one backend. `option` and `whole` raise ConfigError for what is not allowed."""

    def __init__(
        self, name: str, rules: BackendRules, credentials: Credentials, run_folder: Path, environ: Mapping[str, str]
    ) -> None:
        self._name = name
        self._rules = rules
        self._credentials = credentials
        self._run_folder = run_folder
        self._hosts = named_hosts(rules, credentials, environ)
        # If no option names a host, a backend with a default host connects to the host that the environment names, or
        # else to the default.
        usual = [*_named_by(environ, credentials), credentials.default_host]
        self._usual_host = usual[0] if credentials.default_host else ""

    def option(self, key: str, value: Any, marks: frozenset[OptionMark]) -> None:
        where = f"{self._name}.{key}"
        if self._rules.options is not None and key not in self._rules.options:
            _refuse(f"{where}: a job may not set this option", f"add it to backends.{self._name}.options")
        self._secrets(where, value)
        patterns = self._rules.values.get(key)
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        if patterns is not None and not any(fnmatchcase(text, pattern) for pattern in patterns):
            _refuse(f"{where}: {text!r} is not a value that a job may give", f"add it to backends.{self._name}.values")
        if not value or not marks & _PLACES:
            return
        if not isinstance(value, str):
            # Only the backend knows where in a table or a list a host or a path is.
            if patterns is None:
                _refuse(
                    f"{where}: it may hold a host or a path, which cannot be checked",
                    f'give it as backends.{self._name}.fixed, or allow it by values.{key} = ["*"]',
                )
            return
        if _names_a_path(value, marks):
            self._path(where, value)
        else:
            self._host(where, value)

    def whole(self, effective: Mapping[str, Any], marks: Marks, job: Mapping[str, Any]) -> None:
        """Check two rules that depend on several options.

        If no option names a host, the default host must be allowed. If others use the same store, options marked as
        SHARED need permission.
        """
        places = [(v, marked) for k, v in effective.items() if v and (marked := marks.get(k, frozenset()) & _PLACES)]
        if self._usual_host and not any(isinstance(v, str) and OptionMark.HOST in marked for v, marked in places):
            self._host(f"{self._name}: no option names a host, so the backend would use its default;", self._usual_host)
        is_own = not self._usual_host and all(
            isinstance(v, str) and _names_a_path(v, marked) and self._is_in(v, [self._run_folder])
            for v, marked in places
        )
        for key, value in job.items():
            if value and not is_own and OptionMark.SHARED in marks.get(key, ()) and key not in self._rules.values:
                _refuse(
                    f"{self._name}.{key}: {value!r} may belong to others who use the same store",
                    f'allow it by backends.{self._name}.values.{key} = ["{value}"]',
                )

    def _is_in(self, value: str, folders: list[Path]) -> bool:
        return all(_is_within(str(self._run_folder / path), folders) for path in _readings(value))

    def _secrets(self, where: str, value: Any) -> None:
        for reference in references(value):
            if reference not in self._rules.secrets and reference not in self._credentials.variables:
                _refuse(
                    f"{where}: the job may not refer to the secret {reference}",
                    f'allow it by backends.{self._name}.secrets = ["{reference}"]',
                )

    def _host(self, where: str, value: str) -> None:
        origin = _origin(value)
        if origin is None or origin not in map(_origin, self._hosts):
            named = ", ".join(host for host in self._hosts if _origin(host)) or "none"
            variables = self._credentials.host_variables
            environment = f", or set {variables[0]} in the environment of this site's process" if variables else ""
            _refuse(
                f"{where} {without_login(value)!r} is not a host that the operator named; named: {named}",
                f'allow it by backends.{self._name}.hosts = ["https://HOST"]{environment}',
            )

    def _path(self, where: str, value: str) -> None:
        allowed = [self._run_folder, *map(Path, self._rules.paths)]
        if not self._is_in(value, allowed):
            _refuse(
                f"{where}: {value!r} is outside the job's own folder",
                f"allow its folder by backends.{self._name}.paths",
            )


def read_operator_file(local: Path) -> OperatorFile:
    """Return what the operator's file in this folder says. Without the file, return an empty one.

    Args:
        local: the folder ``local`` of the site's workspace.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or what it says is wrong.
    """
    path = local / FILE_NAME
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        # A symbolic link to a file that is not mounted must not count as a missing file: that would lift all rules.
        if path.is_symlink():
            raise ConfigError(f"{path} is a link to a file that does not exist; restore the operator's file") from error
        return OperatorFile()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the operator's file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the operator's file {path} is not valid TOML: {error}") from error
    try:
        return convert(values, OperatorFile, "")
    except ConfigError as error:
        raise ConfigError(f"the operator's file {path}: {str(error).lstrip('.: ')}") from error


def named_hosts(rules: BackendRules, credentials: Credentials, environ: Mapping[str, str]) -> list[str]:
    """Return the hosts that the operator named for a backend, in the file or the environment; else the default host.

    Args:
        rules: what the file says of the backend.
        credentials: what the backend takes from the environment.
        environ: the environment.
    """
    named = [*rules.hosts, *_named_by(environ, credentials)]
    return named or [credentials.default_host] * bool(credentials.default_host)


def _named_by(environ: Mapping[str, str], credentials: Credentials) -> list[str]:
    return [without_login(environ[variable]) for variable in credentials.host_variables if environ.get(variable)]


def _refuse(problem: str, remedy: str) -> NoReturn:
    raise ConfigError(f"{problem}. The operator of this site decides that in local/{FILE_NAME}: {remedy}")


def _require_absolute(where: str, path: str) -> None:
    if not Path(path).is_absolute():
        raise ConfigError(f"{where}: expected an absolute path, got {path!r}")


def _names_a_path(value: str, marks: frozenset[OptionMark]) -> bool:
    """An option may take a host or a path. Return whether this value is a path."""
    return OptionMark.PATH in marks and (OptionMark.HOST not in marks or _PATH_SCHEME.match(value) is not None)


def _origin(value: str) -> tuple[str, str, int | None] | None:
    """Return scheme, host and port of a URL or of ``host[:port]``; None if programs may read it in different ways."""
    if not value.isascii() or re.search(r"[\s\\@%\x00-\x1f\x7f]", value):
        return None
    try:
        parts = urlsplit(value if "://" in value else f"//{value}")
        port = parts.port
    except ValueError:
        return None
    scheme = parts.scheme.lower()
    return (scheme, parts.hostname, _PORTS.get(scheme) if port is None else port) if parts.hostname else None


def _readings(value: str) -> Iterator[str]:
    """Yield each path that a program may understand an option's value as: the text, and the path of a URI.

    In the text, ``~`` and variables are expanded.
    """
    yield os.path.expanduser(value)
    yield os.path.expanduser(os.path.expandvars(value.strip()))
    if scheme := _PATH_SCHEME.match(value):
        rest = value[scheme.end() :]
        if re.search(r"[?#%]", rest):
            yield "/"  # parameters and escapes may name any file: https://www.sqlite.org/uri.html
        # SQLAlchemy has three slashes before a relative path, and four before an absolute one.
        is_sqlite = scheme[0].lower().startswith("sqlite")
        yield os.path.expanduser(rest.removeprefix("///") if is_sqlite else rest)


def _is_within(path: str, folders: list[Path]) -> bool:
    """Return whether a path, with its symbolic links resolved, is one of these folders or in one."""
    if "\x00" in path:
        return False
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)
