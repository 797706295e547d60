# SPDX-License-Identifier: Apache-2.0
"""docs/delivery.md names only tests that exist, all tests of the fault suite, and every limit with its default."""

from __future__ import annotations

import re
from pathlib import Path

from trackhub.limits import Limits

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "delivery.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 40

    missing = [
        f"{file}::{name}"
        for file, name in named
        if f"def {name}(" not in (ROOT / ("" if "/" in file else "tests/faults") / file).read_text(encoding="utf-8")
    ]

    assert missing == []


def test_the_page_lists_every_limit_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| ([\w.]+) \|", PAGE, re.MULTILINE))

    defaults = {name: getattr(Limits(), name) for name in Limits.__struct_fields__}
    shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in defaults.items()}
    assert listed == shown


def test_every_test_of_the_fault_suite_is_on_the_page() -> None:
    for path in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert f"`{path.name}::{name}`" in PAGE


def test_the_page_gives_the_promises_before_the_tests() -> None:
    promises, _, tests = PAGE.partition("\n## The tests\n")

    assert [n for n in range(1, 6) if f"\n### {n}. " not in promises] == []
    assert "::test_" not in promises
    assert "::test_" in tests
