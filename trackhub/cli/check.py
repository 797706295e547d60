# SPDX-License-Identifier: Apache-2.0
"""``trackhub check``: run the contract kit on an installed backend. `trackhub.testing.kit_runner` does the work."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from trackhub.cli.output import print_error, print_json, print_lines
from trackhub.config import parse_option_flags

if TYPE_CHECKING:
    from trackhub.testing.kit_runner import CheckReport

__all__ = ["check"]

JSON_VERSION = 1
"""Version of the JSON document. New keys do not raise it. No key is removed, and none changes its meaning."""

_MARKS = {"passed": "ok", "failed": "FAILED", "declared": "declared", "skipped": "SKIPPED", "missing": "MISSING"}


@click.command()
@click.argument("name")
@click.option("--option", "-o", multiple=True, metavar="KEY=VALUE", help="An option of the backend; repeatable.")
@click.option("--quick", is_flag=True, help="Log fewer points.")
@click.option("--verbose", "-v", is_flag=True, help="Show what pytest prints, with tracebacks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; its keys are stable.")
def check(name: str, option: Sequence[str], quick: bool, verbose: bool, as_json: bool) -> None:
    """Run the contract kit on an installed backend.

    NAME is the backend's name, as `trackhub backends` lists it. The kit lets the backend store records, and reads them
    back with the backend's contract class.

    The exit status is 0 if every test passes, or fails as the contract class declares with a reason. The kit makes jobs
    of its own, and touches nothing else in a store.

    The JSON document is {"version": 1, "backend", "contract", "claimed", "passed", "cannot_tell", "tests": [...]}. Each
    test has name, rule, outcome ("passed", "failed", "declared", "skipped", "missing") and detail.
    """
    try:
        from trackhub.testing.kit_runner import run_check
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        print_error(
            "the contract kit needs pytest, which is not installed here. Install the extra `testing`: "
            "pip install 'flare-trackhub[testing]' (in a clone: pip install -e '.[testing]')"
        )
        sys.exit(2)
    options = parse_option_flags(f"{name}.{flag}" for flag in option).get(name, {})
    report = run_check(name, options, quick=quick, verbose=verbose and not as_json)
    if as_json:
        print_json({"version": JSON_VERSION, **msgspec.to_builtins(report)})
    else:
        _show(report)
    if not report.passed:
        sys.exit(1)


def _show(report: CheckReport) -> None:
    width = max(len(test.name) for test in report.tests)
    for test in report.tests:
        print_lines(f"{test.name.removeprefix('test_').ljust(width)}{_MARKS[test.outcome]}")
        if test.outcome != "passed":
            print_lines(*_indented(f"rule: {test.rule}" if test.rule else "", test.detail))
    for what, why in report.cannot_tell.items():
        print_lines(f"not checked, since this store cannot show it: {what} ({why})")
    counts = {mark: sum(test.outcome == mark for test in report.tests) for mark in _MARKS}
    told = ", ".join(f"{count} {mark}" for mark, count in counts.items() if count)
    verdict = "passes" if report.passed else "does NOT pass"
    print_lines(f"{report.backend} {verdict} version {report.contract} of the contract: {told}")
    if report.passed and report.claimed != report.contract:
        print_lines(f"its class says contract = {report.claimed}; set it to {report.contract}")


def _indented(*texts: str) -> list[str]:
    lines = [line for text in texts for line in text.splitlines() if line]
    return [textwrap.indent(line, "    ") for line in lines[:20]]
