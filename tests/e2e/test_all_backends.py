# SPDX-License-Identifier: Apache-2.0
"""The same point set in every backend, on the server, at the clients, and both, paced and in a burst."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stores import BACKENDS, canonical, own_home, read_emulator, read_run, same_points, were_logged
from tests.e2e.test_cifar10_job import Finished, run_job
from tests.integration.harness import Job, JobResult, files_with
from tests.support.wandb_emulator import Emulator
from trackhub.job_and_run_info import JobInfo, Side
from trackhub.testing import Point, ReadBack

SITES = ("site-1", "site-2")
KEY_VARIABLE = "TRACKHUB_TEST_WANDB_KEY"
PLANTED_VALUE = 31337.424242
PACED, BURST = 60, 1500
PATIENT = {"deadline_s": 120, "sites_s": 120}  # how long a job's end takes on a busy machine is not the matter here

# Round 0 is paced, round 1 comes as fast as the script can. Validation has the round as its step, and comes before,
# between and after training steps that are higher.
TRAINER = """
import time
import numpy as np
from trackhub import Writer

# Put together at run time, so that the job's own files do not hold them.
PLANTED = "".join(reversed("cirtem_terces/detnalp"))
SECRET = float("".join(reversed("242424.73313")))
PACED, BURST = @@

writer = Writer()
writer.log_params({"lr": 0.1, "site": SITE})
writer.set_tags({"stage": "test"})
writer.log_text("note", "hello from " + SITE)


def log(values, step=None):
    fact(lambda: writer.log(values, step), values, step)


def train(n):
    log({"val/loss": 1 / (n + 3), "val/accuracy": n / 7}, n)
    first, count = (0, PACED) if n == 0 else (PACED, BURST)
    for i in range(count):
        log({"train/loss": 1 / (first + i + 3), "train/lr": 0.1}, first + i)
        if n == 0:
            time.sleep(0.01)
    log({"val/late": n / 3, PLANTED: SECRET}, n)
    for _ in range(3):
        log({"same": 5.0}, 4)
        log({"unstepped": n + 0.1})
    for odd in ("nan", "inf", "-inf", "1e308", "-0.0", "5e-324"):
        log({"odd/" + odd.replace("-", "minus "): float(odd)}, n)
    writer.log_image("grid", np.full((8, 8, 3), 0.25), step=n, caption="flat")
    writer.log_histogram("weights", [0.0, 0.5, 1.0], step=n, bins=4)
    writer.log_table("confusion", ["class", "count"], [["cat", n]], step=n)


rounds(train)
log({"last": 42.0})
""".replace("@@", f"{PACED}, {BURST}")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_home(tmp_path / "home", monkeypatch)


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    with Emulator() as server:
        monkeypatch.setenv(KEY_VARIABLE, server.state.api_key)
        yield server
    assert server.violations == []


def online(server: Emulator) -> dict[str, dict[str, Any]]:
    """Return all backends, with W&B online."""
    return {**BACKENDS, "wandb": {"mode": "online", "base_url": server.url, "api_key": f"${{secret:{KEY_VARIABLE}}}"}}


def run(folder: Path, *, external: bool = False, **tracking: Any) -> JobResult:
    result = Job(folder / "job", TRAINER, {"limits": PATIENT, **tracking}, external=external).run()
    assert result.rc == 0, result.log[-6000:]
    return result


def check_receiver(result: JobResult, receiver: str, site: str, emulator: Emulator | None = None) -> None:
    """All backends of this receiver hold exactly what the site's trainer noted."""
    side = Side.SERVER if receiver == "server" else Side.CLIENT
    logged = read_run("jsonl", result.run_dir(receiver), result.job, site, side)
    facts = result.facts(site)
    assert len(facts) == 2 * (PACED + BURST) + 2 * (2 + 2 + 2 * 3 + 6) + 1
    were_logged(facts, logged.points)
    for backend in BACKENDS:
        if backend == "wandb" and emulator is not None:
            found = read_emulator(emulator, result.job, site, side)
            same_points(found.points, canonical(backend, logged.points, online=True))
        else:
            found = read_run(backend, result.run_dir(receiver), result.job, site, side)
            same_points(found.points, canonical(backend, logged.points))
        _check_other_kinds(found, site)
    _check_modes(result.run_dir(receiver))
    report = result.report(receiver)
    assert report["balanced"]
    for lane in report["lanes"].values():
        assert lane[site]["state"] == "finished", lane
        assert lane[site]["confirmed"] == report["sites"][site]["journaled"], lane
        assert lane[site]["possible_duplicates"] == 0, lane


def _check_modes(run_folder: Path) -> None:
    """All is for its owner alone: itself, or by a folder that is, where W&B's service or a spool makes its files."""
    for backend in BACKENDS:
        for path in (run_folder / backend, *(run_folder / backend).rglob("*")):
            if backend != "wandb" or path.parent.name in (run_folder.name, "wandb"):
                assert path.stat().st_mode & 0o077 == 0, path
    assert (run_folder / "trackhub").stat().st_mode & 0o077 == 0


def _check_other_kinds(found: ReadBack, site: str) -> None:
    assert (found.params or {})["site"] == site
    assert (found.tags or {})["stage"] == "test"
    assert [text.text for text in found.texts or ()] == [f"hello from {site}"]
    for items in (found.images, found.histograms, found.tables):
        assert [item.step for item in items or ()] == [0, 1]


@pytest.mark.filterwarnings("ignore:trackhub. shutdown_timeout")
@pytest.mark.parametrize(
    "external", [False, pytest.param(True, marks=pytest.mark.long)], ids=["in_process", "external"]
)
def test_every_backend_on_the_server_and_at_the_clients_has_the_points_that_were_logged(
    tmp_path: Path, emulator: Emulator, external: bool
) -> None:
    """W&B is online on the server, offline at the clients."""
    result = run(tmp_path, external=external, server=online(emulator), clients=BACKENDS)

    for site in SITES:
        check_receiver(result, "server", site, emulator)
        check_receiver(result, site, site)
    fields = [held.fields for held in emulator.state.runs.values()]
    assert [one["groupName"] for one in fields] == [result.job.unique_name] * 3
    names = sorted(f"{result.job.name}/{site}" for site in (*SITES, "federation"))
    assert sorted(one["displayName"] for one in fields) == names


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:trackhub. shutdown_timeout")
@pytest.mark.parametrize("external", [False, True], ids=["in_process", "external"])
def test_with_all_backends_at_the_clients_only_the_server_has_no_key_and_no_value(
    tmp_path: Path, emulator: Emulator, external: bool
) -> None:
    """W&B is online at the clients."""
    result = run(tmp_path, external=external, clients=online(emulator))

    for site in SITES:
        check_receiver(result, site, site, emulator)
    needles = (
        b"planted/secret_metric",
        b"31337.42",
        struct.pack("<d", PLANTED_VALUE),
        struct.pack("<f", PLANTED_VALUE),
    )
    assert list(files_with(result.workspace / "server", *needles)) == []
    for folder in ("trackhub", *BACKENDS):
        assert not (result.run_dir("server") / folder).exists()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:trackhub. shutdown_timeout")
@pytest.mark.parametrize("external", [False, True], ids=["in_process", "external"])
def test_on_the_server_only_every_backend_has_the_points_that_were_logged(tmp_path: Path, external: bool) -> None:
    result = run(tmp_path, external=external, server=BACKENDS)

    for site in SITES:
        check_receiver(result, "server", site)
        assert not (result.run_dir(site) / "jsonl").exists()


SIDES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "server": ((), ("server",)),
    "client": (("--streamed_to_clients", "--no-streamed_to_server"), SITES),
    "both": (("--streamed_to_clients",), ("server", *SITES)),
}


def check_cifar(done: Finished, backends: Mapping[str, Any], receivers: tuple[str, ...]) -> None:
    """Each backend of each receiver has the points that jsonl has there."""
    assert done.status == 0, done.output
    job = JobInfo((done.result / ".trackhub" / "execution").read_text(), "cifar10_fedavg")
    for receiver in receivers:
        side = Side.SERVER if receiver == "server" else Side.CLIENT
        for site in SITES if receiver == "server" else (receiver,):
            run_dir = done.result / receiver / "simulate_job"
            logged = read_run("jsonl", run_dir, job, site, side).points
            # Validation of the second round comes after training steps that are higher than its step.
            assert [p.step for p in logged if p.key in ("train/loss", "val/loss")] == [0, *range(5), 1, *range(5, 10)]
            for backend in backends:
                same_points(read_run(backend, run_dir, job, site, side).points, canonical(backend, logged))


def check_nothing_at_the_server(done: Finished) -> None:
    """No file of the server has a metric's name, apart from the training script that the job brings along."""
    server = done.result / "server"
    named = files_with(server, b"train/loss", b"train/accuracy", b"val/loss", b"val/accuracy", b"val/predictions")
    assert [path for path in named if path.suffix not in (".py", ".pyc")] == []
    assert not any((server / "simulate_job" / name).exists() for name in (*BACKENDS, "trackhub"))


@pytest.mark.long
@pytest.mark.parametrize("side", ["client", "both"])
def test_the_cifar10_job_with_all_backends_has_the_same_points_in_each(tmp_path: Path, side: str) -> None:
    flags = [flag for name in BACKENDS for flag in ("--backend", name)]
    argv, receivers = SIDES[side]

    done = run_job(tmp_path, *flags, "--option", "wandb.mode=offline", *argv, "--strict")

    check_cifar(done, BACKENDS, receivers)
    for opening in ("tensorboard --logdir ", "mlflow ui --backend-store-uri ", "wandb sync wandb/offline-run-"):
        assert opening in done.output
    if side == "client":
        check_nothing_at_the_server(done)


@pytest.mark.long
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("backend", ["wandb", "mlflow"])
def test_the_cifar10_job_has_the_points_of_jsonl_in_one_more_backend(tmp_path: Path, backend: str, side: str) -> None:
    """Without a login W&B is offline by itself, and says so."""
    argv, receivers = SIDES[side]

    done = run_job(tmp_path, "--backend", "jsonl", "--backend", backend, *argv, "--strict")

    check_cifar(done, {backend: {}}, receivers)
    assert ("no login was found" in done.output) == (backend == "wandb")
    if side == "client":
        check_nothing_at_the_server(done)


def test_equal_points_are_told_apart_where_a_store_has_none() -> None:
    point = Point("same", 4, 5.0, 1.5)

    assert [p.time for p in canonical("mlflow", [point, point])] == [1.5, 1.501]
    assert canonical("jsonl", [point, point]) == [point, point]
