# SPDX-License-Identifier: Apache-2.0
"""Measure trackhub against its real alternatives: ``make bench``, ``make bench-quick``."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from tests.bench.curves import draw_all, measure_all
from tests.bench.document import describe_machine, document, last_line, machine_line, table
from tests.bench.figures import Experiment, Outcome, run_experiment

GROUPS = ("writer", "backends", "journal", "floor", "scale", "memory", "startup", "flare", "cifar")
QUICK_GROUPS = GROUPS[:-1]
"""What ``--quick`` runs: the CIFAR-10 job takes half a minute each time, however little it trains."""
BY_NAME = ("training",)
"""What runs only if it is asked for: some ten minutes of jobs under faults."""


def main(argv: list[str]) -> int:
    """Run the groups that are asked for, print the table, write the JSON document; 1 if a figure is void."""
    args = _parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and folders go as well
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
    curves = measure_all(args.quick, _tell)
    draw_all(curves, args.curves)
    _print([machine_line(machine), f"drawn into {args.curves}"])
    return 0


def _experiments(args: argparse.Namespace) -> list[Experiment]:
    found: list[Experiment] = []
    for name in args.only or (QUICK_GROUPS if args.quick else GROUPS):
        found += experiments_of(name, args.quick)
    if args.repeat:
        found = [replace(e, repeat=min(e.repeat, args.repeat)) for e in found]
    return found


def experiments_of(group: str, quick: bool) -> list[Experiment]:
    """Return a group's experiments; nothing runs yet."""
    found: list[Experiment] = importlib.import_module(f"tests.bench.{group}").experiments(quick)
    return found


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs of less work, and most of the figures")
    parser.add_argument(
        "--only", action="append", choices=(*GROUPS, *BY_NAME), metavar="GROUP", help=", ".join((*GROUPS, *BY_NAME))
    )
    parser.add_argument("--repeat", type=int, help="at most so many rounds of each experiment")
    parser.add_argument("--json", type=Path, default=Path("runs/bench.json"), help="default: %(default)s")
    parser.add_argument("--curves", type=Path, metavar="DIR", help="measure growth instead, and draw it into DIR")
    parser.add_argument("--verbose", action="store_true", help="print each experiment's figures at once")
    return parser.parse_args(argv)


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _print(lines: list[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
