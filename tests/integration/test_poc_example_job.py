# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 job in FLARE's POC and in a provisioned federation, as a user runs it and looks at what it left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.harness import flare_environment, processes_with, read_tensorboard
from tests.integration.poc import ADMIN, SITES, Poc, poc, wandb

__all__ = ["poc", "wandb"]  # the fixtures that the tests below ask for

pytestmark = pytest.mark.long

JOB = Path(__file__).parents[2] / "jobs" / "cifar10_fedavg" / "job.py"
SMALL = ("--dataset", "synthetic", "--samples_per_site", "160", "--num_rounds", "2")
STEPS = 2 * 5  # 160 images in batches of 32, in two rounds


def run(folder: Path, command: list[str], **variables: str) -> str:
    """Run a command in a folder, and return what it printed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**flare_environment(), "XDG_CACHE_HOME": str(folder / "cache"), "HOME": str(folder), **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def commands(screen: str) -> dict[str, list[str]]:
    """Return the commands on the last screen, by their first two words."""
    lines = re.findall(r"^  ((?:nvflare|trackhub) .*)$", screen, re.MULTILINE)
    found: dict[str, list[str]] = {}
    for words in map(shlex.split, lines):
        found.setdefault(" ".join([*words[:2], *(["WORKSPACE"] if "WORKSPACE" in words[-1] else [])]), words)
    return found


def train_steps(opening: str, site: str) -> list[int | None]:
    """Return the steps of a site's training loss, as TensorBoard's own reader finds them where the command opens it."""
    command = re.search(r"^  tensorboard: cd (\S+) && \S*tensorboard --logdir (\S+)$", opening, re.MULTILINE)
    assert command is not None, opening
    (run_folder,) = Path(command[1], command[2]).glob(f"*/{site}")
    return [point.step for point in read_tensorboard(run_folder) if point.key == "train/loss"]


def test_results_of_a_federation_are_fetched_and_opened_as_the_last_screen_says(poc: Poc, tmp_path: Path) -> None:
    flags = ["--env", "prod", "--startup_kit", str(poc.kits / ADMIN), *SMALL, "--streamed_to_clients"]
    flags += ["--backend", "tensorboard", "--backend", "jsonl"]

    screen = run(tmp_path, [sys.executable, str(JOB), *flags])

    assert "FINISHED:COMPLETED" in screen
    said = commands(screen)
    run(tmp_path, said["nvflare job"])
    opening = run(tmp_path, said["trackhub status"])
    for site in SITES:
        assert train_steps(opening, site) == list(range(STEPS))
    document = json.loads(run(tmp_path, [*said["trackhub status"], "--json"]))
    (journal,) = document["journals"]
    assert (journal["status"], journal["balanced"], journal["undelivered"]) == ("finished", True, 0)
    assert set(journal["lanes"]) == {"tensorboard", "jsonl"}
    run(tmp_path, said["trackhub report"])
    assert "train/loss" in (tmp_path / "report.html").read_text()
    # What a client's own receiver stored is at the client.
    there = said["trackhub status WORKSPACE"]
    for site in SITES:
        opening = run(tmp_path, [word.replace("WORKSPACE", str(poc.kits / site)) for word in there])
        assert train_steps(opening, site) == list(range(STEPS))


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
    screen = run(tmp_path, [sys.executable, str(JOB), "--env", "poc", "--launch_external_process", *SMALL], **own_poc)

    assert "FINISHED:COMPLETED" in screen
    said = commands(screen)
    run(tmp_path, said["nvflare job"], **own_poc)
    assert train_steps(run(tmp_path, said["trackhub status"]), "site-1") == list(range(STEPS))
    run(tmp_path, ["nvflare", "poc", "stop"], **own_poc)
