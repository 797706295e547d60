# SPDX-License-Identifier: Apache-2.0
"""Checks that two keys never become one: every key is in the store, under the key that the backend's key rules give.

An SDK may strip, cut or merge keys, so the checks log keys that differ in little, under every kind of record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import pytest

from trackhub.delivery.lane.fit_keys_to_backend import key_fitter
from trackhub.records import Kind, Metrics, Params, Summary, Tags, key_problem
from trackhub.spi import KeyRule
from trackhub.testing.checks.fixtures import ContractFixtures, Kit
from trackhub.testing.sample_calls_and_requests import (
    LOGGED_KINDS,
    Call,
    artifact,
    histogram,
    image,
    metric,
    table,
    text,
)
from trackhub.testing.scenario_delivery import DeliveredScenarios, check_run, scenario

__all__ = ["KeyChecks"]

# Each differs little from another key here. A store or its SDK may merge two of them, or use one of them as a name of
# its own.
_MERGED = [
    "lr", "--lr", "-lr", "lr-", "a", "-a-", "A", " a", "a ", "a  ", ".a", "./a", "a/.", "a.", "a/", "/a", "a/../a", "á",
    "a/b", "a//b", "a/./b", "/a/b", "a/b/", "a\\b", "a.b", "a_b", "a b", "a:b", "a%2Fb", "a_x002F_b", "..", "../a",
    "wandb", "_wandb", "__wandb", "_step", "_timestamp", "trackhub", "user/step", "user/user/step", "mlflow.runName",
    "step", "Step", "round", "job", "job_name", "site", "side", "time", "name", "params", "tags", "images", "nan", "0",
]  # fmt: skip


def _calls(kind: Kind, keys: Sequence[str]) -> list[Call]:
    """Return calls that log something of this kind under each key, with different content for each."""
    numbered = list(enumerate(keys))
    match kind:
        case Kind.PARAMS:
            return [Call(Params({key: number for number, key in numbered}))]
        case Kind.TAGS:
            return [Call(Tags({key: str(number) for number, key in numbered}))]
        case Kind.SUMMARY:
            return [Call(Summary({key: number for number, key in numbered}))]
        case Kind.TEXT:
            return [text(key, f"text {number}", 1) for number, key in numbered]
        case Kind.IMAGE:
            return [image(key, 1, shade=number) for number, key in numbered]
        case Kind.HISTOGRAM:
            return [histogram(key, 1, counts=(1.0, float(number))) for number, key in numbered]
        case Kind.TABLE:
            return [table(key, 1, count=number) for number, key in numbered]
        case Kind.ARTIFACT:
            return [artifact(key, f"content {number}".encode()) for number, key in numbered]
        case _:
            return [metric(key, 0.5 + number, 1) for number, key in numbered]


for _kind in LOGGED_KINDS:
    scenario(f"keys that look alike, of {_kind.name.lower()}")(partial(_calls, _kind, _MERGED))


@scenario("keys with difficult characters")
def _difficult() -> Sequence[Call]:
    keys = [
        "a/b/c", "a b", "a.b", "a:b", "a=b", "a,b", "a\\b", "a'b", 'a"b', "a%b", "a%2Fb", "a#b", "a?b", "a&b", "a*b",
        "a|b", "a<b>", "a{b}", "a[0]", "a(b)", "a`b", "a$b", "a@b", "a!b", "a~b", "a^b", "a+b", "a;b", "-a", ".a", "a.",
        "..", "../a", "/a", "a/", "a//b", " a", "a ", "_", "__", "_step", "_timestamp", "_x002F_",
        "CON", "nan", "0", "system/cpu", "epoch", "step", "time",
    ]  # fmt: skip
    return _calls(Kind.METRICS, keys)


@scenario("keys in many scripts")
def _scripts() -> Sequence[Call]:
    keys = [
        "é",
        "e\u0301",
        "損失",
        "потеря",
        "خسارة",
        "می\u200cشود",
        "🙂",
        "👩\u200d🔬",
        "\U0001d6fd/\U0001d6fe",
        "ß",
        "ss",
    ]
    return _calls(Kind.METRICS, [*keys, "İ", "K", "\u212a"])


@scenario("keys that are long")
def _long() -> Sequence[Call]:
    lengths = (100, 249, 250, 251, 255, 256, 500, 999, 1000)
    keys = [letter * n for n in lengths for letter in "ab"] + ["c" * 990 + end for end in ("1", "2", "/3")]
    return _calls(Kind.METRICS, keys)


_ALIKE = ["a/b", "a_b", "a.b", "a b", "a-b", "a:b", "A/b", "a/B", "a_x002F_b", "a%2Fb", "a/b_", "a/_b", "a__b", "ab"]


@scenario("keys that look alike, at several steps")
def _alike() -> Sequence[Call]:
    return [metric(key, 0.5 + number, step) for step in (1, 2) for number, key in enumerate(_ALIKE)]


@scenario("keys of params and tags that look alike")
def _alike_params() -> Sequence[Call]:
    return [*_calls(Kind.PARAMS, _ALIKE), *_calls(Kind.TAGS, _ALIKE)]


class KeyChecks(ContractFixtures):
    """Two keys never become one."""

    @pytest.mark.parametrize("kind", LOGGED_KINDS, ids=lambda kind: kind.name.lower())
    def test_keys_that_look_alike_stay_apart(self, scenarios: DeliveredScenarios, kind: Kind) -> None:
        """Keys that an SDK may merge, such as ``--lr`` and ``lr``, stay two under every kind of record."""
        scenarios[f"keys that look alike, of {kind.name.lower()}"].check()

    @pytest.mark.parametrize("kind", LOGGED_KINDS, ids=lambda kind: kind.name.lower())
    def test_keys_of_the_key_rule_stay_apart(self, kit: Kit, kind: Kind) -> None:
        """A reserved key, the key that the rule makes of it, and keys beyond the rule's length stay apart."""
        rig = kit.rig().start()
        rule = rig.can.key_rules.get(kind, rig.can.key_rule)
        rig.log("site-1", _calls(kind, _keys_at_the_limits(rule)))
        rig.finish()
        check_run(rig, ["site-1"], f"{kind.name.lower()} under keys at the limits of {rule}")

    def test_keys_with_difficult_characters(self, scenarios: DeliveredScenarios) -> None:
        """Separators, quotes, spaces, dots and reserved words in a key do no harm."""
        _stay_apart(scenarios, "keys with difficult characters")

    def test_keys_in_many_scripts(self, scenarios: DeliveredScenarios) -> None:
        """A key may be in any script. Two spellings that only look the same stay two."""
        _stay_apart(scenarios, "keys in many scripts")

    def test_long_keys_stay_apart(self, scenarios: DeliveredScenarios) -> None:
        """Keys of up to 1000 characters are stored. Two keys that differ only at their end stay two."""
        _stay_apart(scenarios, "keys that are long")

    def test_keys_stay_apart_at_every_step(self, scenarios: DeliveredScenarios) -> None:
        """Metrics whose keys look alike stay apart when they are logged again."""
        _stay_apart(scenarios, "keys that look alike, at several steps")

    def test_keys_of_params_and_tags_stay_apart(self, scenarios: DeliveredScenarios) -> None:
        """A param and a tag may have the same key, among others that look alike."""
        scenarios["keys of params and tags that look alike"].check()


def _keys_at_the_limits(rule: KeyRule) -> list[str]:
    """Return the keys that this rule has to change, and what it changes them into."""
    fit = key_fitter(rule)
    changed = [*rule.reserved_keys, *(prefix + end for prefix in rule.reserved_prefixes for end in ("", "x"))]
    if rule.max_chars is not None:
        changed += ["k" * rule.max_chars, "k" * (rule.max_chars + 1), "k" * rule.max_chars + "/"]
    changed += [f"{rule.reserved_as}{key}" for key in changed]
    return list(_unique(key for one in [*changed, "plain"] for key in (one, fit(one)) if key_problem(key) is None))


def _unique(keys: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(keys)


def _stay_apart(scenarios: DeliveredScenarios, name: str) -> None:
    delivered = scenarios[name]
    found = delivered.check()
    keys = {key for call in delivered.calls if isinstance(call.payload, Metrics) for key in call.payload.values}
    stored = {point.key for point in found.points}
    assert len(stored) == len(keys), f"{len(keys)} keys became {len(stored)}"
