# SPDX-License-Identifier: Apache-2.0
"""What a job may say of W&B at a provisioned site whose operator wrote no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trackhub.errors import ConfigError
from trackhub.operator_file import OperatorFile
from trackhub.registry import permitted_options


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"project": "cifar10", "entity": "team", "mode": "online", "tags": ["a"]},
        {"base_url": "https://api.wandb.ai"},
        {"api_key": "${secret:WANDB_API_KEY}"},
    ],
    ids=str,
)
def test_the_tutorial_s_job_runs_without_an_operator_s_file(tmp_path: Path, options: dict[str, Any]) -> None:
    assert permitted_options("wandb", options, OperatorFile(), tmp_path) == options


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "https://evil.example"},
        {"base_url": "http://api.wandb.ai"},
        {"api_key": "${secret:MLFLOW_TRACKING_TOKEN}"},
        {"settings": {"https_proxy": "http://evil.example"}},
        {"settings": {"x_extra_http_headers": {"a": "b"}}},
        {"notes": "${secret:WANDB_API_KEY}"},
        {"settings": {"x": "${secret:WANDB_API_KEY}"}},
    ],
    ids=str,
)
def test_the_key_of_the_site_goes_nowhere_else(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        permitted_options("wandb", options, OperatorFile(), tmp_path)


def test_the_environment_names_the_server_of_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.hospital.org")

    for options in ({}, {"base_url": "https://wandb.hospital.org"}):
        assert permitted_options("wandb", options, OperatorFile(), tmp_path) == options
    with pytest.raises(
        ConfigError, match=r"is not a host that the operator named; named: https://wandb\.hospital\.org"
    ):
        permitted_options("wandb", {"base_url": "https://api.wandb.ai"}, OperatorFile(), tmp_path)
