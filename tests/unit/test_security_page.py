# SPDX-License-Identifier: Apache-2.0
"""SECURITY.md names, for each threat, what meets it and a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
THREATS = [
    tuple(cell.strip() for cell in line.strip("|").split(" | "))
    for line in PAGE.partition("## Threats")[2].splitlines()
    if line.startswith("| ") and not line.startswith(("| threat |", "| --- "))
]
TESTS = {
    name
    for folder in ("tests", "backends", "trackhub/testing")
    for path in (ROOT / folder).rglob("*.py")
    for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
}


def test_the_page_has_threats_of_each_who_is_not_trusted() -> None:
    assert len(THREATS) > 25
    for who in ("submitter", "site", "plugin", "server"):
        assert re.search(rf"^### .*{who}", PAGE, re.MULTILINE), who


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat[0][:60])
def test_each_threat_is_met_and_names_tests_that_exist(threat: tuple[str, ...]) -> None:
    assert len(threat) == 3, threat
    _, met_by, tests = threat
    named = re.findall(r"`([^`]+)`", tests)

    assert met_by
    assert named, "no test"
    for name in named:
        path, _, function = name.rpartition("::") if "::" in name else (name, "", "")
        if path.startswith("test_"):
            assert path in TESTS, name
        elif function:
            assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), name
        elif "/" in path:
            assert list(ROOT.glob(path)), name
