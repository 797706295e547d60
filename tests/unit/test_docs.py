# SPDX-License-Identifier: Apache-2.0
"""The documents: their code runs, their links lead somewhere, and the index leads to every page."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
from click.testing import CliRunner
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import trackhub
from trackhub.cli.attach import attach

ROOT = Path(__file__).resolve().parents[2]
INDEX = ROOT / "docs" / "index.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("backends/*/*.md"), *ROOT.glob("jobs/*/*.md")]
)
LINK = re.compile(r"\]\((?!https?://|mailto:)(?P<target>[^)#\s]*)(?:#(?P<heading>[^)\s]+))?\)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MODULE = re.compile(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`")

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def links(path: Path) -> list[tuple[Path, str]]:
    """Return the file and the heading that each relative link of a document names."""
    text = CODE.sub("", path.read_text(encoding="utf-8"))
    found = [(match["target"], match["heading"] or "") for match in LINK.finditer(text)]
    return [((path.parent / target).resolve() if target else path, heading) for target, heading in found]


def headings(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as a forge makes them."""
    text = CODE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@documents
def test_the_python_code_in_a_document_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code that needs a running job or a server is marked `<!-- skip: next -->` in the document."""
    monkeypatch.chdir(tmp_path)
    # A mark also counts for a block of shell, which `test_docs_commands` checks.
    shell = CodeBlockParser(language="sh", evaluator=lambda example: None)

    for example in Sybil([PythonCodeBlockParser(), shell, SkipParser()]).parse(path).examples():
        try:
            example.evaluate()
        except SkipTest:  # Sybil raises it for a skipped block
            continue


@documents
def test_the_links_of_a_document_lead_to_a_file_and_a_heading(path: Path) -> None:
    found = links(path)

    assert [str(target) for target, _ in found if not target.exists()] == []
    assert [f"{target}#{heading}" for target, heading in found if heading and heading not in headings(target)] == []


def test_the_index_leads_to_every_page() -> None:
    linked = {target for target, _ in links(INDEX)}

    assert [page for page in DOCUMENTS if page != INDEX and page not in linked] == []


def test_the_readme_leads_to_the_index() -> None:
    assert INDEX in {target for target, _ in links(ROOT / "README.md")}


def test_the_modules_that_the_architecture_names_exist() -> None:
    """They are named from the package's folder, or from the repository's."""
    named = set(MODULE.findall(ARCHITECTURE.read_text(encoding="utf-8")))
    assert len(named) > 20

    assert [
        name for name in sorted(named) if not any((base / name).exists() for base in (ROOT / "trackhub", ROOT))
    ] == []


GENERATED = runpy.run_path(str(ROOT / "docs" / "generated_parts.py"))


@pytest.mark.parametrize("path", GENERATED["pages"](), ids=lambda path: path.name)
def test_the_generated_parts_of_a_page_are_those_of_the_code(path: Path) -> None:
    """White space may differ, since click's versions break lines differently."""
    text = path.read_text(encoding="utf-8")

    assert text.split() == GENERATED["filled"](text).split(), f"{path.name} is out of date; run `make pages`"


def test_the_reference_is_the_same_after_a_command_ran_without_its_group() -> None:
    """The commands are shared objects, and click keeps the first help option that it makes for each."""
    CliRunner().invoke(attach, ["--help"])

    reference = GENERATED["command_reference"]()

    assert reference.count("  -h, --help ") == reference.count("--help ") > 1


def test_each_part_that_can_be_generated_is_in_a_page() -> None:
    named = re.findall(
        r"<!-- generated: (\S+) -->", "".join(p.read_text(encoding="utf-8") for p in GENERATED["pages"]())
    )

    assert sorted(named) == sorted(GENERATED["PARTS"])


def test_the_page_of_the_writer_shows_each_of_its_methods() -> None:
    page = (ROOT / "docs" / "writer.md").read_text(encoding="utf-8")

    methods = [name for name in dir(trackhub.Writer) if not name.startswith("_")]

    assert len(methods) > 10
    assert [name for name in methods if f"writer.{name}(" not in page] == []


def test_the_help_of_the_commands_shows_each_example_on_a_line_of_its_own() -> None:
    help_text = GENERATED["command_reference"]()
    examples = re.findall(r"^  Examples:\n((?:    trackhub .+\n)+)", help_text, re.MULTILINE)

    assert len(examples) == help_text.count("Examples:") > 3
    assert "\\b" not in help_text


def texts(source: Path) -> Iterator[str]:
    """Yield the texts in a module, with "…" for what is put into them."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        text: Any = None
        if isinstance(node, ast.Constant):
            text = node.value
        elif isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        if isinstance(text, str):
            yield re.sub(r"%[sdrg]|%\.\df", "…", text)


def test_troubleshooting_quotes_messages_that_the_code_has() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    found = [
        text
        for pattern in ("trackhub/**/*.py", "backends/*/src/**/*.py", "jobs/**/*.py")
        for source in ROOT.glob(pattern)
        for text in texts(source)
        if len(text) > 10
    ]

    def has(message: str) -> bool:
        parts = [part for part in message.split("…") if part]
        return any(all(part in text for part in parts) for text in found)

    assert len(quoted) > 25
    assert [message for message in quoted if not has(message)] == []


def test_every_public_module_is_in_the_api_reference() -> None:
    table = ARCHITECTURE.read_text(encoding="utf-8").partition("## Public import paths")[2]
    public = set(re.findall(r"^\| `(trackhub[\w.]*)` \|", table, re.MULTILINE))
    trainers = (ROOT / "trackhub" / "integrations").glob("[a-z]*.py")
    public |= {f"trackhub.integrations.{path.stem}" for path in trainers}

    named = re.findall(r"^\.\. automodule:: (\S+)$", (ROOT / "docs" / "api.rst").read_text(), re.MULTILINE)

    assert sorted(named) == sorted(public)
