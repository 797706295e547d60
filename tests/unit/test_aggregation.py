# SPDX-License-Identifier: Apache-2.0
"""Statistics over the sites' metrics are those of numpy, for the keys and at the moments that are documented."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackhub.delivery.federation.aggregation import JOB_ENDED, Aggregation, Output
from trackhub.delivery.federation.describe_values import describe
from trackhub.records import Metrics, Record

FLOATS = st.floats(min_value=-1e100, max_value=1e100, allow_subnormal=False)
SITES = ("site-1", "site-2", "site-3")
ROUNDS_OR_NONE = st.none() | st.integers(0, 2)


def record(values: dict[str, float], step: int | None, round_: int | None) -> Record:
    return Record(0, 1000.0 + (round_ or 0), step, round_, Metrics(values))


def facts(round_: int, **values: float) -> list[Record]:
    """Facts of a round. ``sampled_site_1=1.0`` stands for the key ``fl/sampled/site-1``."""
    named = {}
    for key, value in values.items():
        what, _, site = key.partition("__")
        named[f"fl/{what}/{site.replace('_', '-')}" if site else f"fl/{what}"] = value
    return [record(named, round_, round_)]


def sampled(aggregation: Aggregation, round_: int, sites: Sequence[str] = SITES) -> None:
    found = aggregation.add_facts([record({f"fl/sampled/{site}": 1.0 for site in sites}, round_, round_)])
    assert found == []


def ended(aggregation: Aggregation, round_: int, missing: int = 0) -> list[Output]:
    return aggregation.add_facts(facts(round_, round_seconds=2.0, sites_missing=float(missing)))


def end(aggregation: Aggregation) -> list[Output]:
    number = aggregation.last_round()
    return aggregation.add_facts([record({JOB_ENDED: 1.0}, number, number)])


def by_round(outputs: Sequence[Output]) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for output in outputs:
        found.setdefault(output.round, {}).update(output.values)
    return found


@given(st.lists(st.tuples(FLOATS, st.floats(min_value=1e-3, max_value=1e9)), min_size=1, max_size=40))
def test_statistics_are_those_of_numpy(pairs: list[tuple[float, float]]) -> None:
    values, weights = np.array([v for v, _ in pairs]), np.array([w for _, w in pairs])

    found = describe(list(values), list(weights))

    scale = float(np.abs(values).max()) + 1e-290  # numpy loses digits of the smallest floats
    assert found["mean"] == pytest.approx(np.mean(values), rel=1e-12, abs=scale * 1e-14)
    spread = np.std(values / scale) * scale  # numpy squares, and the squares of small numbers are 0
    assert found["std"] == pytest.approx(spread, rel=1e-9, abs=scale * 1e-12)
    assert found["weighted_mean"] == pytest.approx(np.average(values, weights=weights), rel=1e-12, abs=scale * 1e-14)
    assert (found["min"], found["max"], found["count"]) == (values.min(), values.max(), len(values))


@given(
    st.lists(
        st.tuples(st.sampled_from(SITES), ROUNDS_OR_NONE, st.sampled_from("abcn"), FLOATS, st.booleans()),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 10),
    st.integers(0, 60),
    st.sampled_from([None, ("a", "b"), ("a", "n"), ("*",)]),
    st.sampled_from([None, "n"]),
    st.integers(1, 4),
)
def test_rows_and_digests_of_rows_give_what_single_records_give(
    logged: list[tuple[str, int | None, str, float, bool]],
    size: int,
    closes_at: int,
    patterns: tuple[str, ...] | None,
    weight: str | None,
    piece: int,
) -> None:
    """A row of one round is taken as a whole. A round that has been closed counts each late value."""
    single, whole, digested = (Aggregation(patterns, weight) for _ in range(3))
    found: dict[Aggregation, list[Output]] = {single: [], whole: [], digested: []}
    for begin in range(0, len(logged), size):
        if begin <= closes_at < begin + size:
            for aggregation in found:
                aggregation.add_facts([record({"fl/steps/site-1": 1.0, "fl/steps/site-2": 2.0}, 0, 0)])
                sampled(aggregation, 0)
                found[aggregation] += ended(aggregation, 0)
        for site in SITES:
            own = [(i, one) for i, one in enumerate(logged[begin : begin + size]) if one[0] == site]
            row = [record({key: value}, n if counts_rounds else i, n) for i, (_, n, key, value, counts_rounds) in own]
            whole.add(site, row)
            digest = digested.digest()  # as the gate fills it
            for first in range(0, len(row), piece):
                part = row[first : first + piece]
                digest.add(set().union(*(r.payload.values for r in part)), part)  # type: ignore[union-attr]
            if not digested.add_digest(site, digest):
                digested.add(site, row)
            for one in row:
                single.add(site, [one])

    assert whole.rounds() == single.rounds() == digested.rounds()
    for aggregation in found:
        found[aggregation] += end(aggregation)
    expected = [(o.round, o.values) for o in found[single]]
    assert [(o.round, o.values) for o in found[whole]] == expected
    assert [(o.round, o.values) for o in found[digested]] == expected


@given(
    st.dictionaries(st.sampled_from(SITES), st.tuples(FLOATS, st.floats(min_value=1e-3, max_value=1e9)), min_size=1),
    st.sampled_from([None, ["val/*"], ["*"]]),
)
def test_a_named_metric_weighs_as_in_numpy(logged: dict[str, tuple[float, float]], patterns: list[str] | None) -> None:
    aggregation = Aggregation(patterns, "train/samples")
    found: list[Output] = []
    for round_ in range(2):
        sampled(aggregation, round_, [*logged])
        aggregation.add_facts([record({f"fl/steps/{site}": 7.0 for site in logged}, round_, round_)])
        for site, (value, weight) in logged.items():
            steps = [record({"train/samples": w}, 10 * round_ + i, round_) for i, w in enumerate((1e12, weight))]
            aggregation.add(site, [*steps, record({"val/loss": value}, round_, round_)])
        found += ended(aggregation, round_)

    values, weights = (np.array([pair[i] for pair in logged.values()]) for i in range(2))
    scale = float(np.abs(values).max()) + 1e-290
    written = [o.values["val/loss/weighted_mean"] for o in found if "val/loss/weighted_mean" in o.values]
    assert len(written) == (2 if patterns or len(logged) > 1 else 0)  # by default a key of two sites or more
    for mean in written:
        assert mean == pytest.approx(np.average(values, weights=weights), rel=1e-12, abs=scale * 1e-14)
    assert ("train/samples/mean" in {key for o in found for key in o.values}) is (patterns == ["*"])


def test_without_the_named_weight_of_each_site_there_is_no_weighted_mean() -> None:
    aggregation = Aggregation(["a"], "n")
    sampled(aggregation, 0, ["site-1", "site-2"])
    aggregation.add("site-1", [record({"a": 1.0, "n": 2.0}, 0, 0)])
    aggregation.add("site-2", [record({"a": 3.0}, 0, 0)])

    found = by_round(ended(aggregation, 0))

    assert found[0]["a/mean"] == 2.0
    assert "a/weighted_mean" not in found[0]


def test_a_site_without_a_finite_value_needs_no_weight() -> None:
    aggregation = Aggregation(["a"])
    sampled(aggregation, 0)
    aggregation.add_facts(facts(0, steps__site_1=1.0, steps__site_2=3.0))
    for site, value in zip(SITES, (0.0, 4.0, math.nan), strict=True):
        aggregation.add(site, [record({"a": value}, 0, 0)])

    found = by_round(ended(aggregation, 0))

    assert (found[0]["a/weighted_mean"], found[0]["a/nonfinite"]) == (3.0, 1.0)


def test_a_site_that_weighs_in_any_rounds_takes_no_room_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trackhub.delivery.federation.aggregation._MAX_HELD_OF_SITE", 100)
    aggregation = Aggregation(["a"], "n")
    aggregation.add("hostile", [record({"n": 1.0}, round_, round_) for round_ in range(10**6, 10**6 + 500)])

    assert aggregation.rounds() == 100  # the others were not kept

    sampled(aggregation, 0, ["site-1"])
    aggregation.add("site-1", [record({"a": 1.0, "n": 2.0}, 0, 0)])

    assert by_round(ended(aggregation, 0))[0]["a/weighted_mean"] == 1.0


def test_weights_are_forgotten_when_their_round_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trackhub.delivery.federation.aggregation._MAX_HELD_OF_SITE", 100)
    aggregation = Aggregation(["a"], "n")
    for round_ in range(200):
        aggregation.add_facts([record({"fl/sampled/site-1": 1.0}, round_, round_)])
        aggregation.add("site-1", [record({"a": 1.0, "n": 2.0}, round_, round_)])
        (output,) = ended(aggregation, round_)

    assert output.values["a/weighted_mean"] == 1.0


@given(st.lists(st.one_of(FLOATS, st.sampled_from([math.nan, math.inf, -math.inf])), min_size=1, max_size=20))
def test_values_that_are_not_finite_are_counted_and_change_nothing_else(values: list[float]) -> None:
    finite = [v for v in values if math.isfinite(v)]

    found = describe(values)

    assert found.pop("nonfinite", 0) == len(values) - len(finite)
    assert found == (describe(finite) if finite else {"count": 0})


def test_the_largest_floats_have_a_mean_and_a_spread() -> None:
    assert describe([1.7e308, 1.7e308])["mean"] == 1.7e308
    # One site's value must not raise: that would end the run for all.
    assert describe([0.0, 2.6e154])["std"] == pytest.approx(1.3e154)
    assert describe([1.7e308, -1.7e308])["std"] == math.inf


def test_a_site_that_logs_any_rounds_takes_no_room_from_the_others() -> None:
    aggregation = Aggregation()
    aggregation.add("hostile", [record({"x": 1.0}, round_, round_) for round_ in range(10**6, 10**6 + 60_000)])

    for round_ in range(2):
        for site in ("site-1", "site-2"):
            aggregation.add(site, [record({"val/loss": 1.0}, round_, round_)])
    found = by_round(end(aggregation))  # it took minutes: each of the rounds looked at all others

    assert [found[round_]["val/loss/count"] for round_ in range(2)] == [2.0, 2.0]
    assert found[10**6 + 49_999] == {"fl/late_values": 10_000.0}


def test_keys_that_a_site_takes_back_cost_no_look_at_all_its_rounds() -> None:
    """Each such key took 40 ms, and a site may use 100,000 keys."""
    aggregation, began = Aggregation(), time.process_time()
    aggregation.add("hostile", [record({"x": 1.0}, round_, round_) for round_ in range(20_000)])
    for i in range(2000):
        aggregation.add("hostile", [record({f"k{i}": 1.0}, 7, 7)])
        aggregation.add("hostile", [record({f"k{i}": 1.0}, 1, 7)])

    assert time.process_time() - began < 15


def test_rounds_of_keys_that_a_site_takes_back_are_forgotten() -> None:
    aggregation = Aggregation()
    for i in range(10):
        rounds = range(1000 * i, 1000 * i + 1000)
        aggregation.add("hostile", [record({f"k{i}": 1.0}, round_, round_) for round_ in rounds])
        aggregation.add("hostile", [record({f"k{i}": 1.0}, 1, 7)])

    assert aggregation.rounds() == 0


def test_rounds_that_a_site_makes_up_change_no_fact_about_the_job() -> None:
    aggregation = Aggregation()
    for round_ in range(2):
        sampled(aggregation, round_, ["site-1", "site-2"])
    aggregation.add("hostile", [record({"x": 1.0}, 2**63 - 1, 2**63 - 1)])

    assert (aggregation.rounds(), aggregation.last_round()) == (2, 1)


def test_a_round_that_a_site_makes_up_takes_no_statistics_from_a_job_of_one_round() -> None:
    aggregation = Aggregation()
    sampled(aggregation, 0, ["site-1", "site-2"])
    aggregation.add("hostile", [record({"x": 1.0}, 5, 5)])
    for site in ("site-1", "site-2"):
        aggregation.add(site, [record({"val/loss": 1.0}, 0, 0)])

    assert by_round(end(aggregation))[0]["val/loss/count"] == 2.0


def test_keys_of_each_step_take_no_place_from_those_of_a_round() -> None:
    aggregation = Aggregation()
    for site in ("site-1", "site-2"):
        aggregation.add(site, [record({f"gradient/{i}": 1.0 for i in range(1500)}, 0, 0)])
        aggregation.add(site, [record({f"gradient/{i}": 1.0 for i in range(1500)}, 1, 0)])
        aggregation.add(site, [record({"val/loss": 1.0}, round_, round_) for round_ in range(2)])

    assert by_round(end(aggregation))[1]["val/loss/count"] == 2.0


def test_a_site_with_any_number_of_keys_is_named_once_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    aggregation = Aggregation()
    aggregation.add("hostile", [record({f"k{i}": 1.0 for i in range(3000)}, 0, 0)])

    assert [r.getMessage() for r in caplog.records if "hostile" in r.getMessage()] == [
        "site 'hostile': its key 'k1000' and its other new keys are not aggregated: at most 1000 keys of a site are, "
        "and 5000 of all sites. Name the keys that matter: add_tracking(aggregate=[...])"
    ]


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, math.nan], [-1.0, 2.0]])
def test_weights_that_are_none_give_no_weighted_mean(weights: list[float]) -> None:
    assert "weighted_mean" not in describe([1.0, 2.0], weights)


def test_a_round_is_written_when_it_ends() -> None:
    aggregation = Aggregation()
    found: list[Output] = []
    for round_ in (0, 1):
        sampled(aggregation, round_)
        for i, site in enumerate(SITES):
            aggregation.add(site, [record({"val/loss": 10.0 * round_ + i}, round_, round_)])
        found += ended(aggregation, round_)

    # Round 0 alone does not show that the key counts rounds.
    assert [(output.round, sorted(output.values)[0]) for output in found] == [
        (0, "fl/all_reported"),
        (0, "val/loss/count"),
        (1, "fl/all_reported"),
    ]
    rounds = by_round(found)
    for round_ in (0, 1):
        values = np.array([0, 1, 2]) + 10.0 * round_
        assert rounds[round_]["fl/all_reported"] == 1
        assert rounds[round_]["val/loss/mean"] == values.mean()
        assert rounds[round_]["val/loss/std"] == pytest.approx(values.std())


def test_a_round_that_ends_without_a_site_is_written_then_and_says_so() -> None:
    aggregation = Aggregation(["val/*"])
    sampled(aggregation, 3)
    aggregation.add("site-1", [record({"val/loss": 1.0}, 7, 3)])

    found = by_round(ended(aggregation, 3, missing=2))

    assert found == {3: {"fl/all_reported": 0, **{f"val/loss/{k}": v for k, v in describe([1.0]).items()}}}


def test_sites_that_report_one_after_another_are_all_in_the_statistics() -> None:
    """As in a cyclic workflow: each site is sampled when the one before it has reported."""
    aggregation = Aggregation(["val/*"])
    for i, site in enumerate(SITES):
        sampled(aggregation, 0, [site])
        aggregation.add(site, [record({"val/loss": float(i)}, 0, 0)])
        assert aggregation.add_facts([record({f"fl/steps/{site}": 1.0 + i}, 0, 0)]) == []

    found = by_round(ended(aggregation, 0))

    expected = describe([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    assert found == {0: {"fl/all_reported": 1, **{f"val/loss/{name}": value for name, value in expected.items()}}}
    assert not aggregation.is_unfinished()


def test_what_sites_log_in_a_second_task_of_a_round_is_in_the_statistics() -> None:
    aggregation, found = Aggregation(), list[Output]()
    for round_ in range(2):
        sampled(aggregation, round_)
        for key in ("val/loss", "train/loss"):
            for i, site in enumerate(SITES):
                aggregation.add(site, [record({key: i + 0.5}, round_, round_)])
                aggregation.add_facts([record({f"fl/seconds/{key}/{site}": 1.0}, round_, round_)])
        found += ended(aggregation, round_)

    for round_, values in by_round(found).items():
        assert (values["val/loss/count"], values["train/loss/count"]) == (3, 3), round_
    assert not [output for output in found if "fl/late_values" in output.values]


def test_a_round_whose_end_was_not_seen_has_not_all_reported() -> None:
    aggregation = Aggregation(["*"])
    sampled(aggregation, 0, ["site-1"])
    aggregation.add("site-1", [record({"a": 1.0}, 0, 0)])

    found = by_round(end(aggregation))

    assert (found[0]["fl/all_reported"], found[0]["a/count"]) == (0, 1)


def test_the_last_value_of_a_site_counts_and_a_later_one_is_late() -> None:
    aggregation = Aggregation(["train/*"])
    sampled(aggregation, 0, ["site-1"])
    aggregation.add("site-1", [record({"train/loss": float(step)}, step, 0) for step in range(5)])

    assert by_round(ended(aggregation, 0))[0]["train/loss/mean"] == 4.0
    assert not aggregation.is_unfinished()
    aggregation.add("site-1", [record({"train/loss": 9.0}, 9, 0)])
    assert aggregation.is_unfinished()
    assert by_round(end(aggregation)) == {0: {"fl/late_values": 1}}
    assert end(aggregation) == []


def test_without_patterns_only_keys_that_count_rounds_are_aggregated() -> None:
    aggregation = Aggregation()
    found = []
    for round_ in range(3):
        sampled(aggregation, round_, ["site-1", "site-2"])
        for site in ("site-1", "site-2"):
            logged = [record({"loss": 1.0}, step, round_) for step in range(round_ * 2, round_ * 2 + 2)]
            aggregation.add(site, [*logged, record({"val/loss": 1.0}, round_, round_)])
        aggregation.add("site-1", [record({"alone": 1.0, "fl/sampled/x": 1.0}, round_, round_)])
        aggregation.add("server", [record({"val/loss": 99.0}, round_, round_)])
        found += ended(aggregation, round_)
    found += end(aggregation)

    keys = {key for output in found for key in output.values}
    assert keys == {"fl/all_reported", *(f"val/loss/{name}" for name in ("mean", "min", "max", "std", "count"))}
    assert by_round(found)[2]["val/loss/max"] == 1.0


@pytest.mark.parametrize("step", [None, 0, 7])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_record_without_a_round_takes_no_statistics_from_its_key(is_first: bool, step: int | None) -> None:
    """A value from before training, or of a site that a swarm has cut off."""
    aggregation = Aggregation()
    outside = [record({"val/loss": 9.0}, step, None)]
    if is_first:
        aggregation.add("site-2", outside)
    for round_ in range(2):
        for site in ("site-1", "site-2"):
            aggregation.add(site, [record({"val/loss": 1.0}, round_, round_)])
    if not is_first:
        aggregation.add("site-2", outside)

    found = by_round(end(aggregation))

    expected = {f"val/loss/{name}": value for name, value in describe([1.0, 1.0]).items()}
    assert found == {0: expected, 1: expected}  # and no late value


def test_a_job_of_one_round_has_statistics_at_its_end() -> None:
    aggregation = Aggregation()
    sampled(aggregation, 0, ["site-1", "site-2"])
    for site, value in (("site-1", 1.0), ("site-2", 3.0)):
        aggregation.add(site, [record({"val/loss": value}, 0, 0)])
    assert by_round(ended(aggregation, 0)) == {0: {"fl/all_reported": 1}}

    assert by_round(end(aggregation))[0]["val/loss/mean"] == 2.0


def test_rounds_that_nobody_announced_are_written_at_the_end() -> None:
    """So in workflows that the clients control: the server does not see their rounds."""
    aggregation = Aggregation()
    for round_ in (0, 1):
        for site in ("site-1", "site-2"):
            aggregation.add(site, [record({"val/loss": float(round_)}, round_, round_)])

    found = by_round(end(aggregation))

    assert {round_: values["val/loss/mean"] for round_, values in found.items()} == {0: 0.0, 1: 1.0}


def test_a_round_that_begins_again_is_written_again() -> None:
    """As with a second workflow, whose rounds begin at 0."""
    aggregation = Aggregation(["*"])
    found = []
    for value in (1.0, 2.0):
        aggregation.add_facts(facts(0, rounds_started=value))
        sampled(aggregation, 0, ["site-1"])
        aggregation.add("site-1", [record({"a": value}, 0, 0)])
        found += ended(aggregation, 0)

    assert [output.values["a/mean"] for output in found] == [1.0, 2.0]
    assert not aggregation.is_unfinished()


def test_weights_are_those_of_the_round() -> None:
    aggregation = Aggregation(["*"])
    sampled(aggregation, 0, ["site-1", "site-2"])
    aggregation.add_facts(facts(0, steps__site_1=1.0, steps__site_2=3.0))
    for site, value in (("site-1", 0.0), ("site-2", 4.0)):
        aggregation.add(site, [record({"a": value}, 0, 0)])

    assert by_round(ended(aggregation, 0))[0]["a/weighted_mean"] == 3.0


def test_a_site_with_many_keys_leaves_room_for_the_others() -> None:
    aggregation = Aggregation(["*"])
    aggregation.add("site-1", [record({f"k{i}": 1.0 for i in range(3000)}, 0, 0)])
    aggregation.add("site-2", [record({"mine": 1.0}, 0, 0)])

    found = end(aggregation)

    keys = {key.rsplit("/")[0] for output in found for key in output.values}
    assert len(keys) == 1001
    assert "mine" in keys
    assert all(len(output.values) <= 1000 for output in found)


def test_a_weight_that_no_site_logs_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise a mistyped key looks as if there were no weighted means."""
    aggregation = Aggregation(["val/loss"], "train/sampels")
    for round_ in range(2):
        sampled(aggregation, round_)
        for site in SITES:
            aggregation.add(site, [record({"val/loss": 1.0, "train/samples": 5.0}, round_, round_)])
        ended(aggregation, round_)

    assert caplog.text.count("no site logged its weight 'train/sampels'") == 1
