# SPDX-License-Identifier: Apache-2.0
"""A FLARE job's federation run: statistics over the sites, who waited for whom, and what FLARE averaged itself."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime

import numpy as np
import pytest

from tests.integration.harness import Job, JobResult, Point

SITES = ("site-1", "site-2", "site-3", "site-4")
SLOW, ROUNDS, PAUSE_S = "site-3", 2, 3.0

TRAINER = f"""
import numpy as np

from trackhub import Writer

number = int(SITE[-1])
with Writer() as writer:
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        now = model.current_round
        value = number + 0.25 * now
        if number == 4 and now == 1:
            value = float("nan")
        fact(lambda: writer.log({{"val/loss": value}}, now), {{"val/loss": value}}, now)
        for step in range(3 * now, 3 * now + 3):
            writer.log({{"train/loss": 1.0 / (step + 1)}}, step)
        time.sleep({PAUSE_S} if SITE == "{SLOW}" else 0)
        update = np.array([[1, 0], [number, -0.5]], np.float32)
        params = {{name: array + update for name, array in model.params.items()}}
        meta = {{"NUM_STEPS_CURRENT_ROUND": number}}
        metrics = {{"accuracy": 0.1 * number + 0.05 * now}}
        flare.send(flare.FLModel(params=params, params_type="FULL", metrics=metrics, meta=meta))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    """A job with four sites, of which one sleeps in each round."""
    tracking = {"server": ["jsonl", "tensorboard"], "clients": ["jsonl"], "update_statistics": True}
    done = Job(tmp_path_factory.mktemp("federation"), TRAINER, tracking, n_clients=len(SITES), rounds=ROUNDS).run()
    assert done.rc == 0, done.log[-6000:]
    return done


@pytest.fixture(scope="module")
def points(result: JobResult) -> list[Point]:
    """What the federation run holds."""
    return result.jsonl_points("server", "federation")


def of(points: Sequence[Point], key: str) -> dict[int | None, float]:
    """Return a key's value by step. There is one for each step."""
    found = [(p.step, p.value) for p in points if p.key == key]
    assert len(found) == len(dict(found)), found
    return dict(found)


def test_statistics_are_those_of_numpy_over_what_the_sites_logged(result: JobResult, points: list[Point]) -> None:
    assert {p.key.split("/")[1] for p in points if p.key.startswith(("val/", "train/"))} == {"loss"}
    assert not [p for p in points if p.key.startswith("train/")]  # its steps are no rounds
    for round_ in range(ROUNDS):
        logged = {s: f.value for s in SITES for f in result.facts(s) if f.step == round_}
        finite = {site: value for site, value in logged.items() if np.isfinite(value)}
        values, weights = np.array(list(finite.values())), [int(site[-1]) for site in finite]

        assert of(points, "val/loss/mean")[round_] == pytest.approx(values.mean(), rel=1e-12)
        assert of(points, "val/loss/std")[round_] == pytest.approx(values.std(), rel=1e-12)
        assert of(points, "val/loss/min")[round_] == values.min()
        assert of(points, "val/loss/max")[round_] == values.max()
        weighted = np.average(values, weights=weights)
        assert of(points, "val/loss/weighted_mean")[round_] == pytest.approx(weighted, rel=1e-12)
        assert of(points, "val/loss/count")[round_] == len(finite)
    assert of(points, "val/loss/nonfinite") == {1: 1}


def test_the_site_that_all_others_waited_for_is_named(points: list[Point]) -> None:
    last = ROUNDS - 1  # in the first round each site's trainer starts, which takes as long
    waits = {site: of(points, f"fl/wait_seconds/{site}")[last] for site in SITES}
    seconds = {site: of(points, f"fl/seconds/train/{site}")[last] for site in SITES}
    named = [p for p in points if p.key.startswith("fl/waited_for_seconds/") and p.step == last]

    assert seconds[SLOW] >= PAUSE_S
    assert waits.pop(SLOW) == 0
    assert [p.key for p in named] == [f"fl/waited_for_seconds/{SLOW}"]
    assert named[0].value == pytest.approx(min(waits.values()), abs=1e-9)
    assert named[0].value > PAUSE_S / 4


def test_each_round_says_which_sites_took_part_and_how_much_model_went_around(points: list[Point]) -> None:
    every_round = {0, 1}
    for key, expected in {
        "fl/sites_sampled": 4,
        "fl/sites_reported": 4,
        "fl/sites_missing": 0,
        "fl/sites_failed": 0,
        "fl/all_reported": 1,
        "fl/model_bytes_received": 4 * 16,  # four float32 from each site
    }.items():
        assert of(points, key) == dict.fromkeys(every_round, expected), key
    for site in SITES:
        assert of(points, f"fl/sampled/{site}") == dict.fromkeys(every_round, 1)
        assert of(points, f"fl/steps/{site}") == dict.fromkeys(every_round, int(site[-1]))
    assert all(seconds >= PAUSE_S for seconds in of(points, "fl/round_seconds").values())


def test_flares_own_averages_and_the_best_round_are_there(result: JobResult, points: list[Point]) -> None:
    average = np.average([0.1, 0.2, 0.3, 0.4], weights=[1, 2, 3, 4])
    by_round = {number: pytest.approx(average + 0.05 * number, rel=1e-6) for number in range(ROUNDS)}
    summary = json.loads((result.run_dir("server") / "metrics" / "metrics_summary.json").read_text())

    assert of(points, "aggregated/accuracy") == by_round
    assert of(points, "fl/best_round") == {1: summary["best_round"]} == {1: 1}
    # FLARE's selector of models gives all sites the same weight.
    assert of(points, "fl/best/accuracy") == {1: pytest.approx(0.25 + 0.05, rel=1e-6)}


def test_the_weights_are_those_of_flares_aggregator(result: JobResult, points: list[Point]) -> None:
    for site in SITES:
        assert of(points, f"fl/weight/{site}") == dict.fromkeys(range(ROUNDS), float(site[-1]))
    file = result.run_dir("server") / "metrics" / "round_metrics.jsonl"
    for line in map(json.loads, file.read_text().splitlines()):
        weights = {site["name"]: site["weight"] for site in line["sites"]}
        assert weights == {site: of(points, f"fl/weight/{site}")[line["round"]] for site in SITES}


def test_updates_have_the_norm_and_cosine_that_numpy_finds(points: list[Point]) -> None:
    updates = {site: np.array([1, 0, int(site[-1]), -0.5]) for site in SITES}
    mean = np.mean([*updates.values()], axis=0)
    for site, update in updates.items():
        norm = np.linalg.norm(update)
        assert of(points, f"fl/update_norm/{site}") == dict.fromkeys(range(ROUNDS), pytest.approx(norm, rel=1e-6))
        cosine = update @ mean / norm / np.linalg.norm(mean)
        assert of(points, f"fl/update_cosine/{site}") == dict.fromkeys(range(ROUNDS), pytest.approx(cosine, rel=1e-6))
    assert not of(points, "fl/updates_left_out")


def test_the_rounds_agree_with_flares_log(result: JobResult, points: list[Point]) -> None:
    log = (result.workspace / "server" / "log.txt").read_text()
    assigned = {
        line[3]: _clock(line) for line in re.finditer(rf"{_TIME}.* assigned task to client \S+: .*id=(\S+)", log)
    }
    in_log: dict[str, list[float]] = {site: [] for site in SITES}
    for line in re.finditer(rf"{_TIME}.* got result from client (\S+) for task: name=train, id=(\S+)", log):
        in_log[line[3]].append(_clock(line) - assigned[line[4]])

    for site in SITES:
        seconds = of(points, f"fl/seconds/train/{site}")
        assert [seconds[n] for n in range(ROUNDS)] == pytest.approx(in_log[site], abs=1.0)  # a busy machine
    (text,) = [line["text"] for line in result.jsonl("server", "federation") if line["kind"] == "text"]
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [(row[0], row[2], row[3]) for row in rows] == [(f"| {round_}", "4", "4") for round_ in range(ROUNDS)]
    assert SLOW in rows[-1][-1]


def test_the_last_round_ends_before_flare_finalizes_the_workflow(result: JobResult, points: list[Point]) -> None:
    """FLARE imports torch then, which takes seconds on any machine."""
    log = (result.workspace / "server" / "log.txt").read_text()
    (began,) = [_clock(line) for line in re.finditer(rf"{_TIME}[^\n]*\n-+\n *Round {ROUNDS - 1} started", log)]
    (ended,) = [_clock(line) for line in re.finditer(rf"{_TIME}.*Workflow: \S+ finalizing", log)]

    assert of(points, "fl/round_seconds")[ROUNDS - 1] == pytest.approx(ended - began, abs=1.0)


_TIME = r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})"


def _clock(line: re.Match[str]) -> float:
    return datetime.fromisoformat(line[1]).timestamp() + int(line[2]) / 1000


def test_it_is_counted_like_a_site_and_clients_have_none(result: JobResult, points: list[Point]) -> None:
    report = result.report("server")
    site = report["sites"]["federation"]

    assert report["balanced"]
    assert site["at_site"]["logged"] == site["journaled"] == len(result.jsonl("server", "federation"))
    for lane in report["lanes"].values():
        assert (lane["federation"]["confirmed"], lane["federation"]["state"]) == (site["journaled"], "finished")
    for receiver in SITES:
        assert set(result.report(receiver)["sites"]) == {receiver}


def test_tensorboard_has_the_same_points(result: JobResult, points: list[Point]) -> None:
    found = {(p.key, p.step): p.value for p in result.tensorboard_points("server", "federation")}

    for p in points:
        assert found[p.key, p.step] == pytest.approx(p.value, rel=1e-6, nan_ok=True), p
