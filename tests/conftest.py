# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every kind of test."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes depends on what else the machine does. So no test of hypothesis fails because it is slow.
settings.register_profile("trackhub", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("trackhub")

# Their failed assertions then show the values, as those of the test modules do.
pytest.register_assert_rewrite("tests.faults.job_processes", "tests.faults.oracle", "tests.faults.random_faults")


@pytest.fixture(autouse=True)
def first_wrong_call() -> Iterator[None]:
    """Run each test as in a process that has not warned of a wrong log call yet."""
    yield
    writer = sys.modules.get("trackhub.writer.writer")
    if writer is not None:
        writer._warned.clear()


class MakePlugin(Protocol):
    """Writes an installed-looking distribution with one package and puts it on ``sys.path``."""

    def __call__(
        self,
        distribution: str,
        points: dict[str, str],
        sources: dict[str, str] | None = None,
        *,
        version: str = "1.0",
        raw_entry_points: str | None = None,
    ) -> Path: ...


@pytest.fixture
def make_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePlugin]:
    """Fake distributions: a folder with modules and a hand-written dist-info, as pip would have left them."""
    modules: list[str] = []

    def make(
        distribution: str,
        points: dict[str, str],
        sources: dict[str, str] | None = None,
        *,
        version: str = "1.0",
        raw_entry_points: str | None = None,
    ) -> Path:
        site = tmp_path / f"site-{len(list(tmp_path.glob('site-*')))}"
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        info.joinpath("entry_points.txt").write_text(
            "\n".join(["[trackhub.backends]", *lines, ""]) if raw_entry_points is None else raw_entry_points
        )
        for module, source in (sources or {}).items():
            site.joinpath(f"{module}.py").write_text(textwrap.dedent(source))
            modules.append(module)
        monkeypatch.syspath_prepend(str(site))
        return site

    yield make
    for module in modules:
        sys.modules.pop(module, None)
    importlib.invalidate_caches()
