# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from trackhub_wandb.naming import (
    MAX_ARTIFACT_NAME_CHARS,
    MAX_TAG_CHARS,
    Names,
    artifact_name,
    config_value,
    file_stem,
    tag_text,
)


def test_ordinary_keys_are_kept_and_taken_ones_move_below_user() -> None:
    """Only what W&B or this backend uses itself is respelt."""
    names = Names("step", "round")
    assert [names.row(key) for key in ("loss", "train/step", "a.b", "step_time", "trackhub")] == [
        "loss",
        "train/step",
        "a.b",
        "step_time",
        "trackhub",
    ]
    assert [names.row(key) for key in ("step", "round", "_step", "_timestamp")] == [
        "user/step",
        "user/round",
        "user/_step",
        "user/_timestamp",
    ]
    assert [names.config(key) for key in ("lr", "step", "_wandb", "trackhub")] == [
        "lr",
        "step",
        "user/_wandb",
        "user/trackhub",
    ]


def test_two_keys_never_become_one() -> None:
    """A key that looks respelt already is respelt again."""
    names = Names("step", "round")
    keys = ["step", "user/step", "user/user/step", "user/loss", "loss", "user/_x", "_x"]
    assert len({names.row(key) for key in keys}) == len(keys)
    assert names.row("user/loss") == "user/loss"


@pytest.mark.parametrize("key", ["../../etc/passwd", "a/b", "..", "\n", "ü" * 300, "x" * 300, "C:\\x", ".hidden"])
def test_file_stem_is_one_short_path_component(key: str) -> None:
    """No key leads out of the folder of its run."""
    stem = file_stem(key)
    assert "/" not in stem
    assert "\\" not in stem
    assert not stem.startswith(".")
    assert 0 < len(stem.encode()) < 100


def test_file_stems_of_keys_that_look_alike_differ() -> None:
    """What is replaced in a file's name is still told apart."""
    keys = ["a/b", "a_b", "a:b", "a b"]
    assert len({file_stem(key) for key in keys}) == len(keys)


def test_artifacts_of_two_sites_never_share_a_name() -> None:
    """Artifact names are shared by a whole project, so that a name holds the site, without a way to mix them up."""
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
    """A longer tag ends in a digest of the whole, so that two stay two."""
    assert (tag_text("stage", "pilot"), tag_text("pilot", "")) == ("stage:pilot", "pilot")
    long = [tag_text("k", "v" * 100), tag_text("k", "v" * 101)]
    assert all(len(text) == MAX_TAG_CHARS for text in long)
    assert long[0] != long[1]


def test_config_values_are_plain_json() -> None:
    """What JSON cannot say is spelt out, at any depth, and an empty dict does not vanish."""
    value = {"a": [float("nan"), float("-inf")], "b": {"c": float("inf")}, "d": {}, 1: 2}
    assert config_value(value) == {"a": ["NaN", "-Infinity"], "b": {"c": "Infinity"}, "d": "{}", "1": 2}
