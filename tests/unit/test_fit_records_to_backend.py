# SPDX-License-Identifier: Apache-2.0
"""What is done to records for backends that cannot store everything: never two keys merged, never a silent change."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import ALL_KINDS
from trackhub.delivery.lane.fit_keys_to_backend import key_fitter
from trackhub.delivery.lane.fit_records_to_backend import MAX_MEMORY_BYTES, Adaptation
from trackhub.records import Metrics, Params, Payload, Record, Tags, Text
from trackhub.spi import ANY_KEY, Capabilities, Entry, KeyRule, Kind, Rejection

WORD = "A-Za-z0-9_"
ALL = Capabilities(
    kinds=ALL_KINDS, nonfinite=True, late_steps=True, optional_step=True, changing_params=True, key_rule=ANY_KEY,
)  # fmt: skip

# What could break an escape: its own characters, in every order, and those that it must escape.
tricky = st.text(st.sampled_from("_x0019AFf/é🙂 ") | st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)
alphabets = st.sampled_from([WORD, WORD + "./ -", "A-Za-z0-9_é"])


def can(**changes: Any) -> Capabilities:
    return msgspec.structs.replace(ALL, **changes)


def adapt(adaptation: Adaptation, payload: Payload, step: int | None = 0, stream: str = "s", seq: int = 0) -> Any:
    return adaptation.adapt(stream, Record(seq, 1.0, step, None, payload), seq)


def unescaped(key: str) -> str:
    return re.sub(r"_x([0-9A-F]{4,6})_", lambda match: chr(int(match[1], 16)), key)


@given(tricky, alphabets)
def test_an_escaped_key_has_only_allowed_characters_and_can_be_turned_back(key: str, allowed: str) -> None:
    escape = key_fitter(KeyRule(max_chars=None, chars=allowed))
    escaped = escape(key)
    assert re.fullmatch(f"[{allowed}]*", escaped)
    assert unescaped(escaped) == key


@given(tricky, tricky, alphabets)
def test_two_keys_never_become_one(a: str, b: str, allowed: str) -> None:
    escape = key_fitter(KeyRule(max_chars=None, chars=allowed))
    assert (escape(a) == escape(b)) == (a == b)


@given(st.from_regex(r"[A-Za-z0-9./ -]*", fullmatch=True))
def test_an_ordinary_key_stays_as_it_is(key: str) -> None:
    assert key_fitter(KeyRule(max_chars=None, chars=r"A-Za-z0-9_./ -"))(key) == key


@pytest.mark.parametrize("key", ["_x0041_", "_x0041", "__x0041_", "_x005F_x0041_", "é_x", "_é", "x0041_", "éx0041_"])
def test_a_key_that_looks_escaped_is_turned_back_to_itself(key: str) -> None:
    assert unescaped(key_fitter(KeyRule(max_chars=None, chars=WORD))(key)) == key


@given(st.lists(tricky.map(lambda k: k * 20), min_size=2, max_size=6, unique=True), st.integers(40, 120))
def test_long_keys_are_shortened_to_the_limit_and_stay_different(keys: list[str], limit: int) -> None:
    fit = key_fitter(KeyRule(max_chars=limit, chars=WORD))
    fitted = [fit(key) for key in keys]
    assert all(len(key) <= limit for key in fitted)
    assert len(set(fitted)) == len(keys)


def test_long_keys_with_one_beginning_stay_different_in_one_record() -> None:
    values = {"k" * 600 + str(i): float(i) for i in range(5)}
    entry, altered = adapt(Adaptation(can(key_rule=KeyRule(max_chars=250, chars=""))), Metrics(values))
    assert isinstance(entry.payload, Metrics)
    assert list(entry.payload.values.values()) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert max(map(len, entry.payload.values)) == 250
    assert altered == ["key_escaped"]


@pytest.mark.parametrize("payload", [Metrics({"a/b": 1.0}), Params({"a/b": 1}), Tags({"a/b": "x"}), Text("a/b", "x")])
def test_keys_of_every_kind_are_escaped(payload: Payload) -> None:
    entry, altered = adapt(Adaptation(can(key_rule=KeyRule(max_chars=None, chars=WORD))), payload)
    assert "a_x002F_b" in str(entry.payload)
    assert altered == ["key_escaped"]


def test_a_kind_that_is_not_claimed_is_rejected() -> None:
    rejection, altered = adapt(Adaptation(can(kinds=frozenset({Kind.METRICS}))), Text("k", "x"))
    assert (rejection.reason, altered) == ("unsupported_kind", [])


def test_nonfinite_values_are_taken_out_and_a_record_of_nothing_else_is_rejected() -> None:
    adaptation = Adaptation(can(nonfinite=False))
    entry, altered = adapt(adaptation, Metrics({"a": 1.0, "b": math.nan, "c": -math.inf}))
    assert (entry.payload, altered) == (Metrics({"a": 1.0}), ["nonfinite_removed"])
    rejection, altered = adapt(adaptation, Metrics({"b": math.inf}))
    assert (type(rejection), rejection.reason, altered) == (Rejection, "nonfinite", [])


def test_records_without_a_step_are_numbered_by_key_and_stream_where_a_step_is_needed() -> None:
    adaptation = Adaptation(can(optional_step=False))
    calls = [("s", "a"), ("s", "a"), ("s", "b"), ("t", "a"), ("s", "a")]
    steps = [adapt(adaptation, Metrics({key: 1.0}), None, stream)[0].step for stream, key in calls]
    assert steps == [0, 1, 0, 0, 2]
    assert adapt(adaptation, Metrics({"a": 1.0}), 77)[0].step == 77
    assert adapt(adaptation, Metrics({"a": 1.0, "c": 1.0}), None)[0].step == 3
    assert adapt(adaptation, Metrics({"c": 1.0}), None)[0].step == 4


def test_records_without_a_step_are_left_alone_where_that_can_be_stored() -> None:
    assert adapt(Adaptation(ALL), Metrics({"a": 1.0}), None)[0].step is None


def test_late_steps_are_rejected_by_key_where_they_cannot_be_stored() -> None:
    adaptation = Adaptation(can(late_steps=False))
    outcomes = [
        type(adapt(adaptation, Metrics({key: 1.0}), step)[0])
        for key, step in [("a", 5), ("a", 5), ("a", 4), ("b", 0), ("a", 6), ("b", 0)]
    ]
    assert outcomes == [Entry, Entry, Rejection, Entry, Entry, Entry]


def test_a_rejected_record_leaves_no_trace_in_the_order_of_steps() -> None:
    adaptation = Adaptation(can(late_steps=False))
    adapt(adaptation, Metrics({"a": 1.0}), 5)
    assert isinstance(adapt(adaptation, Metrics({"a": 1.0, "b": 1.0}), 4)[0], Rejection)
    assert isinstance(adapt(adaptation, Metrics({"b": 1.0}), 0)[0], Entry)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (1, 1, True),
        (1, 2, False),
        (1, True, False),
        (1, 1.0, False),
        ("1", 1, False),
        (math.nan, math.nan, True),
        (0.0, -0.0, False),
        ([1, math.nan], [1, math.nan], True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        (None, None, True),
    ],
)
def test_a_param_keeps_its_first_value_where_it_cannot_change(first: Any, second: Any, same: bool) -> None:
    adaptation = Adaptation(can(changing_params=False))
    adapt(adaptation, Params({"p": first}))
    outcome, _ = adapt(adaptation, Params({"p": second}))
    assert isinstance(outcome, Entry) is same
    entry, altered = adapt(adaptation, Params({"p": second, "q": 1}))
    assert list(entry.payload.values) == (["p", "q"] if same else ["q"])
    assert altered == ([] if same else ["param_changed"])


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["s", "t"]),
            st.none() | st.integers(0, 5),
            st.one_of(
                st.builds(Metrics, st.dictionaries(st.sampled_from("abc"), st.floats(), min_size=1)),
                st.builds(Params, st.dictionaries(st.sampled_from("pq"), st.integers(0, 2) | st.floats(), min_size=1)),
            ),
        ),
        min_size=1,
    ),
    st.data(),
)
def test_an_adaptation_that_goes_on_from_a_memory_gives_the_same_entries(calls: list[Any], data: st.DataObject) -> None:
    weak = can(optional_step=False, late_steps=False, nonfinite=False, changing_params=False)
    records = [(stream, Record(i, 1.0, step, None, payload)) for i, (stream, step, payload) in enumerate(calls)]
    straight = Adaptation(weak)
    expected = [straight.adapt(stream, record, record.seq) for stream, record in records]
    cut = data.draw(st.integers(0, len(records)))

    first = Adaptation(weak)
    for stream, record in records[:cut]:
        first.adapt(stream, record, record.seq)
    second = Adaptation(weak, first.memory())
    found = [second.adapt(stream, record, record.seq) for stream, record in records[cut:]]

    assert repr(found) == repr(expected[cut:])


def test_long_values_of_params_are_remembered_by_a_digest() -> None:
    adaptation = Adaptation(can(changing_params=False))
    for i in range(20):
        adapt(adaptation, Params({f"k{i}": f"{i}" + "x" * 100_000}))
    memory = adaptation.memory()

    later = Adaptation(can(changing_params=False), memory)

    assert len(memory) < 2000
    assert isinstance(adapt(later, Params({"k3": "3" + "x" * 100_000}))[0], Entry)
    changed, _ = adapt(later, Params({"k3": "3" + "x" * 99_999 + "y"}))
    assert isinstance(changed, Rejection)
    assert changed.reason == "param_changed"


MANY = [f"{i:04}" + "k" * 500 for i in range(4000)]


def test_keys_without_a_step_take_bounded_memory_in_any_number_of_streams() -> None:
    """The lane stores the memory with each confirmation, so that of one site could lock the journal for all."""
    adaptation = Adaptation(can(optional_step=False))
    first = {stream: adapt(adaptation, Metrics({"loss": 1.0}), None, stream, 7)[0].step for stream in ("a", "b")}
    for stream in ("a", "b"):
        for seq, key in enumerate(MANY):
            adapt(adaptation, Metrics({key: 1.0}), None, stream, 10 + seq)

    assert first == {"a": 0, "b": 0}
    assert len(adaptation.memory()) <= MAX_MEMORY_BYTES
    assert adapt(adaptation, Metrics({"loss": 1.0}), None, "a", 5000)[0].step == 1
    assert adapt(adaptation, Metrics({"loss": 1.0, "new": 1.0}), None, "a", 5001)[0].step == 2
    found = [adapt(adaptation, Metrics({"n" * 600: 1.0}), None, "b", seq)[0] for seq in (5002, 5003)]
    assert [entry.step for entry in found] == [5002, 5003]


@pytest.mark.parametrize(
    ("change", "payload"), [({"changing_params": False}, Params), ({"late_steps": False}, Metrics)]
)
def test_more_keys_than_a_lane_remembers_are_rejected(change: dict[str, Any], payload: Any) -> None:
    adaptation = Adaptation(can(**change))

    found = [adapt(adaptation, payload({key: 1.0}))[0] for key in MANY]

    refused = [one for one in found if isinstance(one, Rejection)]
    assert 0 < len(refused) < len(found)
    assert {one.reason for one in refused} == {"too_many_keys"}
    assert isinstance(adapt(adaptation, payload({MANY[0]: 1.0}))[0], Entry)
    assert len(adaptation.memory()) <= MAX_MEMORY_BYTES


@pytest.mark.parametrize("change", [{"optional_step": False}, {"changing_params": False}, {"late_steps": False}])
def test_a_full_memory_that_is_read_again_decides_in_the_same_way(change: dict[str, bool]) -> None:
    payload = Params if "changing_params" in change else Metrics
    step = None if "optional_step" in change else 0
    whole = Adaptation(can(**change))
    parts, from_parts = Adaptation(can(**change)), []
    for seq, key in enumerate(MANY):
        if seq % 50 == 0:
            parts = Adaptation(can(**change), parts.memory())
        from_parts.append(adapt(parts, payload({key: 1.0}), step, "s", seq)[0])

    assert from_parts == [adapt(whole, payload({key: 1.0}), step, "s", seq)[0] for seq, key in enumerate(MANY)]
