# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import msgspec
import pytest
from trackhub_mlflow import MLflowBackend, MLflowOptions

from trackhub.registry import option_marks
from trackhub.spi import BackendContext, JobInfo, OptionMark, Side


def test_the_backend_is_found_by_its_name() -> None:
    (found,) = [point for point in entry_points(group="trackhub.backends") if point.name == "mlflow"]

    assert found.load() is MLflowBackend


def test_making_a_backend_loads_neither_mlflow_nor_requests(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
from trackhub.spi import Side, BackendContext, JobInfo
from trackhub_mlflow import MLflowBackend, MLflowOptions
for uri in ("", "http://127.0.0.1:9"):
    context = BackendContext(pathlib.Path({str(tmp_path)!r}), JobInfo("job"), Side.SERVER)
    MLflowBackend(MLflowOptions(tracking_uri=uri), context)
sys.exit(bool({{"mlflow", "requests", "sqlalchemy", "PIL"}} & set(sys.modules)))
"""

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("file:///tmp/mlruns", "file store, which MLflow 3 refuses"),
        ("mlruns", "plain path"),
        ("databricks", "plain path"),
        ("databricks://profile", "Databricks"),
        ("postgresql://db/mlflow", "mlflow server --backend-store-uri"),
        ("ftp://host", "'ftp'"),
        ("http://", "no host"),
        ("http://host:port", "not a URI"),
        ("sqlite://", "no file"),
        ("sqlite:///:memory:", "no file"),
    ],
)
def test_a_uri_that_cannot_work_is_refused_with_what_to_give_instead(uri: str, said: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=said) as caught:
        msgspec.convert({"tracking_uri": uri}, MLflowOptions)

    assert "sqlite:///FILE" in str(caught.value)


def test_a_login_in_the_uri_is_never_shown(tmp_path: Path) -> None:
    options = MLflowOptions(tracking_uri="https://me:hidden@host/mlflow/")
    backend = MLflowBackend(options, BackendContext(tmp_path, JobInfo("job"), Side.SERVER))

    with pytest.raises(ValueError, match="ftp") as caught:
        MLflowOptions(tracking_uri="ftp://me:hidden@host")
    assert "hidden" not in f"{options!r} {caught.value} {vars(backend)}".replace("_login", "")


def test_the_core_knows_which_option_names_a_host_or_a_file() -> None:
    marks = option_marks(MLflowBackend)

    assert {name: found for name, found in marks.items() if found} == {
        "tracking_uri": {OptionMark.HOST, OptionMark.PATH},
        "experiment_name": {OptionMark.SHARED},
    }


def test_a_relative_store_lies_in_the_run_folder(tmp_path: Path) -> None:
    backend = MLflowBackend(
        MLflowOptions(tracking_uri="sqlite:///shared/all.db"),
        BackendContext(tmp_path / "mlflow", JobInfo("job"), Side.CLIENT),
    )

    assert backend._file == tmp_path / "shared" / "all.db"
    absolute = MLflowOptions(tracking_uri=f"sqlite:///{tmp_path}/x.db")
    assert MLflowBackend(absolute, BackendContext(tmp_path, JobInfo("job"), Side.CLIENT))._file == tmp_path / "x.db"
