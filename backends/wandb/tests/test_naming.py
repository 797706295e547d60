# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from trackhub_wandb import WandBBackend
from trackhub_wandb.naming import (
    MAX_ARTIFACT_NAME_CHARS,
    MAX_NAME_CHARS,
    MAX_TAG_CHARS,
    PARAM_RULE,
    artifact_name,
    config_value,
    file_stem,
    row_rule,
    run_name,
    tag_text,
)

from backends.wandb.tests.conftest import Rig
from trackhub.delivery.lane.fit_keys_to_backend import key_fitter
from trackhub.spi import ANY_KEY, Capabilities, KeyRule, Kind

ROW_KINDS = (Kind.METRICS, Kind.TEXT, Kind.IMAGE, Kind.HISTOGRAM, Kind.TABLE)

fitted_row = key_fitter(row_rule("step", "round"))
fitted_param = key_fitter(PARAM_RULE)


def test_ordinary_keys_are_kept_and_taken_ones_move_below_user() -> None:
    """Only a key that W&B or this backend uses itself is spelt in another way."""
    assert [fitted_row(key) for key in ("loss", "train/step", "a.b", "step_time", "trackhub", "--lr", " a ")] == [
        "loss",
        "train/step",
        "a.b",
        "step_time",
        "trackhub",
        "--lr",
        " a ",
    ]
    assert [fitted_row(key) for key in ("step", "round", "_step", "_timestamp")] == [
        "user/step",
        "user/round",
        "user/_step",
        "user/_timestamp",
    ]
    assert [fitted_param(key) for key in ("lr", "step", "weight-decay", "_wandb", "trackhub")] == [
        "lr",
        "step",
        "weight-decay",
        "user/_wandb",
        "user/trackhub",
    ]


def test_two_row_keys_never_become_one() -> None:
    """A key that looks like the result of the rule already gets the prefix once more."""
    keys = ["step", "user/step", "user/user/step", "user/loss", "loss", "user/_x", "_x"]
    assert len({fitted_row(key) for key in keys}) == len(keys)
    assert fitted_row("user/loss") == "user/loss"


def test_hyphens_at_the_ends_of_a_param_are_escaped() -> None:
    """The SDK strips them, and would store ``--lr`` and ``lr`` as one."""
    keys = ["lr", "--lr", "-lr-", "lr-", "-", "--", "_x002D_lr", "user/_x002D_lr", "user/lr"]
    fitted = [fitted_param(key) for key in keys]
    assert len({key.strip("-") for key in fitted}) == len(keys)
    assert [key for key in fitted if key != key.strip("-")] == []


def test_rules_are_declared_for_the_columns_that_the_options_choose(rig: Rig) -> None:
    """The default names are free then, and the instance declares it, not the class."""
    backend = rig.backend(mode="offline", step_metric="it", round_metric="fl_round")
    for kind in ROW_KINDS:
        fit = key_fitter(rule_of(backend.capabilities, kind))
        assert [fit(key) for key in ("it", "fl_round", "step")] == ["user/it", "user/fl_round", "step"]
    fit = key_fitter(rule_of(WandBBackend.capabilities, Kind.METRICS))
    assert [fit(key) for key in ("it", "step")] == ["it", "user/step"]


def test_each_kind_has_the_rule_of_the_place_where_its_key_is_stored() -> None:
    """A row or the summary, the config, this backend's config entry, or an artifact's metadata."""
    can = WandBBackend.capabilities
    of_rows = {kind for kind in can.kinds if rule_of(can, kind) == row_rule("step", "round")}
    assert of_rows == {*ROW_KINDS, Kind.SUMMARY}
    assert rule_of(can, Kind.PARAMS) == PARAM_RULE
    assert [key_fitter(rule_of(can, Kind.TAGS))(key) for key in ("_x", "-a-", "trackhub")] == ["_x", "-a-", "trackhub"]
    assert rule_of(can, Kind.ARTIFACT) == ANY_KEY


def rule_of(can: Capabilities, kind: Kind) -> KeyRule:
    """Return the rule that the core applies to a kind."""
    return can.key_rules.get(kind, can.key_rule)


@pytest.mark.parametrize("key", ["../../etc/passwd", "a/b", "..", "\n", "ü" * 300, "x" * 300, "C:\\x", ".hidden"])
def test_file_stem_is_one_short_path_component(key: str) -> None:
    """No key leads out of the folder of its run."""
    stem = file_stem(key)
    assert "/" not in stem
    assert "\\" not in stem
    assert not stem.startswith(".")
    assert 0 < len(stem.encode()) < 100


def test_file_stems_of_keys_that_look_alike_differ() -> None:
    """Two keys that differ only in replaced characters have two names."""
    keys = ["a/b", "a_b", "a:b", "a b"]
    assert len({file_stem(key) for key in keys}) == len(keys)


def test_artifacts_of_two_sites_never_share_a_name() -> None:
    """All runs of a project share artifact names, so a name holds the site and cannot be taken for another pair."""
    pairs = [("model", "site-1"), ("model", "site-2"), ("a--b", "c"), ("a", "b--c"), ("a-", "b"), ("a", "-b")]
    names = [artifact_name(*pair) for pair in pairs]
    assert names[:2] == ["model--site-1", "model--site-2"]
    assert len(set(names)) == len(pairs)


def test_artifact_name_is_short_and_has_no_slash() -> None:
    """W&B refuses longer names and slashes."""
    name = artifact_name("models/best" * 40, "site/1")
    assert len(name) <= MAX_ARTIFACT_NAME_CHARS
    assert "/" not in name


def test_tag_is_key_and_value_and_fits() -> None:
    """A longer tag ends in a digest of the whole, so two stay two."""
    assert (tag_text("stage", "pilot"), tag_text("pilot", "")) == ("stage:pilot", "pilot")
    long = [tag_text("k", "v" * 100), tag_text("k", "v" * 101)]
    assert all(len(text) == MAX_TAG_CHARS for text in long)
    assert long[0] != long[1]


def test_config_values_are_plain_json() -> None:
    """A value that JSON does not have becomes text, at any depth, and an empty dict does not vanish."""
    value = {"a": [float("nan"), float("-inf")], "b": {"c": float("inf")}, "d": {}, 1: 2}
    assert config_value(value) == {"a": ["NaN", "-Infinity"], "b": {"c": "Infinity"}, "d": "{}", "1": 2}


def test_values_that_refer_to_artifacts_are_kept_as_text() -> None:
    """The SDK would look them up, with the receiver's login and at a host that the site chose."""
    value = {"a": "wandb-artifact://evil.example/x", "b": [{"_type": "artifactVersion", "id": "QXJ0"}], "c": "wandb"}
    assert config_value(value) == {
        "a": '"wandb-artifact://evil.example/x"',
        "b": ['{"_type": "artifactVersion", "id": "QXJ0"}'],
        "c": "wandb",
    }


def test_run_name_fits_and_two_stay_two() -> None:
    """W&B refuses a longer name. A job's name may have any length."""
    assert run_name("fedavg/site-1") == "fedavg/site-1"
    long = [run_name("j" * 200 + "/site-1"), run_name("j" * 200 + "/site-2")]
    assert [len(name) for name in long] == [MAX_NAME_CHARS] * 2
    assert long[0] != long[1]
