# SPDX-License-Identifier: Apache-2.0
"""What sites log before it is certain that a key is aggregated is written once it is, or counted as late."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from tests.unit.test_aggregation import by_round, end, ended, facts, record
from trackhub.delivery.federation.aggregation import Aggregation, Output

MODULE = "trackhub.delivery.federation.aggregation"


def play(aggregation: Aggregation, round_: int, logged: Mapping[str, Iterable[str]]) -> list[Output]:
    """Play a round. ``logged`` has the keys that each site logs, with the round as value."""
    found = aggregation.add_facts(facts(round_, rounds_started=1.0))
    for site, keys in logged.items():
        aggregation.add(site, [record({key: float(round_)}, round_, round_) for key in keys])
    return found + ended(aggregation, round_)


def counts(outputs: Iterable[Output], key: str) -> dict[int, float]:
    return {n: values[f"{key}/count"] for n, values in by_round(list(outputs)).items() if f"{key}/count" in values}


def late(outputs: Iterable[Output]) -> float:
    return max((output.values.get("fl/late_values", 0.0) for output in outputs), default=0.0)


@pytest.mark.parametrize("every", [1, 2, 3, 10])
def test_a_key_of_every_third_round_has_the_statistics_of_round_0(every: int) -> None:
    aggregation, found = Aggregation(), list[Output]()
    for round_ in range(2 * every + 1):
        keys = ["val/loss"] if round_ % every == 0 else []
        found += play(aggregation, round_, {"site-1": keys, "site-2": keys})

    assert counts(found, "val/loss") == {0: 2.0, every: 2.0, 2 * every: 2.0}
    assert not aggregation.is_unfinished()


def test_rounds_whose_numbers_have_gaps_lose_no_statistics() -> None:
    aggregation, found = Aggregation(), list[Output]()
    for round_ in (0, 5, 10):
        found += play(aggregation, round_, {site: ["val/loss"] for site in ("site-1", "site-2")})

    assert counts(found, "val/loss") == {0: 2.0, 5: 2.0, 10: 2.0}


def test_a_site_that_joins_late_does_not_cost_the_rounds_before() -> None:
    aggregation, found = Aggregation(), list[Output]()
    for round_ in range(6):
        found += play(aggregation, round_, {"site-1": ["val/loss"], "site-2": ["val/loss"] if round_ > 3 else []})

    assert counts(found, "val/loss") == {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0}


def test_values_that_found_no_room_count_as_late_once_their_key_is_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}._MAX_KEPT_OF_SITE", 3)
    aggregation, found = Aggregation(), list[Output]()
    for round_ in range(6):  # "own" is of one site only, and no statistic
        found += play(aggregation, round_, {"site-1": ["own", "val/loss"], "site-2": ["val/loss"] * (round_ == 5)})
    found += end(aggregation)

    assert counts(found, "val/loss") == {0: 1.0, 5: 2.0}  # the first round keeps its place
    assert counts(found, "own") == {}
    assert late(found) == 4


def test_keys_of_one_site_take_no_room_from_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}._MAX_HELD_OF_SITE", 40)
    monkeypatch.setattr(f"{MODULE}._MAX_KEPT_OF_SITE", 20)
    aggregation, found = Aggregation(), list[Output]()
    own = [f"own/{i}" for i in range(7)]
    for round_ in range(50):
        keys = ["val/loss"] if round_ % 10 == 0 else []
        found += play(aggregation, round_, {"site-1": [*own, *keys], "site-2": keys})

    assert counts(found, "val/loss") == dict.fromkeys(range(0, 50, 10), 2.0)
    assert late([*found, *end(aggregation)]) == 0


def test_a_round_that_begins_again_keeps_what_was_logged_in_it_before() -> None:
    """Two workflows of one round each: only the end of the job says that there is no higher round."""
    aggregation, found = Aggregation(), list[Output]()
    for value in (1.0, 2.0):
        aggregation.add_facts(facts(0, rounds_started=value, steps__site_1=value, steps__site_2=1.0))
        for site, more in (("site-1", 0.0), ("site-2", 3.0)):
            aggregation.add(site, [record({"val/loss": value + more}, 0, 0)])
        found += ended(aggregation, 0)
    found += end(aggregation)

    means = [(o.values["val/loss/mean"], o.values["val/loss/weighted_mean"]) for o in found if len(o.values) > 2]
    assert means == [(2.5, 2.5), (3.5, 3.0)]
    assert late(found) == 0
    assert not aggregation.is_unfinished()


def test_a_longer_second_workflow_proves_the_keys_of_the_first() -> None:
    aggregation, found, both = Aggregation(), list[Output](), {site: ["val/loss"] for site in ("site-1", "site-2")}
    for round_ in (0, 0, 1):
        found += play(aggregation, round_, both)

    assert [output.round for output in found if "val/loss/count" in output.values] == [0, 0, 1]


@pytest.mark.parametrize(
    ("pattern", "keys"), [("val/iou[0]", {"val/iou[0]", "val/iou0"}), ("*/iou[[]1]", {"val/iou[1]"})]
)
def test_a_key_with_brackets_can_be_named_as_it_is(pattern: str, keys: set[str]) -> None:
    logged = ["val/iou[0]", "val/iou[1]", "val/iou0", "val/iou[0]x"]

    found = play(Aggregation([pattern]), 0, {"site-1": logged})

    assert {key for key in logged if counts(found, key)} == keys
