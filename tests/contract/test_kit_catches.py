# SPDX-License-Identifier: Apache-2.0
"""The contract kit, tested with backends that are wrong: each check catches the one that is made for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.contract.mutants import MUTANTS, Mutant
from tests.contract.mutants.base import ANYTHING
from trackhub.testing import BackendContract
from trackhub.testing.checks.fixtures import QUICK_ENV

ROOT = Path(__file__).resolve().parents[2]
Outcomes = dict[tuple[str, str], str]


def _run(folder: Path, *targets: str) -> Outcomes:
    """Run tests in a pytest of their own; return what each failed with, empty if it passed."""
    report = folder / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "--tb=line",
         f"--junitxml={report}", "--basetemp", str(folder / "tmp"), *targets],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, QUICK_ENV: "1"}, timeout=280, check=False,
    )  # fmt: skip
    assert report.exists(), done.stdout + done.stderr
    outcomes: Outcomes = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        name = (case.attrib["classname"].rpartition(".")[2], case.attrib["name"])
        outcomes[name] = "" if problem is None else f"{problem.tag}: {problem.attrib.get('message', '')}"
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mutant], Outcomes]:
    """What became of a mutant in the checks that are meant for it. All mutants of a file run at once."""

    @cache
    def of_file(file: str) -> Outcomes:
        targets = [
            f"{file}::{mutant.name}::{test}" for mutant in MUTANTS for test in mutant.caught_by if mutant.file == file
        ]
        return _run(tmp_path_factory.mktemp("mutants"), *targets)

    return lambda mutant: of_file(mutant.file)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.removeprefix("Test"))
def test_mutant_is_caught_by_the_check_meant_for_it(mutant: Mutant, outcomes: Callable[[Mutant], Outcomes]) -> None:
    found = outcomes(mutant)
    for check in mutant.caught_by:
        assert found[mutant.name, check].startswith("failure: AssertionError"), found[mutant.name, check] or "passed"


def test_every_check_of_the_contract_has_a_mutant() -> None:
    checks = {name for name in dir(BackendContract) if name.startswith("test_")}
    caught = {check.partition("[")[0] for mutant in MUTANTS for check in mutant.caught_by}
    assert caught == checks


@pytest.mark.long
@pytest.mark.parametrize(
    "mutant",
    [mutant for mutant in MUTANTS if mutant.also != ANYTHING],
    ids=lambda mutant: mutant.name.removeprefix("Test"),
)
def test_mutant_fails_nothing_but_what_its_defect_touches(mutant: Mutant, tmp_path: Path) -> None:
    outcomes = _run(tmp_path, f"{mutant.file}::{mutant.name}")

    failed = {test for (_, test), problem in outcomes.items() if problem}
    assert failed >= set(mutant.caught_by)
    others = failed - set(mutant.caught_by)
    assert {test for test in others if not any(re.fullmatch(pattern, test) for pattern in mutant.also)} == set()
