# SPDX-License-Identifier: Apache-2.0
"""What every file of the repository keeps to: licence line, length, no machine's name, requirements, packaging."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".ci", ".changelog", "backends", "docs", "jobs", "tests", "trackhub")
SPDX = "# SPDX-License-Identifier: Apache-2.0"
TEXT = {".cfg", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}
MAX_LINES = 500
MAX_FUNCTION_LINES = 50  # without the docstring
MAX_ATTRIBUTES = 20


def files() -> Iterator[Path]:
    """Yield every text file that belongs to the project, also those that git does not know yet."""
    for path in [*ROOT.iterdir(), *(found for folder in FOLDERS for found in (ROOT / folder).rglob("*"))]:
        parts = path.relative_to(ROOT).parts
        generated = any(
            part == "__pycache__" or part.endswith(".egg-info") or part in {"build", "dist"} for part in parts
        )
        if path.is_file() and not generated and path.suffix in TEXT:
            yield path


def modules() -> Iterator[Path]:
    return (path for path in files() if path.suffix == ".py")


def pyproject(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def backend_folders() -> list[Path]:
    return sorted(path.parent for path in ROOT.glob("backends/*/pyproject.toml"))


def test_every_module_states_its_licence_in_the_first_line() -> None:
    without = [
        str(path.relative_to(ROOT))
        for path in modules()
        if (source := path.read_text(encoding="utf-8")) and SPDX not in source.splitlines()[:2]
    ]

    assert without == []


def test_no_module_is_longer_than_500_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in modules()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }

    assert long == {}


def product_nodes() -> Iterator[tuple[str, ast.AST]]:
    """Yield each part of the syntax tree of what is installed, with the path of its module."""
    for path in modules():
        parts = path.relative_to(ROOT).parts
        if parts[0] in {"trackhub", "jobs"} or "src" in parts:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                yield "/".join(parts), node


def test_no_function_of_the_product_is_longer_than_50_lines() -> None:
    long = {}
    for path, node in product_nodes():
        if isinstance(node, ast.FunctionDef):
            first = node.body[1 if ast.get_docstring(node) and len(node.body) > 1 else 0]
            lines = (node.end_lineno or 0) - first.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                long[f"{path}: {node.name}"] = lines

    assert long == {}


def test_no_class_of_the_product_has_more_than_20_attributes() -> None:
    large = {}
    for path, node in product_nodes():
        if isinstance(node, ast.ClassDef):
            names = {
                part.attr
                for part in ast.walk(node)
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                if isinstance(part.value, ast.Name) and part.value.id == "self"
            }
            names |= {
                part.target.id
                for part in node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            }
            if len(names) > MAX_ATTRIBUTES:
                large[f"{path}: {node.name}"] = len(names)

    assert large == {}


def test_nothing_names_a_machine_or_a_package_index() -> None:
    options = "|".join(("extra-index" + "-url", "find" + "-links", "--index" + "-url"))
    forbidden = re.compile(rf"{re.escape(str(ROOT))}|{re.escape(str(Path.home()))}/|{options}")

    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if forbidden.search(line)
    ]

    assert found == []


@pytest.mark.parametrize("folder", [ROOT, *backend_folders()], ids=lambda folder: folder.name)
def test_requirements_have_no_exact_pin_and_do_not_name_the_genome_browser_package(folder: Path) -> None:
    project = pyproject(folder)["project"]
    extras = project.get("optional-dependencies", {}).values()

    for requirement in [*project.get("dependencies", []), *(item for extra in extras for item in extra)]:
        assert "==" not in requirement
        assert re.match(r"trackhub\b", requirement) is None  # ours is flare-trackhub


def test_the_source_distribution_has_the_tests_but_not_the_benchmark() -> None:
    """A renamed folder would come back into it: so each excluded path must exist."""
    sdist = pyproject(ROOT)["tool"]["hatch"]["build"]["targets"]["sdist"]

    assert "/tests" in sdist["include"]
    assert "/tests/bench" in sdist["exclude"]
    assert [path for path in sdist["exclude"] if not (ROOT / path.lstrip("/")).exists()] == []


def test_each_long_test_is_in_one_part_of_make_test_all() -> None:
    """A part names folders and files; a folder that no part names would never be run."""
    targets = [f"test-{part}" for part in ("flare", "products", "kit", "faults", "seeds", "hostile", "trainers")]
    shown = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    runs = [line.split("-m long", 1)[1].split() for line in shown.splitlines() if "-m pytest -m long" in line]
    tests = [*ROOT.glob("tests/*/test_*.py"), *ROOT.glob("backends/*/tests/test_*.py")]

    def is_among(test: Path, paths: Iterable[str]) -> bool:
        return any(test.is_relative_to(ROOT / path) for path in paths)

    def is_run_by(test: Path, words: list[str]) -> bool:
        ignored = [word.removeprefix("--ignore=") for word in words if word.startswith("--ignore=")]
        return is_among(test, (word for word in words if not word.startswith("-"))) and not is_among(test, ignored)

    times = {str(test.relative_to(ROOT)): sum(is_run_by(test, words) for words in runs) for test in tests}

    assert len(runs) == len(targets)
    assert {test: found for test, found in times.items() if found != 1} == {}


@pytest.mark.parametrize("folder", backend_folders(), ids=lambda folder: folder.name)
def test_a_backend_is_an_ordinary_plugin_and_is_covered_by_all_checks(folder: Path) -> None:
    name, root, own = folder.name, pyproject(ROOT), pyproject(folder)

    assert own["project"]["name"] == f"flare-trackhub-{name}"
    assert list(own["project"]["entry-points"]["trackhub.backends"]) == [name]
    assert f"$MYPY_CONFIG_FILE_DIR/backends/{name}/src" in root["tool"]["mypy"]["mypy_path"]
    assert f"trackhub_{name}" in root["tool"]["importlinter"]["root_packages"]
