# SPDX-License-Identifier: Apache-2.0
"""The documents: their code runs, their links lead somewhere, and the index leads to every page."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

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

    for example in Sybil([PythonCodeBlockParser(), SkipParser()]).parse(path).examples():
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
