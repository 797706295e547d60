# SPDX-License-Identifier: Apache-2.0
"""The rules of a policy: what a record may still say when they have been applied to it."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackhub.errors import ConfigError
from trackhub.policy import KINDS, Policy, SiteRules
from trackhub.policy.judge import Judgement, judge_of
from trackhub.policy.round_and_clip import clipped, merged_histogram, rounded
from trackhub.policy.thinning import MAX_KEYS, Seen, thinning_of
from trackhub.records import Artifact, Blob, Histogram, Image, Metrics, Params, Payload, Summary, Table, Tags, Text

BLOB = Blob("0" * 32 + "-0", 3, "0" * 64, "image/png")
numbers = st.one_of(st.floats(), st.integers(-(1 << 63), (1 << 64) - 1))
words = st.sampled_from(["val", "train", "loss", "acc", "x"])
keys = st.lists(words, min_size=1, max_size=3).map("/".join)
patterns = st.sampled_from(
    ["*", "val/*", "*loss", "train", "tr*", "[vx]*", "?al/acc", "metrics:val/*", "params:*", "*:x"]
)


def judged(payload: Payload, *policies: Policy, forbid: tuple[str, ...] = (), leaves_site: bool = True) -> Judgement:
    """Return what is left: the first policy is the job's, the second the operator's."""
    rules = SiteRules.of_job(policies[0] if policies else None)
    rules = rules.with_operator(policies[1] if len(policies) > 1 else None, forbid)
    judge = judge_of(rules, leaves_site=leaves_site)
    assert judge is not None
    return judge.judge(payload)


def matches(pattern: str, kind: str, key: str) -> bool:
    """Written from the description of patterns."""
    front, colon, rest = pattern.partition(":")
    return fnmatchcase(key, rest) and front in ("*", kind) if colon else fnmatchcase(key, pattern)


def significant_digits(number: float) -> int:
    return len("".join(map(str, Decimal(repr(number)).normalize().as_tuple().digits)).lstrip("0")) or 1


@given(numbers, st.integers(1, 17))
def test_a_rounded_number_has_no_more_digits_and_is_the_nearest_one(number: float, digits: int) -> None:
    found = rounded(number, digits)

    assert type(found) is type(number)
    if not math.isfinite(number):
        assert found is number
        return
    assert significant_digits(found) <= digits
    exact, got = Decimal(number), Decimal(repr(found))
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1) if exact else Decimal(1)
    is_at_the_end = abs(number) > (1e308 if type(number) is float else 1 << 62)
    # A float of 17 digits, or next to zero, is itself rounded to 53 bits.
    assert abs(exact - got) <= step * (1 if is_at_the_end else Decimal("0.5000001")) + Decimal(math.ulp(number))
    assert not isinstance(found, int) or -(1 << 63) <= found < 1 << 64


@given(st.lists(st.floats(allow_nan=False), min_size=2), st.integers(1, 5))
def test_rounding_keeps_the_order_of_numbers(values: list[float], digits: int) -> None:
    found = [rounded(value, digits) for value in sorted(values)]

    assert found == sorted(found)


@given(numbers, st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)).map(sorted))
def test_a_clipped_number_is_in_its_range(number: float, bounds: list[float]) -> None:
    low, high = bounds

    found = clipped(number, low, high)

    assert low <= found <= high or math.isnan(number)
    assert found == number or number < low or number > high or math.isnan(number)


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 1000)), min_size=2, unique_by=lambda bin: bin[0]),
       st.integers(1, 3), st.tuples(st.floats(-100, 0), st.floats(1, 100)))  # fmt: skip
def test_a_histogram_keeps_its_sum_whatever_happens_to_its_edges(
    bins: list[tuple[float, int]], digits: int, bounds: tuple[float, float]
) -> None:
    edges, counts = sorted(edge for edge, _ in bins), [float(count) for _, count in bins[1:]]
    moved = [clipped(rounded(edge, digits), *bounds) for edge in edges]

    found = merged_histogram(moved, counts)

    if found is None:
        assert len(set(moved)) == 1
        return
    assert all(a < b for a, b in itertools.pairwise(found[0]))
    assert (set(found[0]), sum(found[1]), len(found[1])) == (set(moved), sum(counts), len(found[0]) - 1)


@given(st.dictionaries(keys, st.floats(allow_nan=False), min_size=1),
       st.one_of(st.none(), st.lists(patterns, max_size=3)), st.lists(patterns, max_size=2),
       st.one_of(st.none(), st.lists(patterns, max_size=3)), st.lists(patterns, max_size=2))  # fmt: skip
def test_a_value_leaves_only_if_job_and_operator_both_let_it(
    values: dict[str, float],
    job_allows: list[str] | None,
    job_denies: list[str],
    operator_allows: list[str] | None,
    operator_denies: list[str],
) -> None:
    job = Policy(allow=None if job_allows is None else tuple(job_allows), deny=tuple(job_denies))
    operator = Policy(
        allow=None if operator_allows is None else tuple(operator_allows), deny=tuple(operator_denies), digits=17
    )

    found = judged(Metrics(values), job, operator)

    def may_leave(key: str) -> bool:
        return all(
            (allows is None or any(matches(p, "metrics", key) for p in allows))
            and not any(matches(p, "metrics", key) for p in denies)
            for allows, denies in ((job_allows, job_denies), (operator_allows, operator_denies))
        )

    left = {key: value for key, value in values.items() if may_leave(key)}
    assert (found.payload.values if isinstance(found.payload, Metrics) else {}) == left
    assert bool(found.rule) == (not left)
    assert found.altered.total() == (len(values) - len(left) if left else 0)


@given(st.integers(1, 5), st.integers(1, 5), st.floats(allow_nan=False, allow_infinity=False))
def test_the_fewer_digits_and_the_operators_range_win(job: int, operator: int, number: float) -> None:
    mine, theirs = Policy(digits=job, clip={"*": (-1e6, 1e6)}), Policy(digits=operator, clip={"lo*": (0.0, 1.0)})

    found = judged(Metrics({"loss": number}), mine, theirs).payload

    assert isinstance(found, Metrics)
    assert found.values["loss"] == min(max(rounded(number, min(job, operator)), 0.0), 1.0)


def test_every_kind_of_record_can_be_denied_by_its_kind_and_by_its_key() -> None:
    payloads: dict[str, Payload] = {
        "metrics": Metrics({"k": 1.0}), "params": Params({"k": 1}), "tags": Tags({"k": "v"}), "text": Text("k", "v"),
        "image": Image("k", BLOB, 1, 1), "histogram": Histogram("k", [0.0, 1.0], [1.0]),
        "table": Table("k", ["a"], [[1]]), "artifact": Artifact("k", BLOB, "f"), "summary": Summary({"k": 1}),
    }  # fmt: skip
    assert payloads.keys() == KINDS.keys()
    for kind, payload in payloads.items():
        others = tuple(f"{other}:*" for other in KINDS if other != kind)
        assert judged(payload, Policy(deny=others)).payload is payload
        assert judged(payload, Policy(deny=(f"{kind}:*",))) == (None, f"job.deny {kind}:*", {})
        assert judged(payload, Policy(deny=("k",))) == (None, "job.deny k", {})
        assert judged(payload, Policy(allow=("other",))) == (None, "job.allow", {})
        assert judged(payload, forbid=(kind,)) == (None, f"operator.forbid_kinds {kind}", {})
        # What stays at the site is cut by nothing but this.
        assert judged(payload, forbid=(kind,), leaves_site=False).payload is None
    assert judge_of(SiteRules.of_job(Policy(allow=())), leaves_site=False) is None


@pytest.mark.parametrize("kind", [Params, Summary])
def test_rules_look_into_params_by_the_path_of_each_value(kind: type[Params] | type[Summary]) -> None:
    params = kind({"model": {"lr": 0.12345, "layers": [{"size": 1234, "name": "a"}], "token": "x"}, "data": {"n": 7}})

    found = judged(params, Policy(allow=("model/*",), deny=("*token",), digits=2, clip={"model/lr": (0.0, 0.1)}))

    assert found.payload == kind({"model": {"lr": 0.1, "layers": [{"size": 1200, "name": "a"}]}})
    assert found.altered == {
        "job.allow": 1, "job.deny *token": 1, "job.digits": 2, "job.clip model/lr": 1,
    }  # fmt: skip
    assert judged(params, Policy(deny=("params:model", "summary:model", "data"))).payload is None


def test_tables_and_histograms_have_their_numbers_rounded_and_clipped() -> None:
    table = judged(Table("val/t", ["a", "b"], [[1.23456, "text"], [True, None]]), Policy(digits=2))
    counts = judged(Histogram("h", [0.0, 0.111, 0.112, 9.0], [5.0, 1234.0, 2.0]), Policy(digits=2, clip={"h": (0, 1)}))

    assert table.payload == Table("val/t", ["a", "b"], [[1.2, "text"], [True, None]])
    assert counts.payload == Histogram("h", [0.0, 0.11, 1.0], [1200.0, 2.0])
    assert judged(Histogram("h", [5.0, 6.0], [3.0]), Policy(clip={"h": (0, 1)})) == (None, "job.clip h", {})


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 3)), max_size=60), st.integers(1, 5), st.floats(0, 5))
def test_thinning_lets_every_nth_value_of_a_key_pass_and_one_in_an_interval(
    calls: list[tuple[str, float]], every: int, interval_s: float
) -> None:
    thinning = thinning_of([("job", Policy(every=every)), ("operator", Policy(interval_s=interval_s))])
    if thinning is None:
        assert (every, interval_s) == (1, 0)
        return
    seen: Seen = {}
    now, passed = 1000.0, []
    for key, pause in calls:
        now += pause
        passed.append(thinning.take(seen, key, now) is None)

    for name in "ab":
        now, number, last = 1000.0, 0, -math.inf
        for (key, pause), did_pass in zip(calls, passed, strict=True):
            now += pause
            if key == name:
                assert did_pass == (number % every == 0 and now - last >= interval_s)
                number, last = number + 1, now if did_pass else last


def test_a_clock_that_is_set_back_stops_nothing_and_too_many_keys_are_withheld() -> None:
    thinning = thinning_of([("job", Policy(interval_s=10.0))])
    assert thinning is not None
    seen: Seen = {}

    assert [thinning.take(seen, "a", time) for time in (5000.0, 5001.0, 100.0)] == [None, "job.interval_s", None]
    for i in range(MAX_KEYS):
        thinning.take(seen, str(i), 0.0)
    assert thinning.take(seen, "one more", 0.0) == f"more than {MAX_KEYS} keys to thin"
    assert len(seen) == MAX_KEYS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alow": ["val/*"]}, "policy.alow: unknown rule; expected one of allow, deny, digits"),
        ({"deny": ["images:*"]}, r"'images:\*' has 'images' in front of the colon; expected one of metrics"),
        ({"allow": ["image:"]}, "policy.allow: 'image:' has no pattern for keys"),
        ({"digits": 0}, "policy.digits: expected `int` >= 1"),
        ({"every": 0}, "policy.every: expected `int` >= 1"),
        ({"interval_s": -1}, "policy.interval_s: expected `float` >= 0"),
        ({"clip": {"loss": [1, 0]}}, r"policy.clip: 'loss': \[1.0, 0.0\] is not a range"),
        ({"clip": {"loss": [0, math.inf]}}, "is not a range"),
        ({"keep_last": True}, "policy.keep_last: it has no effect without every or interval_s"),
        ({"allow": "val/*"}, "policy.allow: expected `array"),
        (["val/*"], "policy: expected a table of rules"),
    ],
)
def test_a_wrong_rule_is_named_with_what_was_expected(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Policy.from_mapping(values)


def test_rules_survive_the_way_through_a_job_and_a_spool() -> None:
    policy = Policy(allow=("val/*",), deny=("image:*",), digits=3, clip={"*": (0.0, 1.0)}, every=5, keep_last=True)

    assert Policy.from_mapping(policy.plain()) == policy
    rules = SiteRules.of_job(policy).with_operator(Policy(allow=()), ["image"])
    assert SiteRules.from_plain(rules.plain()) == rules
    assert rules.with_operator(Policy(allow=()), ["image"]) == rules
    assert not SiteRules.of_job(Policy())
