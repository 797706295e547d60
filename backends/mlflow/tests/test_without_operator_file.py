# SPDX-License-Identifier: Apache-2.0
"""What a job may say of MLflow at a provisioned site whose operator wrote no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trackhub.errors import ConfigError
from trackhub.operator_file import BackendRules, OperatorFile
from trackhub.registry import permitted_options

SERVER = "https://mlflow.hospital.org"


@pytest.mark.parametrize(
    "options",
    [{}, {"experiment_name": "mine"}, {"tracking_uri": "sqlite:///mine.db", "experiment_name": "mine"}],
    ids=str,
)
def test_a_store_in_the_job_s_folder_is_its_own(tmp_path: Path, options: dict[str, Any]) -> None:
    assert permitted_options("mlflow", options, OperatorFile(), tmp_path) == options


@pytest.mark.parametrize(
    "options",
    [
        {"tracking_uri": "https://evil.example"},
        {"tracking_uri": SERVER},
        {"tracking_uri": "sqlite:////var/lib/mlflow.db"},
        {"tracking_uri": "sqlite:///../mlflow.db"},
        {"note": "${secret:MLFLOW_TRACKING_TOKEN}"},
        {"run_tags": {"a": "${secret:MLFLOW_TRACKING_TOKEN}"}},
        {"tracking_uri": "https://me:${secret:MLFLOW_TRACKING_TOKEN}@mlflow.hospital.org"},
    ],
    ids=str,
)
def test_no_other_store_and_no_secret_is_reached(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        permitted_options("mlflow", options, OperatorFile(), tmp_path)


def test_the_environment_names_the_server_but_no_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    named = {"tracking_uri": SERVER, "experiment_name": "of-another-team"}

    assert permitted_options("mlflow", {"tracking_uri": SERVER}, OperatorFile(), tmp_path) == {"tracking_uri": SERVER}
    with pytest.raises(ConfigError, match="'of-another-team' may belong to others who use the same store"):
        permitted_options("mlflow", named, OperatorFile(), tmp_path)
    operator = OperatorFile(backends={"mlflow": BackendRules(values={"experiment_name": ("of-another-*",)})})
    assert permitted_options("mlflow", named, operator, tmp_path) == named
