# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 job as a user runs it: the command, its last screen, its exit status, and what lies in its folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.harness import flare_environment

JOB_DIR = Path(__file__).parents[2] / "jobs" / "cifar10_fedavg"
SITES = ("site-1", "site-2")
ROUNDS, STEPS_PER_ROUND = 2, 5  # 160 images in batches of 32
SMALL = ("--dataset", "synthetic", "--samples_per_site", "160", "--num_rounds", str(ROUNDS))
METRICS = {"train/loss", "train/epoch_loss", "train/accuracy", "val/loss", "val/accuracy"}


@dataclass
class Finished:
    """A job that has ended."""

    status: int
    output: str
    workspace: Path

    @property
    def result(self) -> Path:
        """FLARE's folder of the job."""
        return self.workspace / "cifar10_fedavg"


def start_job(folder: Path, *argv: str, job_dir: Path = JOB_DIR) -> subprocess.Popen[str]:
    """Start job.py in a session of its own, in an empty folder."""
    return subprocess.Popen(
        [sys.executable, str(job_dir / "job.py"), "--workspace", str(folder / "workspace"), *SMALL, *argv],
        cwd=folder,
        env=flare_environment({"XDG_CACHE_HOME": str(folder / "cache")}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_job(folder: Path, *argv: str, job_dir: Path = JOB_DIR) -> Finished:
    """Run job.py to its end."""
    with start_job(folder, *argv, job_dir=job_dir) as process:
        output, _ = process.communicate()
    return Finished(process.returncode, output, folder / "workspace")


def records(folder: Path, site: str) -> list[dict[str, Any]]:
    """Return the records that the backend jsonl keeps of a site in a receiver's folder, in order."""
    (path,) = folder.glob(f"simulate_job/jsonl/*/{site}.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] != "end"]


def by_stream(logged: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the records of each stream in order, without their position in the run and the file names made of it."""
    streams: dict[str, list[dict[str, Any]]] = {}
    for line in logged:
        own = {key: value for key, value in line.items() if key not in ("position", "file")}
        streams.setdefault(line["stream"], []).append(own)
    return streams


def points(logged: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of each metric, in the order of the log calls."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in logged:
        if record["kind"] == "metrics":
            for key, value in record["values"].items():
                found.setdefault(key, []).append((record["step"], value))
    return found


def bytes_of(folder: Path) -> Mapping[Path, bytes]:
    """Return the content of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def both_sides(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two backends on the server, one at the clients, trainers in processes of their own."""
    return run_job(
        tmp_path_factory.mktemp("both"),
        *("--backend", "jsonl", "--backend", "tensorboard"),
        *("--streamed-to-clients", "--client-backend", "jsonl"),
        *("--launch-external-process", "--partition", "iid", "--strict"),
    )


def test_a_job_whose_records_all_arrived_ends_with_status_0(both_sides: Finished) -> None:
    assert both_sides.status == 0, both_sides.output


def test_the_last_screen_says_for_each_site_receiver_and_backend_how_many_of_the_logged_records_are_confirmed(
    both_sides: Finished,
) -> None:
    rows = re.findall(r"^  (site-\d) +(\S+) +(\w+) +([\d,]+) of ([\d,]+)$", both_sides.output, re.MULTILINE)

    assert {(site, receiver, backend) for site, receiver, backend, _, _ in rows} == {
        *((site, "server", backend) for site in SITES for backend in ("jsonl", "tensorboard")),
        *((site, site, "jsonl") for site in SITES),
    }
    for site, _, _, confirmed, logged in rows:
        assert int(confirmed) == int(logged) == len(records(both_sides.result / "server", site))


def test_the_last_screen_has_each_sites_last_metrics_and_the_final_models_accuracy(both_sides: Finished) -> None:
    header = next(
        line for line in both_sides.output.splitlines() if line.strip().startswith("site  ") and "val/" in line
    )
    last = {key: values[-1][1] for key, values in points(records(both_sides.result / "server", "site-2")).items()}
    row = next(line for line in both_sides.output.splitlines() if re.match(r"  site-2  \d", line)).split()

    assert set(header.split()) == {"site", *METRICS}
    assert row[1:] == [f"{last[key]:.4f}" for key in header.split()[1:]]
    assert re.search(r"^Final global model: test accuracy \d+\.\d\d%", both_sides.output, re.MULTILINE)


def test_without_a_terminal_plain_lines_stand_between_those_of_flare(both_sides: Finished) -> None:
    shown = re.findall(r"^\d\d:\d\d:\d\d cifar10_fedavg: (.*)$", both_sides.output, re.MULTILINE)

    assert re.match(
        rf"finished; round {ROUNDS - 1}; .*loss: .*site-2 .*; tensorboard: \d+ confirmed, 0 pending", shown[-1]
    )
    assert " - INFO - " in both_sides.output


def test_the_command_that_opens_the_results_names_the_folder_with_every_run(both_sides: Finished) -> None:
    command = re.search(r"^  tensorboard: cd (\S+) && \S*tensorboard --logdir (\S+)$", both_sides.output, re.MULTILINE)

    assert command is not None
    assert {path.parent.name for path in Path(command[1], command[2]).rglob("events.*")} == {
        *SITES,
        "federation",
        "server",
    }


@pytest.mark.parametrize("site", SITES)
def test_the_client_logs_training_by_step_and_epoch_and_validation_by_round(both_sides: Finished, site: str) -> None:
    logged = points(records(both_sides.result / "server", site))

    assert set(logged) == METRICS
    assert [step for step, _ in logged["train/loss"]] == list(range(ROUNDS * STEPS_PER_ROUND))
    for key in METRICS - {"train/loss"}:
        assert [step for step, _ in logged[key]] == list(range(ROUNDS))


def test_both_sites_validate_the_same_global_model(both_sides: Finished) -> None:
    first, second = (points(records(both_sides.result / "server", site)) for site in SITES)

    assert first["val/accuracy"] == second["val/accuracy"]
    assert first["train/loss"] != second["train/loss"]


def test_the_server_evaluates_the_last_model_and_logs_it_as_a_run_of_its_own(both_sides: Finished) -> None:
    logged = points(records(both_sides.result / "server", "server"))

    assert {key: [step for step, _ in values] for key, values in logged.items()} == {
        "val/loss": [ROUNDS],
        "val/accuracy": [ROUNDS],
    }
    printed = re.search(r"^Final global model: test accuracy (\S+)%", both_sides.output, re.MULTILINE)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(100 * logged["val/accuracy"][0][1], abs=0.01)


def test_the_federation_run_has_the_mean_over_the_sites_of_each_key_of_rounds(both_sides: Finished) -> None:
    found = points(records(both_sides.result / "server", "federation"))

    for key in METRICS - {"train/loss"}:
        by_site = [dict(points(records(both_sides.result / "server", site))[key]) for site in SITES]
        for name, numpy_name in (("mean", "mean"), ("std", "std"), ("min", "min"), ("max", "max")):
            for step, value in found[f"{key}/{name}"]:
                expected = getattr(np, numpy_name)([values[step] for values in by_site])
                assert value == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert not [key for key in found if key.startswith("train/loss/")]
    assert found["fl/best/accuracy"][-1][1] == max(value for _, value in found["aggregated/accuracy"])


@pytest.mark.parametrize("site", SITES)
def test_the_run_says_what_it_was_trained_on(both_sides: Finished, site: str) -> None:
    logged = records(both_sides.result / "server", site)
    params, tags = (
        next(record["values"] for record in logged if record["kind"] == kind and "dataset" in record["values"])
        for kind in ("params", "tags")
    )

    assert (params["dataset"], params["train_images"], params["partition"]) == ("synthetic", 160, "iid")
    assert tags["dataset"] == "synthetic"
    assert [record["key"] for record in logged if record["kind"] == "text"] == ["note"]
    assert [record["step"] for record in logged if record["kind"] == "image"] == list(range(ROUNDS))


@pytest.mark.parametrize("site", SITES)
def test_the_client_keeps_what_the_server_keeps(both_sides: Finished, site: str) -> None:
    """Each stream in its order. Images are in a stream of their own, and come in between as they arrive."""
    at_client = by_stream(records(both_sides.result / site, site))
    at_server = by_stream(records(both_sides.result / "server", site))

    assert at_client == at_server


@pytest.mark.parametrize("site", SITES)
def test_tensorboard_has_the_points_of_jsonl(both_sides: Finished, site: str) -> None:
    (folder,) = (both_sides.result / "server").glob(f"simulate_job/tensorboard/*/{site}")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()

    for key, expected in points(records(both_sides.result / "server", site)).items():
        assert [(event.step, event.value) for event in events.Scalars(key)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in expected
        ]


@pytest.mark.long
def test_with_client_side_only_the_server_learns_no_metric(tmp_path: Path) -> None:
    done = run_job(tmp_path, "--backend", "jsonl", "--streamed_to_clients", "--no-streamed_to_server", "--strict")

    assert done.status == 0, done.output
    for site in SITES:
        assert set(points(records(done.result / site, site))) == METRICS
    # client.py, which the job brings to the server too, names the metrics; everything else may not.
    kept = {
        path: content
        for path, content in bytes_of(done.result / "server").items()
        if path.suffix not in (".py", ".pyc")
    }
    assert not [path for path, content in kept.items() if b"val/accuracy" in content or b"train/loss" in content]
    assert not [path for path, content in kept.items() if b"validation metric" in content]


@pytest.mark.long
def test_without_tracking_the_same_script_trains(tmp_path: Path) -> None:
    done = run_job(tmp_path, "--backend", "none", "--strict")

    assert done.status == 0, done.output
    assert "Final global model: test accuracy" in done.output
    assert "Delivered" not in done.output
    assert not list(done.result.rglob("trackhub"))


@pytest.mark.long
def test_a_job_whose_training_fails_ends_with_another_status_and_delivers_what_was_logged(tmp_path: Path) -> None:
    broken = tmp_path / "job"
    shutil.copytree(JOB_DIR, broken, ignore=shutil.ignore_patterns("__pycache__"))
    source = (broken / "client.py").read_text()
    line = "            trained = site.train(received.current_round)\n"
    assert source.count(line) == 1
    (broken / "client.py").write_text(source.replace(line, line + "            raise RuntimeError('no more')\n"))

    done = run_job(tmp_path, "--backend", "jsonl", job_dir=broken)

    assert done.status == 1, done.output
    assert "The job failed: " in done.output
    for site in SITES:
        logged = points(records(done.result / "server", site))
        assert [step for step, _ in logged["train/loss"]] == list(range(STEPS_PER_ROUND))


def test_ctrl_c_delivers_what_was_logged_and_says_once_how_to_look_at_it(tmp_path: Path) -> None:
    with start_job(tmp_path, "--backend", "jsonl", "--num_rounds", "1000") as process:
        assert process.stdout is not None
        try:
            assert any("look at this job in jsonl, while it runs" in line for line in process.stdout)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
            output = process.stdout.read()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise

    assert process.returncode == 130, output
    last_screen = output[output.index("Interrupted. ") :]
    counts = re.findall(r"^  \S+ +server +jsonl +([\d,]+) of ([\d,]+)$", last_screen, re.MULTILINE)
    assert counts
    assert all(confirmed == logged for confirmed, logged in counts)
    assert last_screen.count("Open the results\n") == 1


def test_the_client_alone_delivers_by_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(JOB_DIR / "standalone.py"), "--backend", "jsonl", "--torch_threads", "1"]

    done = subprocess.run([*command, *SMALL], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("runs/*/jsonl/*/site-1.jsonl")
    logged = points(
        [record for record in map(json.loads, path.read_text().splitlines()) if record["kind"] == "metrics"]
    )
    assert [step for step, _ in logged["train/loss"]] == list(range(ROUNDS * STEPS_PER_ROUND))
    assert [step for step, _ in logged["val/accuracy"]] == list(range(ROUNDS + 1))
    assert (done.stdout + done.stderr).count(str(path)) == 2  # at its start and at its end


def test_the_standalone_script_says_what_is_wrong_with_a_backend(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(JOB_DIR / "standalone.py"), "--backend", "tensorbord"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode != 0
    assert done.stderr.startswith("standalone.py: error: ")
    assert "tensorboard" in done.stderr
    assert list(tmp_path.iterdir()) == []
