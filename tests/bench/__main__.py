# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m tests.bench``: measures trackhub against its alternatives, prints a table and writes JSON.

``make bench``, ``make bench-quick`` and ``make bench-curves`` call it. A *group* is a set of experiments that
``--only`` can name.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from tests.bench.growth import draw_curves, measure_curves
from tests.bench.measured_figures import (
    Experiment,
    Outcome,
    describe_machine,
    document,
    last_line,
    machine_line,
    run_experiment,
    table,
)

_EXPERIMENTS = {
    "writer": "process_costs:log_calls",
    "backends": "backend_rates:experiments",
    "journal": "journal_costs:size_and_status",
    "floor": "journal_costs:against_the_floor",
    "gate": "gate_costs:against_no_gate",
    "flood": "flood_costs:beside_a_flood",
    "aggregates": "federation_costs:aggregates",
    "scale": "growth:many_sites",
    "memory": "process_costs:memory",
    "startup": "process_costs:startup",
    "flare": "job_costs:flare_jobs",
    "unedited": "job_costs:unedited_scripts",
    "cifar": "job_costs:cifar10_job",
    "training": "job_costs:training_under_faults",
}
"""Group to the function that returns its experiments."""

BY_NAME = ("training",)
"""Groups that run only where ``--only`` names them: some ten minutes of jobs under faults."""
GROUPS = tuple(group for group in _EXPERIMENTS if group not in BY_NAME)
QUICK_GROUPS = tuple(group for group in GROUPS if group not in ("cifar", "flood"))
"""What ``--quick`` runs. The CIFAR-10 job takes half a minute each time, however little it trains. A flood needs some
seconds before it is one."""


def main(argv: list[str]) -> int:
    """Run the chosen groups, print the table and write the JSON document. Return 1 if a figure is void."""
    args = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit also removes servers and folders
    if args.curves:
        return _curves(args)
    begin, machine = time.monotonic(), describe_machine()
    outcomes: list[Outcome] = []
    for experiment in _experiments(args):
        found, _ = run_experiment(experiment, _tell)
        outcomes += found
        if args.verbose:
            _print(table(found))
    seconds = time.monotonic() - begin
    settings = {"quick": args.quick, "repeat": args.repeat, "only": args.only}
    whole = document(outcomes, machine, settings, seconds)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _print([machine_line(machine), *table(outcomes), f"written to {args.json}", last_line(outcomes, seconds)])
    return 1 if whole["summary"]["void"] else 0


def _curves(args: argparse.Namespace) -> int:
    """Measure how cost grows, and draw it."""
    machine = describe_machine()
    curves = measure_curves(args.quick, _tell)
    draw_curves(curves, args.curves)
    _print([machine_line(machine), f"drawn into {args.curves}"])
    return 0


def _experiments(args: argparse.Namespace) -> list[Experiment]:
    found: list[Experiment] = []
    for group in args.only or (QUICK_GROUPS if args.quick else GROUPS):
        found += experiments_of(group, args.quick)
    if args.repeat:
        found = [replace(e, repeat=min(e.repeat, args.repeat)) for e in found]
    return found


def experiments_of(group: str, quick: bool) -> list[Experiment]:
    """Return the experiments of a group. It does not run them."""
    module, _, name = _EXPERIMENTS[group].partition(":")
    found: list[Experiment] = getattr(importlib.import_module(f"tests.bench.{module}"), name)(quick)
    return found


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="most of the figures, from fewer and shorter runs")
    parser.add_argument(
        "--only", action="append", choices=tuple(_EXPERIMENTS), metavar="GROUP", help=", ".join(_EXPERIMENTS)
    )
    parser.add_argument("--repeat", type=int, help="run at most this many rounds of each experiment")
    parser.add_argument("--json", type=Path, default=Path("runs/bench.json"), help="default: %(default)s")
    parser.add_argument("--curves", type=Path, metavar="DIR", help="measure growth instead, and draw it into DIR")
    parser.add_argument("--verbose", action="store_true", help="print the figures of each experiment when it ends")
    return parser.parse_args(argv)


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _print(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
