# SPDX-License-Identifier: Apache-2.0
"""The built distributions are complete: a job runs from the wheels alone, in an environment without the checkout.

The job is the one that docs/getting-started.md shows, so this also tests that page.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("jsonl", "mlflow", "tensorboard", "wandb")
PROJECTS = (ROOT, *sorted(path.parent for path in ROOT.glob("backends/*/pyproject.toml")))
GUIDE = ROOT / "docs" / "getting-started.md"
STEPS = 3 * 20  # three rounds of twenty steps
PICTURES = {".png", ".jpg", ".svg", ".gif"}

pytestmark = pytest.mark.long
pytest.importorskip("build", reason="build is not installed; it is in the extra dist")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command that knows nothing of the checkout, and return what it printed on stdout."""
    own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # Files and no pipes: a process that the command leaves behind for a moment would hold a pipe open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env={**own, "PYTHONNOUSERSITE": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            timeout=280,
            check=False,
        )
        out.seek(0)
        err.seek(0)
        printed, errors = out.read(), err.read()
    assert done.returncode == 0, f"{command}\n{printed[-5000:]}\n{errors[-5000:]}"
    return printed


def borrow_packages(environment: Path) -> None:
    """Let an environment see the third-party packages of this one, and nothing of ours.

    A folder of links, named in a ``.pth`` file, has every entry but our own: their metadata and editable installs would
    lead back to the checkout. nvflare is copied, since FLARE refuses to put a linked file of its own into a job.
    """
    borrowed = environment / "borrowed"
    borrowed.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "trackhub" not in entry.name and entry.suffix != ".pth" and entry.name != "__pycache__":
            if entry.name == "nvflare":
                shutil.copytree(entry, borrowed / entry.name)
            else:
                (borrowed / entry.name).symlink_to(entry)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distributions, and the wheels that were built from them."""
    folder = tmp_path_factory.mktemp("dist")
    for project in PROJECTS:
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, project, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment that has the wheels installed."""
    environment = tmp_path_factory.mktemp("wheels") / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *dist.glob("*.whl"), cwd=dist)
    borrow_packages(environment)
    return python.parent


@pytest.fixture(scope="module")
def job(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the guide's job, with every backend."""
    folder = tmp_path_factory.mktemp("job")
    blocks = re.findall(r"<!-- file: (\S+) -->\n```text\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert [name for name, _ in blocks] == ["client.py", "job.py"]
    for name, source in blocks:
        named = source.replace('["tensorboard"]', repr(list(BACKENDS)))
        (folder / name).write_text(named, encoding="utf-8")
    run(installed / "python", "job.py", cwd=folder, WANDB_MODE="offline", XDG_CACHE_HOME=str(folder / "cache"))
    return folder / "runs" / "first-job" / "server" / "simulate_job"


def test_twine_and_check_wheel_contents_find_nothing_wrong_with_the_distributions(dist: Path) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    assert len(list(dist.iterdir())) == 2 * len(PROJECTS)

    run(scripts / "twine", "check", "--strict", *dist.iterdir(), cwd=dist)
    run(scripts / "check-wheel-contents", *dist.glob("*.whl"), cwd=dist)


def test_the_source_distributions_have_a_licence_and_neither_pictures_nor_the_benchmark(dist: Path) -> None:
    for path in dist.glob("*.tar.gz"):
        with tarfile.open(path) as archive:
            names = [Path(name) for name in archive.getnames()]
        assert Path(names[0].parts[0], "LICENSE") in names
        assert [name for name in names if name.suffix in PICTURES or "bench" in str(name)] == []


def test_every_module_is_imported_from_the_wheels_and_every_backend_is_found(installed: Path, tmp_path: Path) -> None:
    packages = ["trackhub", *(f"trackhub_{name}" for name in BACKENDS if name != "jsonl")]
    script = f"import {', '.join(packages)}; print(*[m.__file__ for m in ({', '.join(packages)})], sep='\\n')"

    files = run(installed / "python", "-c", script, cwd=tmp_path).splitlines()
    listed = json.loads(run(installed / "trackhub", "backends", "--json", cwd=tmp_path))["backends"]

    assert [file for file in files if not Path(file).is_relative_to(installed.parent)] == []
    assert {backend["name"]: backend["state"] for backend in listed} == dict.fromkeys(BACKENDS, "ok")


def test_a_job_that_runs_from_the_wheels_delivers_to_every_backend(installed: Path, job: Path) -> None:
    report = json.loads(run(installed / "trackhub", "status", "--json", job, cwd=job))

    (journal,) = report["journals"]
    for backend in BACKENDS:
        runs: dict[str, Any] = journal["lanes"][backend]
        assert set(runs) == {"site-1", "site-2", "federation"}
        assert all(run["confirmed"] and not run["pending"] and not run["rejected"] for run in runs.values())


@pytest.mark.parametrize("site", ["site-1", "site-2"])
def test_tensorboards_own_reader_finds_the_points_that_the_lines_of_json_have(job: Path, site: str) -> None:
    (lines,) = job.glob(f"jsonl/*/{site}.jsonl")
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    logged = [r["values"]["train/loss"] for r in records if r["kind"] == "metrics" and "train/loss" in r["values"]]
    (folder,) = job.glob(f"tensorboard/*/{site}")
    events = EventAccumulator(str(folder)).Reload()

    assert len(logged) == STEPS
    assert [point.value for point in events.Scalars("train/loss")] == pytest.approx(logged)


def test_the_report_page_is_made_from_the_wheels(installed: Path, job: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed; it is in the extra report")
    run(installed / "trackhub", "report", job, "-o", tmp_path / "report.html", cwd=tmp_path)

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "train/loss" in page
    assert "site-2" in page
