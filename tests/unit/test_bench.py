# SPDX-License-Identifier: Apache-2.0
"""How the benchmark runs arms in turn, compares medians, and judges figures: reached, short or void."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bench.__main__ import BY_NAME, GROUPS, experiments_of
from tests.bench.measured_figures import (
    VERSION,
    Experiment,
    Figure,
    Kind,
    Run,
    document,
    judge,
    last_line,
    run_experiment,
    table,
)
from tests.bench.subprocesses import in_child

MACHINE = {"cpu": "x", "cores": 2, "memory_gb": 8, "system": "s", "python": "3", "packages": {}, "load": 0.0}


def figure(kind: Kind = "times less", reach: float = 2.0, explain: str = "", allowance: float = 0.0) -> Figure:
    against = "" if kind == "at most" else "theirs"
    return Figure("a call", "the SDK's", "us", "ours", against, "us", kind, reach, explain, allowance)


def runs(
    ours: Sequence[float], theirs: Sequence[float] = (), *, logged: int = 10, stored: int = 10
) -> dict[str, list[Run]]:
    return {
        "ours": [Run({"us": value}, logged, stored) for value in ours],
        "theirs": [Run({"us": value}, 10, 10) for value in theirs],
    }


def test_a_score_compares_the_medians_and_its_spread_compares_single_rounds() -> None:
    outcome = judge("e", figure(), runs([1, 2, 9], [10, 8, 9]))

    assert (outcome.score, outcome.spread, outcome.verdict) == (4.5, (1.0, 10.0), "reaches")


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "score", "verdict"),
    [
        ("times less", [5.0], [11.0], 2.2, "reaches"),
        ("times less", [5.0], [9.0], 1.8, "falls short"),
        ("times more", [9.0], [4.0], 2.25, "reaches"),
        ("times more", [7.0], [4.0], 1.75, "falls short"),
        ("at most", [1.5], [], 1.5, "reaches"),
        ("at most", [2.5], [], 2.5, "falls short"),
    ],
)
def test_each_kind_of_figure_says_which_score_is_better(
    kind: Kind, ours: list[float], theirs: list[float], score: float, verdict: str
) -> None:
    outcome = judge("e", figure(kind), runs(ours, theirs))

    assert outcome.score == pytest.approx(score)
    assert outcome.verdict == verdict


def test_a_figure_of_a_run_that_lost_a_record_is_void() -> None:
    outcome = judge("e", figure(), runs([1, 1, 1], [100, 100, 100], stored=9))

    assert (outcome.verdict, outcome.score, outcome.lost) == ("void", None, 3)
    assert outcome.reason == "3 records were lost"


def test_a_figure_of_a_run_that_stored_records_twice_is_void() -> None:
    assert judge("e", figure(), runs([1], [100], stored=11)).verdict == "void"


def test_records_that_the_alternative_lost_are_counted_and_void_nothing() -> None:
    lossy = {**runs([1], []), "theirs": [Run({"us": 100.0}, 10, 4)]}

    outcome = judge("e", figure(), lossy)

    assert (outcome.verdict, outcome.lost_theirs) == ("reaches", 6)


def test_an_allowance_changes_the_verdict_and_not_the_score() -> None:
    allowed = judge("e", figure(reach=1.0, allowance=2.0), runs([12], [10]))
    too_much = judge("e", figure(reach=1.0, allowance=2.0), runs([13], [10]))

    assert allowed.verdict == "reaches"
    assert allowed.score == pytest.approx(10 / 12)
    assert too_much.verdict == "falls short"


def test_arms_run_in_turn_each_in_an_empty_folder_that_is_removed_afterwards() -> None:
    order: list[str] = []
    folders: list[Path] = []

    def arm(name: str, folder: Path) -> Run:
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("x")
        order.append(name)
        folders.append(folder)
        return Run({"us": 1.0})

    experiment = Experiment(
        "e",
        {"ours": lambda f: arm("ours", f), "theirs": lambda f: arm("theirs", f), "slow": lambda f: arm("slow", f)},
        [figure(reach=1.0)],
        repeat=2,
        warm_up=1,
        once=frozenset({"slow"}),
    )
    outcomes, kept = run_experiment(experiment, lambda line: None)

    assert order == ["ours", "theirs", "slow", "ours", "theirs", "slow", "ours", "theirs"]
    assert {name: len(found) for name, found in kept.items()} == {"ours": 2, "theirs": 2, "slow": 1}
    assert not any(folder.exists() for folder in folders)
    assert [outcome.verdict for outcome in outcomes] == ["reaches"]


def test_an_arm_that_fails_makes_only_its_own_figures_void() -> None:
    def fails(folder: Path) -> Run:
        raise RuntimeError("no such server")

    def works(folder: Path) -> Run:
        return Run({"us": 1.0})

    bounded = figure("at most")
    outcomes, _ = run_experiment(
        Experiment("e", {"ours": works, "theirs": fails}, [figure(), bounded], repeat=2), lambda line: None
    )

    assert [outcome.verdict for outcome in outcomes] == ["void", "reaches"]
    assert "no such server" in outcomes[0].reason


def test_the_table_says_why_a_figure_falls_short_and_the_last_line_counts() -> None:
    outcomes = [
        judge("e", figure(), runs([1], [10])),
        judge("e", figure(reach=20, explain="the lock"), runs([1], [10])),
        judge("e", figure(), runs([1], [10], stored=9)),
    ]

    lines = table(outcomes)

    assert [line.split()[-1] for line in lines[2:5]] == ["reaches", "short", "void"]
    assert "falls short: a call: the lock" in lines
    assert "void: a call: 1 records were lost" in lines
    assert last_line(outcomes, 12.0) == "1 of 3 figures reach, 1 fall short, 1 are void (12 s)"


def test_the_document_is_strict_json_also_where_a_ratio_is_infinite() -> None:
    outcomes = [judge("e", figure(), runs([0], [10])), judge("e", figure("at most"), runs([1]))]

    whole = document(outcomes, MACHINE, {"quick": True}, 3.21)
    read = json.loads(json.dumps(whole, allow_nan=False))

    assert read["summary"] == {"reach": 2, "fall_short": 0, "void": 0}
    assert [f["score"] for f in read["figures"]] == [None, 1.0]
    assert read["figures"][1]["ours"] == [1.0]
    assert read["version"] == VERSION


def test_a_receiver_without_its_checks_stores_and_delivers_all(tmp_path: Path) -> None:
    """The benchmark replaces the checks by name, in a process of its own."""
    result = in_child("gate_costs:receive", folder=str(tmp_path), arm="checksums alone", backend="jsonl", records=2000)

    assert result["stored"] == 2000


def test_every_group_lists_its_experiments_without_running_them() -> None:
    for quick in (False, True):
        for group in (*GROUPS, *BY_NAME):
            for experiment in experiments_of(group, quick):
                assert all(f.arm in experiment.arms for f in experiment.figures)
                assert all(f.against in experiment.arms for f in experiment.figures if f.against)
