# SPDX-License-Identifier: Apache-2.0
"""Checks of the backend's class and of what it declares: SPI version, options and their marks, what confirms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

import msgspec

from trackhub import registry
from trackhub.errors import PluginError
from trackhub.job_and_run_info import Side
from trackhub.secrets import is_secret_name
from trackhub.spi import Backend, BackendContext, NoOptions, OptionMark
from trackhub.testing.checks.fixtures import ContractFixtures, Kit
from trackhub.testing.sample_calls_and_requests import new_job, series
from trackhub.testing.version import KIT_VERSION

__all__ = ["DeclarationChecks"]

# Only the last word of a name decides: `server_url` is a URL, and `url_timeout_s` is not.
_HOST_NAME = re.compile(r"(?:^|_)(?:\w*(?:url|uri)|host(?:name)?|endpoint|server|address)s?$")
_PATH_NAME = re.compile(r"(?:^|_)(?:\w*(?:path|dir)|file(?:name)?|folder)s?$")


class DeclarationChecks(ContractFixtures):
    """The class, its options, and what it declares."""

    def test_class_can_be_loaded(self) -> None:
        """The class is a backend for this version of the SPI, with options and capabilities of the right types."""
        cls = self.backend
        try:
            registry.check_class(cls, f"the class {getattr(cls, '__qualname__', cls)!r}")
        except PluginError as error:
            raise AssertionError(str(error)) from error
        expected = _options_of_constructor(cls)
        assert cls.Options is not NoOptions or expected is None, (
            f"the constructor takes {_name(expected)}, but the class has no options. Name their type in brackets: "
            f"class {cls.__name__}(Backend[{_name(expected)}])"
        )

    def test_contract_version_exists(self) -> None:
        """``Backend.contract`` is a version of the kit that exists, or 0."""
        assert 0 <= self.backend.contract <= KIT_VERSION, (
            f"the class says that it passed version {self.backend.contract} of the contract; this kit has version "
            f"{KIT_VERSION}"
        )

    def test_constructor_does_no_work(self, tmp_path: Path) -> None:
        """The constructor makes no file. ``preflight`` and ``open_run`` do what can fail or wait."""
        workdir = tmp_path / "run" / self.name
        store = tmp_path / "store"
        workdir.mkdir(parents=True)
        store.mkdir()
        options = registry.build_options(self.name, self.backend, dict(self.options(store)))
        before = sorted(tmp_path.rglob("*"))
        backend = self.backend(options, BackendContext(workdir, new_job(), Side.SERVER))
        after = sorted(tmp_path.rglob("*"))
        backend.close()
        assert after == before, f"the constructor made files: {sorted(set(after) - set(before))}"

    def test_options_are_marked(self) -> None:
        """An option whose name says that it holds a secret, a host or a path has the mark for it."""
        marks = registry.option_marks(self.backend)
        hints = get_type_hints(self.backend.Options, include_extras=True)
        problems = [
            f"{self.name}.{field.encode_name}: its name says that it holds {what}, but its type lacks the mark. Write "
            f"{field.name}: Annotated[..., OptionMark.{mark.name}], or give it another name"
            for field in msgspec.structs.fields(self.backend.Options)
            for mark, what in _named_marks(field.encode_name).items()
            if mark not in marks[field.encode_name] and _holds_text(hints[field.name])
        ]
        assert not problems, "\n".join(problems)

    def test_credentials_are_declared(self) -> None:
        """The class says from which variables it takes secrets, and which host may get the secrets.

        Otherwise a job could send the secrets to a host of its own, and the core could not conceal them.
        """
        declared = self.backend.credentials
        undeclared = sorted({*self.secret_env} - {*declared.variables})
        assert not undeclared, (
            f"the backend takes secrets from {', '.join(undeclared)}, but its credentials do not say so. Write "
            f"credentials = Credentials(variables=(...), ...) into the class"
        )
        connects = any(OptionMark.HOST in marks for marks in registry.option_marks(self.backend).values())
        assert not (connects and declared.variables) or declared.host_variables or declared.default_host, (
            f"an option names a host, and the secrets in {', '.join(declared.variables)} go there, but the credentials "
            "name no host for them. Give host_variables, a default_host or both"
        )
        assert not declared.default_host or urlsplit(declared.default_host).hostname, (
            f"the default host {declared.default_host!r} of the credentials is no URL, such as https://api.example.org"
        )

    def test_flush_as_declared(self, kit: Kit) -> None:
        """If the class declares that ``flush`` confirms, the run has this method, and it returns who has confirmed."""
        rig = kit.rig().start()
        rig.log("site-1", series("loss", range(3)))
        rig.settle("site-1")  # fails on a run without flush, and on an answer of a wrong type
        rig.finish()


def _options_of_constructor(cls: type[Backend[Any]]) -> type[msgspec.Struct] | None:
    """Return the type of the constructor's ``options``, if it is a Struct and can be known."""
    try:
        hint = get_type_hints(cls.__init__).get("options")
    except NameError:  # a name that only a type checker knows
        return None
    return hint if isinstance(hint, type) and issubclass(hint, msgspec.Struct) else None


def _name(cls: type | None) -> str:
    return "" if cls is None else cls.__name__


def _named_marks(name: str) -> Mapping[OptionMark, str]:
    """Return the marks that an option's name asks for, each with what it then holds."""
    marks = {}
    if is_secret_name(name):
        marks[OptionMark.SECRET] = "a secret"
    if _HOST_NAME.search(name.lower()):
        marks[OptionMark.HOST] = "a host"
    if _PATH_NAME.search(name.lower()):
        marks[OptionMark.PATH] = "a path"
    return marks


def _holds_text(hint: Any) -> bool:
    """Return whether a value of this type can be a text or a path, or contain one."""
    if hint is Any or (isinstance(hint, type) and issubclass(hint, str | Path)):
        return True
    return any(_holds_text(part) for part in get_args(hint))
