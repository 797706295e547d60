# SPDX-License-Identifier: Apache-2.0
"""The configuration says the same from flags, TOML and mappings, and its errors name the place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trackhub.config import TrackingConfig, parse_option_flags
from trackhub.errors import ConfigError
from trackhub.limits import Limits


def test_option_flags_become_a_mapping_by_backend() -> None:
    flags = ["wandb.project=cifar=10", 'wandb.tags=["a", "b"]', "mlflow.name=[draft]", "mlflow.empty="]

    assert parse_option_flags(flags) == {
        "wandb": {"project": "cifar=10", "tags": ["a", "b"]},
        "mlflow": {"name": "[draft]", "empty": ""},
    }


@pytest.mark.parametrize("flag", ["", "wandb", "wandb=5", "wandb.=5", ".project=5", "wandb.project"])
def test_an_option_flag_of_another_form_is_an_error_that_shows_the_form(flag: str) -> None:
    with pytest.raises(ConfigError, match=r"expected NAME\.KEY=VALUE"):
        parse_option_flags([flag])


def test_an_option_given_twice_must_agree() -> None:
    assert parse_option_flags(["a.b=1", "a.b=1"]) == {"a": {"b": "1"}}
    with pytest.raises(ConfigError, match=r"a\.b: given twice"):
        parse_option_flags(["a.b=1", "a.b=2"])


def test_an_error_about_a_flag_does_not_show_its_value() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_option_flags(["token=hunter2"])

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"deadline": 5}, r"limits\.deadline: unknown limit; expected one of batch_records, "),
        ({"deadline_s": "soon"}, r"limits\.deadline_s: expected `float`, got `str`"),
        ({"deadline_s": -1}, r"limits\.deadline_s: -1.* is out of range; expected 0 to 86,400"),
        ({"deadline_s": "nan"}, r"limits\.deadline_s: nan is out of range"),
        ({"batch_records": 0}, r"limits\.batch_records: 0 is out of range"),
        ({"batch_records": 1.5}, r"limits\.batch_records: expected `int`, got `float`"),
        ({"durability": "some"}, r"limits\.durability: 'some' is not one of normal, full"),
        ({"keepalive_s": 5}, r"limits\.silence_s: 7\.0 must be at least twice limits\.keepalive_s"),
    ],
)
def test_a_wrong_limit_is_an_error_that_names_it(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Limits.from_mapping(values)


def test_limits_made_in_code_are_checked_like_those_from_a_file() -> None:
    wrong: Any = True

    with pytest.raises(ConfigError, match=r"limits\.poll_s: 99 is out of range"):
        Limits(poll_s=99)
    with pytest.raises(ConfigError, match=r"limits\.batch_bytes: expected a whole number"):
        Limits(batch_bytes=wrong)


def test_the_environment_gives_limits_that_are_not_given_otherwise() -> None:
    environ = {"TRACKHUB_SITES_S": "3", "TRACKHUB_DEADLINE_S": "4", "TRACKHUB_SPOOL": "unrelated"}

    limits = Limits.from_mapping({"deadline_s": 5}, environ=environ)

    assert (limits.sites_s, limits.deadline_s, limits.barrier_s) == (3.0, 5.0, 10.0)


def test_limits_of_the_environment_that_fit_each_other_are_checked_together() -> None:
    limits = Limits.from_mapping({}, environ={"TRACKHUB_KEEPALIVE_S": "0.2", "TRACKHUB_SILENCE_S": "1"})

    assert (limits.keepalive_s, limits.silence_s) == (0.2, 1.0)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"TRACKHUB_SITES_S": "soon", "TRACKHUB_DEADLINE_S": "4"}, "the environment variable TRACKHUB_SITES_S: "),
        ({"TRACKHUB_SILENCE_S": "1"}, "the environment variable TRACKHUB_SILENCE_S: "),
        (
            {"TRACKHUB_SILENCE_S": "1", "TRACKHUB_KEEPALIVE_S": "0.6"},
            "the environment variable TRACKHUB_KEEPALIVE_S or TRACKHUB_SILENCE_S: ",
        ),
    ],
)
def test_a_wrong_limit_of_the_environment_is_named_with_its_variable(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        Limits.from_mapping({}, environ=environ)


def test_flags_toml_and_mapping_give_the_same_configuration(tmp_path: Path) -> None:
    file = tmp_path / "tracking.toml"
    file.write_text(
        'backends = ["tensorboard", "wandb"]\nsides = ["server", "client"]\n'
        '[options.wandb]\nproject = "p"\n[limits]\ndeadline_s = 60\n'
    )
    mapping = {
        "backends": ["tensorboard", "wandb"],
        "sides": ["server", "client"],
        "options": {"wandb": {"project": "p"}},
        "limits": {"deadline_s": 60},
    }

    from_flags = TrackingConfig.from_flags(
        ["tensorboard", "wandb"],
        options=["wandb.project=p"],
        streamed_to_clients=True,
        limits=Limits(deadline_s=60),
    )

    assert from_flags == TrackingConfig.from_mapping(mapping, environ={}) == TrackingConfig.from_toml(file, environ={})


def test_each_side_gets_its_backends_with_their_options() -> None:
    both = TrackingConfig.from_flags(
        ["mlflow"], client_backends=["jsonl"], options=["mlflow.a=1"], streamed_to_clients=True
    )
    clients_only = TrackingConfig.from_flags(["mlflow"], streamed_to_server=False, streamed_to_clients=True)

    assert (both.server, both.clients) == ({"mlflow": {"a": "1"}}, {"jsonl": {}})
    assert (clients_only.server, clients_only.clients) == (None, {"mlflow": {}})


def test_the_name_none_turns_tracking_off() -> None:
    config = TrackingConfig.from_flags(["none"], streamed_to_clients=True)

    assert (config.server, config.clients) == (None, None)
    with pytest.raises(ConfigError, match="cannot stand beside"):
        TrackingConfig.from_flags(["none", "jsonl"])


def test_neither_side_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match="--streamed_to_server or --streamed_to_clients"):
        TrackingConfig.from_flags(["jsonl"], streamed_to_server=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"backend": ["jsonl"]}, "backend: unknown key; expected one of backends, "),
        ({"backends": "jsonl"}, r"tracking\.backends: expected `array`, got `str`"),
        ({"backends": ["a", "a"]}, "backends: 'a' is given more than once"),
        ({"sides": ["edge"]}, r"tracking\.sides\[0\]"),
        ({"sides": []}, "no side to run them on"),
        ({"limits": 5}, "limits: expected a table"),
        ({"limits": {"sites_s": -1}}, r"limits\.sites_s: -1.* is out of range"),
        ({"client_backends": ["jsonl"]}, r"client_backends: \['jsonl'\] contradicts sides: \['server'\]"),
        ({"sides": ["client"], "aggregate": ["val/*"]}, r"aggregate: .* contradicts sides: \['client'\]"),
        ({"sides": ["client"], "log_model": "best"}, r"log_model: .* contradicts sides: \['client'\]"),
        (
            {"sides": ["client"], "client_backends": ["jsonl"], "options": {"tensorboard": {}}},
            "no backend 'tensorboard' in this job; it has: jsonl",
        ),
        ({"options": {"wandb": {}}}, r"options\.wandb: there is no backend 'wandb' in this job; it has: tensorboard"),
    ],
)
def test_a_wrong_configuration_is_an_error_with_the_path_to_it(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        TrackingConfig.from_mapping(values, environ={})


def test_errors_of_a_toml_file_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tracking.toml"

    with pytest.raises(ConfigError, match="cannot be read"):
        TrackingConfig.from_toml(file)
    file.write_text("backends = [")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        TrackingConfig.from_toml(file)
    file.write_text("[limits]\nsites_s = -1\n")
    with pytest.raises(ConfigError, match=r"tracking\.toml: limits\.sites_s"):
        TrackingConfig.from_toml(file, environ={})
