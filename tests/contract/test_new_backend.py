# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

from trackhub.cli.new_backend import CONTRACT, write_backend
from trackhub.errors import ConfigError
from trackhub.testing import KIT_VERSION
from trackhub.testing.checks.fixtures import QUICK_ENV

ROOT = Path(__file__).resolve().parents[2]


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("name", ["acme", "acme-cloud_2"])
def test_a_new_backend_is_a_distribution_with_both_entry_points(tmp_path: Path, name: str) -> None:
    write_backend(name, tmp_path / "new")

    project = tomllib.loads((tmp_path / "new" / "pyproject.toml").read_text())["project"]
    module = "trackhub_" + name.replace("-", "_")
    assert project["name"] == "flare-trackhub-" + name.replace("_", "-")
    assert project["entry-points"]["trackhub.backends"][name].startswith(f"{module}:")
    assert project["entry-points"]["trackhub.contracts"][name].startswith(f"{module}.contract:")


def test_a_new_backend_passes_the_contract_at_once(tmp_path: Path) -> None:
    write_backend("acme", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")

    path = os.pathsep.join([str(tmp_path / "src"), str(ROOT)])
    _run(sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", cwd=tmp_path, PYTHONPATH=path, **{QUICK_ENV: "1"})


def test_a_new_backend_states_the_version_of_the_contract_that_it_passes() -> None:
    assert CONTRACT == KIT_VERSION


@pytest.mark.parametrize("name", ["", "Acme", "a b", "../x", "1st", "trackhub", "none", "a" * 65, "acme-", "class!"])
def test_a_name_that_no_backend_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a backend's name"):
        write_backend(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")

    with pytest.raises(ConfigError, match="is not empty"):
        write_backend("acme", tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.long
def test_a_new_backend_is_installed_by_pip_and_used_by_name_in_the_cifar10_job(tmp_path: Path) -> None:
    """In a fresh environment, which only borrows the large packages (torch, nvflare) from this one."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # Appended to sys.path, so what pip installs goes first. This environment's own .pth files are not processed.
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    command = tmp_path / "venv" / "bin" / "trackhub"

    _run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", ROOT, cwd=tmp_path)
    _run(command, "new-backend", "acme", cwd=tmp_path)
    _run(python, "-m", "pip", "install", "-q", "--no-deps", tmp_path / "flare-trackhub-acme", cwd=tmp_path)

    listed = json.loads(_run(command, "backends", "--json", cwd=tmp_path))["backends"]
    assert next(backend["state"] for backend in listed if backend["name"] == "acme") == "ok"
    checked = json.loads(_run(command, "check", "acme", "--quick", "--json", cwd=tmp_path))
    assert checked["passed"], checked
    _run(
        python, ROOT / "jobs" / "cifar10_fedavg" / "job.py", "--backend", "acme", "--dataset", "synthetic",
        "--num_rounds", "2", "--samples_per_site", "64", "--workspace", tmp_path / "job", cwd=tmp_path,
    )  # fmt: skip

    points = [line for file in tmp_path.rglob("acme/*/site-*.jsonl") for line in _metrics(file)]
    assert {key for line in points for key in line["values"]} >= {"train/loss", "val/accuracy"}
    assert all(line["time"] and line["step"] is not None for line in points)


def _metrics(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[-1]["kind"] == "end"
    assert lines[-1]["status"] == "finished"
    return [line for line in lines if line["kind"] == "metrics"]
