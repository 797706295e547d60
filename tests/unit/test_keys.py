# SPDX-License-Identifier: Apache-2.0
"""Under every rule a backend can declare, keys are acceptable, two keys never become one, and plain keys stay."""

from __future__ import annotations

import posixpath
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackhub.delivery.lane.fit_keys_to_backend import key_fitter
from trackhub.spi import ANY_KEY, KeyRule

PLAIN = KeyRule(max_chars=None, chars="")
TRIMS = KeyRule(max_chars=None, chars="", edge_chars=r"^\-")
PATHS = KeyRule(max_chars=None, chars=r"\w./ :\-", is_path=True)
RESERVES = KeyRule(max_chars=None, chars="", reserved_keys=frozenset({"step", "job"}), reserved_prefixes=("_", "own."))
PREFIXES = KeyRule(
    max_chars=299,
    chars="",
    edge_chars=r"^\-",
    reserved_keys=frozenset({"step"}),
    reserved_prefixes=("_",),
    reserved_as="user/",
)
PREFIXES_AND_TRIMS = KeyRule(edge_chars=r"^\-", chars="", reserved_prefixes=("_",), reserved_as="user/")  # fmt: skip
WEAK = KeyRule()
SHORT = KeyRule(max_chars=40, chars=r"\w./-", edge_chars=r"\w", reserved_keys=frozenset({"a"}), is_path=True)
RULES = {
    "plain": PLAIN,
    "trims": TRIMS,
    "paths": PATHS,
    "reserves": RESERVES,
    "prefixes": PREFIXES,
    "prefixes and trims": PREFIXES_AND_TRIMS,
    "weak": WEAK,
    "short": SHORT,
}

parts = st.sampled_from(
    [
        "-",
        "--",
        "_",
        "/",
        ".",
        "..",
        "lr",
        "step",
        "user/",
        "own.",
        "job",
        "_x002D_",
        "_x005F",
        "x",
        "a",
        "é",
        " ",
        "\u200c",
    ]
)
keys = st.lists(parts, min_size=1, max_size=12).map("".join)


@pytest.mark.parametrize("name", RULES)
@given(found=st.lists(keys, min_size=2, max_size=8, unique=True))
def test_two_keys_never_become_one_under_any_rule(name: str, found: list[str]) -> None:
    fit = key_fitter(RULES[name])

    assert len({fit(key) for key in found}) == len(found)


@pytest.mark.parametrize("name", RULES)
@given(key=keys)
def test_a_fitted_key_keeps_its_rule(name: str, key: str) -> None:
    rule = RULES[name]

    fitted = key_fitter(rule)(key)

    assert fitted
    assert rule.max_chars is None or len(fitted) <= rule.max_chars
    if rule.chars:
        assert re.fullmatch(f"[{rule.chars}]*", fitted)
    if rule.edge_chars:
        assert re.fullmatch(f"[{rule.edge_chars}]", fitted[0])
        assert re.fullmatch(f"[{rule.edge_chars}]", fitted[-1])
    assert fitted not in rule.reserved_keys
    if rule.reserved_as:
        assert not fitted.startswith(rule.reserved_prefixes)
    if rule.is_path:
        assert posixpath.normpath(fitted) == fitted
        assert not fitted.startswith(("/", ".."))


@pytest.mark.parametrize("rule", [PLAIN, TRIMS, PATHS, RESERVES, PREFIXES])
@pytest.mark.parametrize("key", ["train/loss", "lr", "val acc", "a_b", "a.b-c"])
def test_an_ordinary_key_stays_as_it_is(rule: KeyRule, key: str) -> None:
    assert key_fitter(rule)(key) == key


@pytest.mark.parametrize(
    ("rule", "key", "expected"),
    [
        (TRIMS, "--lr", "_x002D__x002D_lr"),
        (TRIMS, "a-b-", "a-b_x002D_"),
        (PREFIXES, "step", "user/step"),
        (PREFIXES, "user/step", "user/user/step"),
        (PREFIXES, "_wandb", "user/_wandb"),
        (PREFIXES_AND_TRIMS, "--lr", "user/--lr"),
        (PREFIXES_AND_TRIMS, "user/--lr", "user/user/--lr"),
        (PREFIXES_AND_TRIMS, "lr-", "lr_x002D_"),
        (RESERVES, "job", "_x006A_ob"),
        (PATHS, "a//b", "a/_x002F_b"),
        (PATHS, "..", "_x002E_."),
    ],
)
def test_what_a_store_would_read_otherwise_is_changed(rule: KeyRule, key: str, expected: str) -> None:
    assert key_fitter(rule)(key) == expected


def test_a_key_that_is_spelt_like_a_cut_key_does_not_meet_it() -> None:
    fit = key_fitter(KeyRule(max_chars=40))
    long = "k" * 60

    assert fit(fit(long)) != fit(long)


def test_a_store_that_takes_any_key_gets_it_unchanged() -> None:
    assert key_fitter(ANY_KEY)("-_x002D_ / .. é\u200c") == "-_x002D_ / .. é\u200c"
