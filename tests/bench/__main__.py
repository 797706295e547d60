# SPDX-License-Identifier: Apache-2.0
"""Compare FLARE's own tracking with trackhub: ``python -m tests.bench --records 2000``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.bench.arms import ARMS
from tests.bench.measure import Measurement, measure

_COLUMNS: list[tuple[str, Callable[[Measurement], float], str]] = [
    ("logged", lambda m: m.logged, "{:.0f}"),
    ("stored", lambda m: m.stored, "{:.0f}"),
    ("lost", lambda m: m.lost, "{:.0f}"),
    ("twice", lambda m: m.duplicates, "{:.0f}"),
    ("reordered", lambda m: m.reordered, "{:.0f}"),
    ("call median us", lambda m: m.call_median_s * 1e6, "{:.1f}"),
    ("call p99 us", lambda m: m.call_p99_s * 1e6, "{:.1f}"),
    ("stored/s", lambda m: m.rate, "{:.0f}"),
    ("lag s", lambda m: m.lag_s, "{:.2f}"),
    ("cpu s", lambda m: m.cpu_s, "{:.1f}"),
    ("wall s", lambda m: m.wall_s, "{:.1f}"),
]


def main() -> None:
    """Run every arm in turn, as often as asked, and print medians side by side."""
    args = _parse()
    runs: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="trackhub-bench-") as folder:
        for repeat in range(args.repeat):
            for external in {"in_process": [False], "external": [True], "both": [False, True]}[args.mode]:
                for arm in ARMS:  # in turn, so that what else the machine does falls on all of them
                    name = f"{arm.name}-{'external' if external else 'in_process'}-{repeat}"
                    print(f"running {name}", flush=True)
                    runs.append(
                        measure(
                            arm,
                            Path(folder, name),
                            external=external,
                            records=args.records,
                            rounds=args.rounds,
                            sites=args.sites,
                            pause_s=args.pause_ms / 1000,
                        )
                    )
    print(_describe_machine())
    print(f"{args.sites} sites, {args.rounds} round(s) of {args.records} records each; medians of {args.repeat} run(s)")
    for external in sorted({run.external for run in runs}):
        _print_table([run for run in runs if run.external is external], external)
    if args.json:
        args.json.write_text(json.dumps([asdict(run) for run in runs], indent=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--records", type=int, default=2000, help="log calls per site and round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--pause_ms", type=float, default=0.0, help="pause after each log call; 0 is flat out")
    parser.add_argument("--mode", choices=["in_process", "external", "both"], default="both")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every single measurement to this file")
    return parser.parse_args()


def _describe_machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}"


def _print_table(runs: list[Measurement], external: bool) -> None:
    by_arm = {arm.name: [run for run in runs if run.arm == arm.name] for arm in ARMS}
    medians = {
        name: {column: statistics.median(map(value, group)) for column, value, _ in _COLUMNS}
        for name, group in by_arm.items()
    }
    idle_cpu_s = medians["none"]["cpu s"]
    print(f"\n{'external process' if external else 'in process'}")
    print("".join(f"{name:>16}" for name in ("", *by_arm)))
    for column, _, form in _COLUMNS:
        print(f"{column:>16}" + "".join(f"{form.format(medians[name][column]):>16}" for name in by_arm))
    costs = {
        name: (values["cpu s"] - idle_cpu_s) / values["logged"] * 1e6
        for name, values in medians.items()
        if values["logged"]
    }
    print(f"{'cpu us/record':>16}{'':>16}" + "".join(f"{cost:>16.0f}" for cost in costs.values()))
    stock, ours = medians["stock"], medians["trackhub"]
    print(
        "trackhub against FLARE's own: "
        f"a log call {stock['call median us'] / ours['call median us']:.0f} x cheaper at the median, "
        f"{stock['call p99 us'] / ours['call p99 us']:.0f} x at p99; "
        f"{ours['stored/s'] / max(stock['stored/s'], 1e-9):.0f} x the rate; "
        f"lost {ours['lost']:.0f} against {stock['lost']:.0f}"
    )


if __name__ == "__main__":
    main()
