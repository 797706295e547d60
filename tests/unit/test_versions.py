# SPDX-License-Identifier: Apache-2.0
"""The core and the backends have one version, one command raises it, and each distribution has its licence."""

from __future__ import annotations

import re
import runpy
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

import trackhub

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / ".ci" / "raise_versions.py"))
LINK = re.compile(r"\]\((?!https://)|!\[")


def projects(root: Path) -> list[dict[str, Any]]:
    found = [root / "pyproject.toml", *sorted(root.glob("backends/*/pyproject.toml"))]
    return [tomllib.loads(path.read_text(encoding="utf-8"))["project"] for path in found]


def versions(root: Path) -> set[str]:
    """Return every version that the projects state, of themselves and of the core that they require."""
    required = [
        requirement.partition(">=")[2]
        for project in projects(root)
        for requirement in project["dependencies"]
        if requirement.startswith("flare-trackhub")
    ]
    assert len(required) == len(projects(root)) - 1
    return {*required, *(project["version"] for project in projects(root))}


def checkout(folder: Path) -> Path:
    """Copy the files that state a version."""
    for path in SCRIPT["files"](ROOT):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return folder


def test_the_core_and_the_backends_have_one_version() -> None:
    assert versions(ROOT) == {trackhub.__version__}


def test_one_command_raises_every_version(tmp_path: Path) -> None:
    root = checkout(tmp_path)

    SCRIPT["raise_versions"](root, "12.3.4rc1")

    assert versions(root) == {"12.3.4rc1"}
    assert '__version__ = "12.3.4rc1"' in (root / "trackhub" / "__init__.py").read_text(encoding="utf-8")


def test_raising_the_versions_changes_nothing_else(tmp_path: Path) -> None:
    root = checkout(tmp_path)

    SCRIPT["raise_versions"](root, trackhub.__version__)

    for path in SCRIPT["files"](ROOT):
        assert (root / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("version", ["", "1.2", "v1.2.3", "1.2.3-beta", '1.2.3"\nx'])
def test_what_is_no_version_is_refused_and_changes_nothing(tmp_path: Path, version: str) -> None:
    root = checkout(tmp_path)

    with pytest.raises(ValueError, match="expected one such as"):
        SCRIPT["raise_versions"](root, version)

    assert versions(root) == {trackhub.__version__}


@pytest.mark.parametrize("folder", [ROOT, *sorted(ROOT.glob("backends/*/"))], ids=lambda folder: folder.name)
def test_each_distribution_has_the_licence(folder: Path) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert project["license-files"] == ["LICENSE"]
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("folder", [ROOT, *sorted(ROOT.glob("backends/*/"))], ids=lambda folder: folder.name)
def test_what_a_package_index_shows_of_a_distribution_has_no_link_into_the_repository(folder: Path) -> None:
    readme = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["readme"]
    text = (folder / readme).read_text(encoding="utf-8") if isinstance(readme, str) else readme["text"]

    assert LINK.findall(text) == []
