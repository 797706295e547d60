# SPDX-License-Identifier: Apache-2.0
"""What every benchmark has in common: experiments whose arms run in turn, figures, and verdicts.

An *experiment* has arms, ways of doing the same work, of which one is trackhub's. The arms run in turn, as often as
asked, so that whatever else the machine does falls on all of them. Each run counts what it stored, and gives named
values. A *figure* is the ratio of one value between two arms, or one arm's value against a bound, with what it should
reach. A figure whose trackhub run lost a record is void. What the alternative lost is shown; it voids nothing, since
the loss is the alternative's own.
"""

from __future__ import annotations

import re
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Arm", "Experiment", "Figure", "Outcome", "Run", "Verdict", "judge", "run_experiment"]

Verdict = Literal["reaches", "falls short", "void"]
Kind = Literal["times less", "times more", "at most"]
_NO_NAME = re.compile(r"[^0-9A-Za-z]+")  # FLARE's simulator cannot have a space in its path


@dataclass(frozen=True)
class Run:
    """What one run of one arm gave.

    Attributes:
        values: name to number, in the unit that the figure states.
        logged: records that were logged.
        stored: of these, the ones found in the store afterwards, each counted once.
    """

    values: Mapping[str, float]
    logged: int = 0
    stored: int = 0

    @property
    def lost(self) -> int:
        """Records that were logged and are not in the store."""
        return self.logged - self.stored


Arm = Callable[[Path], Run]
"""Does the work once, in an empty folder that is removed afterwards."""


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        what, alternative: what is measured, and against what, in a few words.
        value: the name of the value.
        arm, against: the arms; ``against`` may be empty under ``at most``, and is then not measured.
        unit: of the two values, such as ``us`` or ``records/s``.
        kind: ``times less``: score = against / arm. ``times more``: score = arm / against. ``at most``: score = arm.
        reach: what the score should be: at least this, or under ``at most`` no more than this.
        allowance: what may come on top of the arm's value, such as seconds at a job's end: taken off for the verdict,
            not for the score.
        explain: if it falls short, why: what the profile says. Shown below the table.
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
    """Arms that are compared, and the figures that come of it.

    Attributes:
        repeat: rounds; in each, every arm runs once. One is enough where the value is a count that does not vary.
        warm_up: rounds before, which are not counted.
        once: arms that run in the first round only, since they take minutes and their value is a count.
    """

    name: str
    arms: Mapping[str, Arm]
    figures: Sequence[Figure]
    repeat: int = 5
    warm_up: int = 0
    once: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Outcome:
    """A figure as it was measured.

    Attributes:
        ours, theirs: every run's value; ``theirs`` is empty where there is no alternative to measure.
        score: of the medians.
        spread: lowest and highest score of a single round.
        lost: records that the arm lost in all its runs; voids the figure.
        lost_theirs: the same of the alternative.
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
    """Run all arms in turn, and judge the figures. An arm that fails voids the figures that need it, and no other."""
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
                except Exception as error:  # noqa: BLE001 - an alternative may fail in its own way; the others go on
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
    """Return the figure that these runs give."""
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
    """Pair the runs of a round; an alternative that ran once stands in every round."""
    for i, value in enumerate(a):
        yield value, b[min(i, len(b) - 1)] if b else 0.0


def _score(kind: Kind, ours: float, theirs: float) -> float:
    if kind == "at most":
        return ours
    above, below = (theirs, ours) if kind == "times less" else (ours, theirs)
    return above / below if below > 0 else float("inf")


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Return the figure as in the JSON document; ``tests.bench.document`` says what each key means."""
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
