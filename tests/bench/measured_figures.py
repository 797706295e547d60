# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: experiments, figures, verdicts, and the table and JSON document that show them.

An *experiment* has arms: ways of doing the same work, one of them with trackhub. `run_experiment` runs the arms in
turn, round after round, so that other load on the machine falls on all of them. Each run returns named values, and
counts the records that it logged and that it then found in the store.

A *figure* compares one value of two arms, or one arm's value with a bound, and has a target that it should reach.
`judge` makes a figure void if a trackhub run lost a record. Records that the alternative lost are shown, and void
nothing.

The JSON document has these keys. New keys may come without a new ``version``::

    version    1
    machine    {"cpu", "cores", "memory_gb", "system", "python", "packages": {name: version}, "load": before the run}
    settings   {"quick", "repeat", "only"}
    seconds    how long everything took
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
import re
import shutil
import statistics
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "VERSION",
    "Arm",
    "Experiment",
    "Figure",
    "Outcome",
    "Run",
    "Verdict",
    "describe_machine",
    "document",
    "judge",
    "last_line",
    "machine_line",
    "run_experiment",
    "table",
]

Verdict = Literal["reaches", "falls short", "void"]
Kind = Literal["times less", "times more", "at most"]
VERSION = 1
"""Version of the JSON document."""

_PACKAGES = ("nvflare", "tensorboard", "torch", "mlflow", "wandb", "msgspec")
_NO_NAME = re.compile(r"[^0-9A-Za-z]+")  # FLARE's simulator cannot have a space in its path


@dataclass(frozen=True)
class Run:
    """The result of one run of one arm.

    Attributes:
        values: name to number, in the unit that the figure states.
        logged: records that were logged.
        stored: how many of these are in the store afterwards, each counted once.
    """

    values: Mapping[str, float]
    logged: int = 0
    stored: int = 0

    @property
    def lost(self) -> int:
        """Records that were logged and are not in the store."""
        return self.logged - self.stored


Arm = Callable[[Path], Run]
"""Does the work once. Its argument is an empty folder, which `run_experiment` removes afterwards."""


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        what, alternative: what is measured, and against what, in a few words.
        value: which value of a `Run` is compared.
        arm, against: the two arms. ``against`` may be empty under ``at most``: then nothing is compared.
        unit: the unit of both values, such as ``us`` or ``records/s``.
        kind: ``times less``: score = against / arm. ``times more``: score = arm / against. ``at most``: score = arm.
        reach: the target: the least good score, or under ``at most`` the largest.
        allowance: how much the arm's value may be above that of ``against``, such as seconds at a job's end. The
            verdict takes it off, the score does not.
        explain: why the figure falls short, if it does, as a profile shows. Printed below the table.
    """

    what: str
    alternative: str
    value: str
    arm: str
    against: str
    unit: str
    kind: Kind
    reach: float
    explain: str = ""
    allowance: float = 0.0


@dataclass(frozen=True)
class Experiment:
    """Arms that are compared, and the figures that this gives.

    Attributes:
        repeat: how many rounds. In each round every arm runs once. One round is enough for a count that does not vary.
        warm_up: how many rounds run before these without being counted.
        once: arms that run in the first round only: they take long, and their value does not vary.
    """

    name: str
    arms: Mapping[str, Arm]
    figures: Sequence[Figure]
    repeat: int = 5
    warm_up: int = 0
    once: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Outcome:
    """A figure with its measured values.

    Attributes:
        ours, theirs: every run's value. ``theirs`` is empty where no alternative is measured.
        score: the score of the medians.
        spread: the lowest and the highest score of a single round.
        lost: records that the arm lost in all its runs. Any loss makes the figure void.
        lost_theirs: records that the alternative lost in all its runs.
    """

    experiment: str
    figure: Figure
    ours: list[float]
    theirs: list[float]
    score: float | None
    spread: tuple[float, float] | None
    lost: int
    lost_theirs: int
    verdict: Verdict
    reason: str = ""


def run_experiment(experiment: Experiment, tell: Callable[[str], None]) -> tuple[list[Outcome], dict[str, list[Run]]]:
    """Run all arms in turn and judge the figures. An arm that fails makes only the figures void that need it.

    Args:
        experiment: what to run.
        tell: takes one line about each run.

    Returns:
        The figures, and each arm's counted runs.
    """
    runs: dict[str, list[Run]] = {name: [] for name in experiment.arms}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="trackhub-bench-") as root:
        for number in range(-experiment.warm_up, experiment.repeat):
            for name, arm in experiment.arms.items():
                if name in failures or (name in experiment.once and number > 0):
                    continue
                folder = Path(root, f"{_NO_NAME.sub('-', name)}-{number}")
                folder.mkdir()
                begin = time.monotonic()
                try:
                    run = arm(folder)
                except Exception as error:  # noqa: BLE001 - one failing SDK must not end the whole bench
                    failures[name] = f"{name}: {type(error).__name__}: {error}"
                    tell(traceback.format_exc())
                    continue
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                if number >= 0:
                    runs[name].append(run)
                tell(f"{experiment.name}: {name} {number + 1}: {time.monotonic() - begin:.1f} s{_loss(run)}")
    return [judge(experiment.name, figure, runs, failures) for figure in experiment.figures], runs


def _loss(run: Run) -> str:
    return f", lost {run.lost} of {run.logged}" if run.lost else ""


def judge(
    experiment: str, figure: Figure, runs: Mapping[str, Sequence[Run]], failures: Mapping[str, str] | None = None
) -> Outcome:
    """Return the outcome of a figure.

    Args:
        experiment: the experiment's name.
        figure: what to compare.
        runs: arm to its runs.
        failures: arm to why it failed.
    """
    ours = list(runs.get(figure.arm, ()))
    theirs = list(runs.get(figure.against, ())) if figure.against else []
    reason = _why_void(figure, ours, theirs, failures or {})
    lost, lost_theirs = sum(run.lost for run in ours), sum(run.lost for run in theirs)
    a = [run.values[figure.value] for run in ours if figure.value in run.values]
    b = [run.values[figure.value] for run in theirs if figure.value in run.values]
    if reason:
        return Outcome(experiment, figure, a, b, None, None, lost, lost_theirs, "void", reason)
    score, allowed = (_score(figure.kind, _median(a) - off, _median(b)) for off in (0.0, figure.allowance))
    single = [_score(figure.kind, x, y) for x, y in _pairs(a, b)]
    reaches = allowed <= figure.reach if figure.kind == "at most" else allowed >= figure.reach
    return Outcome(
        experiment, figure, a, b, score, (min(single), max(single)), lost, lost_theirs,
        "reaches" if reaches else "falls short",
    )  # fmt: skip


def _why_void(figure: Figure, ours: Sequence[Run], theirs: Sequence[Run], failures: Mapping[str, str]) -> str:
    for name in (figure.arm, figure.against):
        if name in failures:
            return f"the run failed: {failures[name]}"
    if not ours or (figure.against and not theirs):
        return "there was no run"
    if any(figure.value not in run.values for run in [*ours, *theirs]):
        return f"a run did not give {figure.value!r}"
    if lost := sum(run.lost for run in ours):
        return f"{lost} records were lost"
    return ""


def _pairs(a: Sequence[float], b: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Pair the values of each round. An alternative that ran once is paired with every round."""
    for i, value in enumerate(a):
        yield value, b[min(i, len(b) - 1)] if b else 0.0


def _score(kind: Kind, ours: float, theirs: float) -> float:
    if kind == "at most":
        return ours
    above, below = (theirs, ours) if kind == "times less" else (ours, theirs)
    return above / below if below > 0 else float("inf")


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _to_json(outcome: Outcome) -> dict[str, Any]:
    """Return the figure as the JSON document has it; the module's docstring says what each key means."""
    figure = outcome.figure
    finite = outcome.score is not None and abs(outcome.score) != float("inf")
    return {
        "experiment": outcome.experiment,
        "what": figure.what,
        "alternative": figure.alternative,
        "value": figure.value,
        "unit": figure.unit,
        "kind": figure.kind,
        "reach": figure.reach,
        "score": outcome.score if finite else None,
        "spread": list(outcome.spread) if outcome.spread and finite else None,
        "ours": outcome.ours,
        "theirs": outcome.theirs,
        "lost": outcome.lost,
        "lost_theirs": outcome.lost_theirs,
        "verdict": outcome.verdict,
        "reason": outcome.reason or (figure.explain if outcome.verdict == "falls short" else ""),
    }


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
    """Return the JSON document.

    Args:
        outcomes: the figures.
        machine: from `describe_machine`.
        settings: the command's flags.
        seconds: how long everything took.
    """
    counts = Counter(outcome.verdict for outcome in outcomes)
    return {
        "version": VERSION,
        "machine": machine,
        "settings": settings,
        "seconds": round(seconds, 1),
        "figures": [_to_json(outcome) for outcome in outcomes],
        "summary": {"reach": counts["reaches"], "fall_short": counts["falls short"], "void": counts["void"]},
    }


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines of the table, and below them why figures are void or fall short."""
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
    """Return in one line how many figures reach their target, do not reach it, or are void."""
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
