# SPDX-License-Identifier: Apache-2.0
"""Run the unmodified contract kit on an installed backend, and report how each check ended.

``trackhub check`` calls `run_check`, which runs pytest in this process.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trackhub import registry
from trackhub.errors import BackendLoadError, PluginError
from trackhub.testing.checks.fixtures import QUICK_ENV
from trackhub.testing.contract import BackendContract
from trackhub.testing.version import KIT_VERSION

__all__ = ["GROUP", "CheckOutcome", "CheckReport", "find_contract", "run_check"]

GROUP = "trackhub.contracts"
"""The entry-point group in which plugins name their contract class, under the backend's name."""

_TEST_FILE = """\
from trackhub.testing.kit_runner import find_contract


class TestContract(find_contract({name!r})):
    extra_options = {options!r}
"""


class CheckOutcome(msgspec.Struct, frozen=True):
    """How one check ended.

    Attributes:
        name: the check's name, parameters in brackets.
        rule: the sentence that says what it demands.
        outcome: ``passed``, ``failed``, ``declared`` (it failed, and the contract class says why), ``skipped`` (which
            no check does by itself) or ``missing``.
        detail: why it failed, was expected to fail, or was skipped.
    """

    name: str
    rule: str
    outcome: str
    detail: str = ""


class CheckReport(msgspec.Struct, frozen=True):
    """What the kit found about a backend.

    Attributes:
        backend: the backend's name.
        contract: version of the kit.
        claimed: version of the kit that the backend says it passed.
        passed: True if every check passed, or failed as declared.
        cannot_tell: what the store cannot tell, and why, as the contract class declares.
        tests: how each check ended.
    """

    backend: str
    contract: int
    claimed: int
    passed: bool
    cannot_tell: dict[str, str]
    tests: list[CheckOutcome]


def find_contract(name: str) -> type[BackendContract]:
    """Return the contract class of the backend of this name.

    Raises:
        UnknownBackendError: there is no backend of this name.
        PluginError: it cannot be loaded, or its distribution names no contract class of this backend.
    """
    cls = registry.load(name)
    points = [point for point in metadata.entry_points(group=GROUP) if point.name == name]
    if not points:
        raise PluginError(
            f"backend {name!r} names no contract class. Its distribution should have an entry point {name!r} in the "
            f'group {GROUP!r}, such as: {name} = "{cls.__module__.split(".")[0]}.contract:Contract"'
        )
    values = sorted({point.value for point in points})
    if len(values) > 1:
        raise PluginError(f"backend {name!r} has more than one contract class: {' and '.join(values)}")
    try:
        found = points[0].load()
    except Exception as error:
        raise BackendLoadError(
            f"the contract class {values[0]} of backend {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, BackendContract)):
        raise PluginError(f"{values[0]} is not a subclass of trackhub.testing.BackendContract")
    if found.backend is not cls:
        raise PluginError(
            f"{values[0]} tests {found.backend.__module__}.{found.backend.__qualname__}, and the backend {name!r} is "
            f"{cls.__module__}.{cls.__qualname__}"
        )
    if found.name != name:
        raise PluginError(f"{values[0]} calls the backend {found.name!r}; expected name = {name!r}")
    return found


def run_check(
    name: str, options: Mapping[str, Any] | None = None, *, quick: bool = False, verbose: bool = False
) -> CheckReport:
    """Run the kit on an installed backend. Blocks for seconds to minutes.

    Args:
        name: the backend's name.
        options: options of the backend, which win over those of its contract class.
        quick: log fewer points.
        verbose: let pytest print what it does, with tracebacks.

    Raises:
        UnknownBackendError: there is no backend of this name.
        InvalidOptionError: an option is unknown or wrong.
        PluginError: the backend or its contract class cannot be loaded.
    """
    contract = find_contract(name)
    registry.build_options(name, contract.backend, options or {})
    collector = _Collector()
    with tempfile.TemporaryDirectory(prefix="trackhub-check-") as folder, _quick_set(quick):
        file = Path(folder, "test_contract.py")
        file.write_text(_TEST_FILE.format(name=name, options=dict(options or {})), encoding="utf-8")
        status = pytest.main(_arguments(file, verbose=verbose), plugins=[collector])
    tests = collector.outcomes()
    if not tests:
        tests = [
            CheckOutcome("collection", "the contract class can be collected", "failed", f"pytest ended with {status!r}")
        ]
    return CheckReport(
        backend=name,
        contract=KIT_VERSION,
        claimed=contract.backend.contract,
        passed=all(test.outcome in ("passed", "declared") for test in tests),
        cannot_tell=dict(contract.cannot_tell),
        tests=tests,
    )


def _arguments(file: Path, *, verbose: bool) -> list[str]:
    """Return pytest's arguments for this test file, with none of the configuration and plugins of the folder around."""
    root = file.parent
    (root / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return [
        *(str(file), "-c", str(root / "pytest.ini"), "--rootdir", str(root), "--basetemp", str(root / "tmp")),
        *("-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist", "-p", "no:cov"),
        *("-o", "xfail_strict=true", "-W", "ignore::pytest.PytestAssertRewriteWarning"),
        *(["-v"] if verbose else ["-p", "no:terminal"]),
    ]


class _Collector:
    """A pytest plugin that keeps how every check ended."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._ended: dict[str, tuple[str, str]] = {}
        self._problems: list[CheckOutcome] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            function = getattr(item, "function", None)
            rule = inspect.getdoc(function) or ""
            self._rules[item.name] = rule.split("\n\n")[0].replace("\n", " ")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._problems.append(CheckOutcome("collection", "", "failed", _reason(report)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        before = self._ended.get(name, ("passed", ""))[0]
        if report.failed:
            self._ended[name] = ("failed", _reason(report))
        elif report.skipped and before != "failed":
            declared = getattr(report, "wasxfail", None)
            self._ended[name] = ("skipped", _reason(report)) if declared is None else ("declared", declared)
        else:
            self._ended.setdefault(name, ("passed", ""))

    def outcomes(self) -> list[CheckOutcome]:
        """Return how each check ended, in order, and which checks of the kit did not run."""
        found = [CheckOutcome(name, self._rules.get(name, ""), *ended) for name, ended in self._ended.items()]
        ran = {name.partition("[")[0] for name in self._ended}
        missing = [name for name in dir(BackendContract) if name.startswith("test_") and name not in ran]
        if not found:
            return self._problems
        return [*self._problems, *found, *(CheckOutcome(name, "", "missing", "it did not run") for name in missing)]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return str(crash.message)
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return str(report.longrepr)


@contextmanager
def _quick_set(quick: bool) -> Iterator[None]:
    """Make the kit quick, or not, whatever the environment says; restore the environment at the end."""
    before = os.environ.get(QUICK_ENV)
    os.environ[QUICK_ENV] = "1" if quick else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[QUICK_ENV]
        else:
            os.environ[QUICK_ENV] = before
