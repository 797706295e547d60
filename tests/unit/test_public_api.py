# SPDX-License-Identifier: Apache-2.0
"""The public import paths are those in the table of docs/architecture.md, and nothing that users see uses others."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## Public import paths")[2]
ROWS = re.findall(r"^\| `(trackhub[\w.]*)` \| ([^|]+) \| ([^|]+) \|$", TABLE, re.MULTILINE)
PUBLIC = {module: re.findall(r"`(\w+)`", names) for module, _, names in ROWS}
ABRIDGED = {module for module, _, names in ROWS if "…" in names}

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("backends/*/*.md"), *ROOT.glob("jobs/*/*.md")]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"\$\{?(\w+)\}?")  # of the template
SOURCES = [
    *ROOT.glob("jobs/*/*.py"),
    *ROOT.glob("backends/*/src/**/*.py"),
    *ROOT.glob("trackhub/cli/templates/**/*.py.in"),
]

modules = pytest.mark.parametrize("module", PUBLIC)


def not_public(code: str) -> Iterator[str]:
    """Yield each module and name of trackhub that this code imports and that is not public."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_ours(alias.name) and alias.name not in PUBLIC)
        elif isinstance(node, ast.ImportFrom) and is_ours(node.module or ""):
            module = node.module or ""
            exported = importlib.import_module(module).__all__ if module in PUBLIC else ()
            names = {alias.name for alias in node.names} - set(exported)
            yield from sorted({f"{module}.{name}" for name in names} - set(PUBLIC))


def is_ours(module: str) -> bool:
    return module.partition(".")[0] == "trackhub"


def test_the_table_has_the_paths_that_other_documents_promise() -> None:
    assert {"trackhub", "trackhub.spi", "trackhub.testing", "trackhub.delivery", "trackhub.flare.recipe"} <= set(PUBLIC)
    assert all(purpose.strip() for _, purpose, _ in ROWS)


@modules
def test_a_public_module_exports_the_names_of_the_table(module: str) -> None:
    """Where the table ends in "…", the module exports more. Elsewhere a name that comes or goes is a decision."""
    exported = importlib.import_module(module).__all__

    assert PUBLIC[module]
    assert set(PUBLIC[module]) <= set(exported)
    assert module in ABRIDGED or set(PUBLIC[module]) == set(exported)


@modules
def test_a_public_module_has_each_name_that_it_announces_once(module: str) -> None:
    loaded = importlib.import_module(module)

    assert len(loaded.__all__) == len(set(loaded.__all__))
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_in_a_document_imports_public_names_only(path: Path) -> None:
    """The blocks are read as one file, as the guide has the methods of one class in several of them."""
    code = "\n".join(BLOCK.findall(path.read_text(encoding="utf-8")))

    assert list(not_public(code)) == []


def test_jobs_backends_and_the_template_import_public_names_only() -> None:
    assert len(SOURCES) > 20
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name in not_public(PLACEHOLDER.sub(r"\1", path.read_text(encoding="utf-8")))
    }

    assert found == set()
