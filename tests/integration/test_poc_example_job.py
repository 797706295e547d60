# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 job in FLARE's POC and in a provisioned federation, as a user runs it and looks at what it left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.printed_commands import charts_of
from tests.integration.harness import flare_environment, processes_with, read_tensorboard, without_own_programs
from tests.integration.poc import ADMIN, SITES, Poc, poc, wandb

__all__ = ["poc", "wandb"]  # the fixtures that the tests below ask for

pytestmark = pytest.mark.long

JOB = Path(__file__).parents[2] / "jobs" / "cifar10_fedavg" / "job.py"
SMALL = ("--dataset", "synthetic", "--samples_per_site", "160", "--num_rounds", "2")
STEPS = 2 * 5  # 160 images in batches of 32, in two rounds


def run(folder: Path, command: str, **variables: str) -> str:
    """Run a command line in a folder, in a shell without an activated environment, and return what it printed."""
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={
            **without_own_programs(flare_environment()),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HOME": str(folder),
            **variables,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_job(folder: Path, *flags: str, **variables: str) -> str:
    """Run job.py with these flags, and return its screen."""
    screen = run(folder, shlex.join([sys.executable, str(JOB), *SMALL, *flags]), **variables)
    assert "FINISHED:COMPLETED" in screen
    return screen


def commands(screen: str) -> list[str]:
    """Return the command lines on the last screen, in order."""
    return re.findall(r"^  (\S*(?:nvflare|trackhub) .*)$", screen[screen.index("FINISHED:COMPLETED") :], re.MULTILINE)


def train_steps(opening: str, site: str) -> list[int | None]:
    """Return the steps of a site's training loss, as TensorBoard's own reader finds them where a command opens it."""
    found = re.findall(r"^  tensorboard: cd (\S+) && \S*tensorboard --logdir (\S+)$", opening, re.MULTILINE)
    (run_folder,) = [path for there, logdir in found for path in Path(there, logdir).glob(f"*/{site}")]
    return [point.step for point in read_tensorboard(run_folder) if point.key == "train/loss"]


def check_page(folder: Path, command: str, **variables: str) -> None:
    """Run a command that makes a page. It shows all sites."""
    run(folder, command, **variables)
    chart = charts_of(folder / "report.html", "train/loss")[0]
    assert {line["site"] for line in chart["lines"]} == set(SITES)


def test_results_of_a_federation_are_fetched_and_opened_as_the_last_screen_says(poc: Poc, tmp_path: Path) -> None:
    flags = ["--env", "prod", "--startup_kit", str(poc.kits / ADMIN), "--streamed_to_clients"]

    screen = run_job(tmp_path, *flags, "--backend", "tensorboard", "--backend", "jsonl")

    download, status, report, there, together = commands(screen)
    run(tmp_path, download)
    opening = run(tmp_path, status)
    for site in SITES:
        assert train_steps(opening, site) == list(range(STEPS))
    document = json.loads(run(tmp_path, f"{status} --json"))
    (journal,) = document["journals"]
    assert (journal["status"], journal["balanced"], journal["undelivered"]) == ("finished", True, 0)
    assert set(journal["lanes"]) == {"tensorboard", "jsonl"}
    check_page(tmp_path, report)
    # What a client's own receiver stored is at the client, where somebody has activated the environment.
    copies = tmp_path / "copies"
    for site in SITES:
        opening = run(tmp_path, activated(there).replace("WORKSPACE", str(poc.kits / site)))
        assert train_steps(opening, site) == list(range(STEPS))
        (folder,) = poc.kits.glob(f"{site}/{document['journals'][0]['job']}")
        shutil.copytree(folder, copies / site)
    check_page(tmp_path, activated(together).replace("FOLDER", str(copies)))


def activated(command: str) -> str:
    """Return a command line for a shell in which the environment of these tests is activated."""
    return f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH {command}"


@pytest.fixture
def own_poc(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which FLARE makes a POC in a scratch folder. What still runs of it is killed at the end."""
    mark = f"NVFLARE_POC_WORKSPACE={tmp_path / 'poc'}"
    yield dict([mark.split("=", 1)])
    for pid in processes_with(f"{mark}\0".encode()):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)


def test_a_poc_that_the_job_starts_goes_on_so_that_its_results_can_be_fetched(
    own_poc: dict[str, str], tmp_path: Path
) -> None:
    screen = run_job(tmp_path, "--env", "poc", "--launch_external_process", "--streamed_to_clients", **own_poc)

    download, status, report, status_of_clients, report_of_clients = commands(screen)
    run(tmp_path, download, **own_poc)
    check_page(tmp_path, report, **own_poc)
    at_server, at_clients = (run(tmp_path, line, **own_poc) for line in (status, status_of_clients))
    for site in SITES:
        assert train_steps(at_server, site) == list(range(STEPS))
        assert train_steps(at_clients, site) == list(range(STEPS))
    check_page(tmp_path, report_of_clients, **own_poc)
    run(tmp_path, activated("nvflare poc stop"), **own_poc)
