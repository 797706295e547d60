# SPDX-License-Identifier: Apache-2.0
"""The code in the documents runs, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("backends/*/*.md"), *ROOT.glob("jobs/*/*.md")]
)
LINK = re.compile(r"\]\((?!https?://|mailto:|#)(?P<target>[^)#\s]+)")

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@documents
def test_the_python_code_in_a_document_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code that needs a running job or a server is marked `<!-- skip: next -->` in the document."""
    monkeypatch.chdir(tmp_path)

    for example in Sybil([PythonCodeBlockParser(), SkipParser()]).parse(path).examples():
        try:
            example.evaluate()
        except SkipTest:  # how Sybil tells of a skipped block
            continue


@documents
def test_the_links_between_documents_lead_somewhere(path: Path) -> None:
    targets = [match["target"] for match in LINK.finditer(path.read_text(encoding="utf-8"))]

    assert [target for target in targets if not (path.parent / target).exists()] == []
