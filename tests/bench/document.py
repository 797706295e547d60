# SPDX-License-Identifier: Apache-2.0
"""What a benchmark prints and writes: one table, one JSON document, one last line.

The JSON document has these keys; keys are added without raising ``version``::

    version    1
    machine    {"cpu", "cores", "memory_gb", "system", "python", "packages": {name: version}, "load": before the run}
    settings   {"quick", "repeat", "only"}
    seconds    how long it took
    figures    [{"experiment", "what", "alternative", "value", "unit", "kind", "reach",
                 "score":   the ratio of the medians, or the median under "at most"; null if void or infinite
                 "spread":  [lowest, highest] score of a single round; null if void
                 "ours", "theirs": every run's value,
                 "lost", "lost_theirs": records that were logged and not stored, in all runs
                 "verdict": "reaches", "falls short" or "void",
                 "reason":  why it is void, or falls short}]
    summary    {"reach": n, "fall_short": n, "void": n}
"""

from __future__ import annotations

import os
import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.bench.figures import Outcome, to_json

__all__ = ["VERSION", "describe_machine", "document", "last_line", "machine_line", "table"]

VERSION = 1
_PACKAGES = ("nvflare", "tensorboard", "torch", "mlflow", "wandb", "msgspec")


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "load": round(os.getloadavg()[0], 2),
    }


def machine_line(machine: dict[str, Any]) -> str:
    """Return the machine in one line."""
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}, "
        f"Python {machine['python']}; {packages}; load before: {machine['load']}"
    )


def document(
    outcomes: Sequence[Outcome], machine: dict[str, Any], settings: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Return the JSON document."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    return {
        "version": VERSION,
        "machine": machine,
        "settings": settings,
        "seconds": round(seconds, 1),
        "figures": [to_json(outcome) for outcome in outcomes],
        "summary": {"reach": counts["reaches"], "fall_short": counts["falls short"], "void": counts["void"]},
    }


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the table's lines, and below them why figures are void or fall short."""
    head = ["what", "trackhub", "alternative", "", "score", "spread", "reach", "verdict"]
    rows = [head, *(_row(outcome) for outcome in outcomes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for outcome in outcomes:
        reason = outcome.reason or (outcome.figure.explain if outcome.verdict == "falls short" else "")
        if reason:
            lines.append(f"{outcome.verdict}: {outcome.figure.what}: {reason}")
        if outcome.lost_theirs:
            lines.append(f"lost in all runs of {outcome.figure.alternative}: {outcome.lost_theirs:,} records")
    return list(dict.fromkeys(lines))


def last_line(outcomes: Sequence[Outcome], seconds: float) -> str:
    """Return how many figures reach, and how many do not."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    return (
        f"{counts['reaches']} of {len(outcomes)} figures reach, {counts['falls short']} fall short, "
        f"{counts['void']} are void ({seconds:.0f} s)"
    )


def _row(outcome: Outcome) -> list[str]:
    figure = outcome.figure
    mark = "x" if figure.kind != "at most" else f" {figure.unit}"
    least = "<=" if figure.kind == "at most" else ">="
    return [
        figure.what,
        _values(outcome.ours, figure.unit),
        _values(outcome.theirs, figure.unit),
        figure.alternative,
        "-" if outcome.score is None else f"{_short(outcome.score)}{mark}",
        "-" if outcome.spread is None else f"{_short(outcome.spread[0])} to {_short(outcome.spread[1])}",
        f"{least} {_short(figure.reach)}{mark}",
        outcome.verdict,
    ]


def _values(values: Sequence[float], unit: str) -> str:
    return f"{_short(statistics.median(values))} {unit}" if values else "-"


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
