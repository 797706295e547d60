# SPDX-License-Identifier: Apache-2.0
"""``trackhub check`` runs the unmodified kit on an installed backend and says what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
BACKEND = """
from trackhub.builtin.jsonl import JsonlBackend

class Acme(JsonlBackend):
    pass
"""
CONTRACT = """
import pytest
from acme_backend import Acme
from trackhub.testing.contracts.jsonl import JsonlContract

class Contract(JsonlContract):
    backend = Acme
    name = "acme"
"""
SKIPPED = CONTRACT.replace("class Contract", "@pytest.mark.skip(reason='later')\nclass Contract")


class Checked(NamedTuple):
    status: int
    report: dict[str, Any]
    error: str

    def outcome(self, test: str) -> tuple[str, str]:
        return next((found["outcome"], found["detail"]) for found in self.report["tests"] if found["name"] == test)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the distribution of the backend ``acme``, as pip would have left it."""
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    info.joinpath("entry_points.txt").write_text(
        "[trackhub.backends]\nacme = acme_backend:Acme\n[trackhub.contracts]\nacme = acme_contract:Contract\n"
    )
    tmp_path.joinpath("acme_backend.py").write_text(BACKEND)
    return tmp_path


def _command(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "trackhub.cli", "check", *arguments],
        cwd=site, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=280, check=False,
    )  # fmt: skip


def _check(site: Path, contract: str, *flags: str, name: str = "acme") -> Checked:
    site.joinpath("acme_contract.py").write_text(contract)
    done = _command(site, name, "--quick", "--json", *flags)
    return Checked(done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr)


def test_a_right_backend_passes_with_the_options_that_are_given(site: Path) -> None:
    folder = site / "elsewhere"

    checked = _check(site, CONTRACT, "--option", f"path={folder}")

    assert (checked.status, checked.report["passed"], checked.report["contract"]) == (0, True, 1), checked
    assert {test["outcome"] for test in checked.report["tests"]} == {"passed"}
    assert all(test["rule"] for test in checked.report["tests"])
    assert list(folder.glob("*/*.jsonl"))


def test_what_is_wrong_is_named_and_what_is_declared_or_skipped_is_told_apart(site: Path) -> None:
    """A declared failure that does not happen is a failure, too."""
    contract = (
        CONTRACT
        + """
    def canonical_value(self, value):
        return value + 1.0

    @pytest.mark.xfail(reason="it is shown a minute late")
    def test_times_are_those_of_the_log_calls(self, scenarios):
        super().test_times_are_those_of_the_log_calls(scenarios)

    @pytest.mark.xfail(reason="it has no texts")
    def test_keys_of_params_and_tags_stay_apart(self, scenarios):
        super().test_keys_of_params_and_tags_stay_apart(scenarios)

    @pytest.mark.skip(reason="too slow")
    def test_volume(self, kit):
        super().test_volume(kit)
"""
    )

    checked = _check(site, contract)

    assert (checked.status, checked.report["passed"]) == (1, False)
    outcome, detail = checked.outcome("test_equal_steps_are_all_kept")
    assert outcome == "failed"
    assert "the store does not hold what it must" in detail
    assert checked.outcome("test_times_are_those_of_the_log_calls") == ("declared", "it is shown a minute late")
    assert checked.outcome("test_keys_of_params_and_tags_stay_apart")[0] == "failed"
    assert checked.outcome("test_volume")[0] == "skipped"
    assert "test_volume is overridden without" in checked.outcome("test_contract_is_whole")[1]


def test_a_contract_that_is_skipped_as_a_whole_does_not_pass(site: Path) -> None:
    checked = _check(site, SKIPPED)

    assert checked.status == 1
    assert {test["outcome"] for test in checked.report["tests"]} == {"skipped"}


def test_the_verdict_is_told_in_words(site: Path) -> None:
    site.joinpath("acme_contract.py").write_text(SKIPPED)

    done = _command(site, "acme", "--quick")

    assert done.returncode == 1
    assert "acme does NOT pass version 1 of the contract" in done.stdout
    assert "volume" in done.stdout


@pytest.mark.parametrize(
    ("contract", "flags", "name", "message"),
    [
        (CONTRACT, ["--option", "paht=x"], "acme", "did you mean 'path'"),
        (CONTRACT, [], "acmee", "there is no backend 'acmee' here"),
        (CONTRACT.replace("backend = Acme\n", "\n"), [], "acme", "tests trackhub.builtin.jsonl.JsonlBackend"),
        (CONTRACT.replace('"acme"', '"other"'), [], "acme", "expected name = 'acme'"),
        ("import nothing_like_it", [], "acme", "cannot be imported"),
        ("Contract = 1", [], "acme", "is not a subclass of trackhub.testing.BackendContract"),
    ],
)
def test_what_cannot_be_checked_is_an_error_of_one_line(
    site: Path, contract: str, flags: list[str], name: str, message: str
) -> None:
    checked = _check(site, contract, *flags, name=name)

    assert (checked.status, checked.report) == (1, {})
    assert message in checked.error
    assert "Traceback" not in checked.error


def test_a_backend_without_a_contract_is_told_how_to_name_one(site: Path) -> None:
    points = site / "acme-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().partition("[trackhub.contracts]")[0])

    checked = _check(site, CONTRACT)

    assert checked.status == 1
    assert "should have an entry point 'acme' in the group 'trackhub.contracts'" in checked.error
