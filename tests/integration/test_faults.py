# SPDX-License-Identifier: Apache-2.0
"""FLARE jobs in which something goes wrong: with a backend, a trainer, a receiver or the configuration."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.harness import Job, JobResult, install_plugin, read_jsonl
from tests.unit.readers_and_bad_backends import small_disk

SITES = ("site-1", "site-2")

TRAINER = """
from trackhub import Writer

writer = Writer()


def train(n):
    for i in range(20):
        values = {"loss": n + i / 7}
        fact(lambda: writer.log(values, 20 * n + i), values, 20 * n + i)


rounds(train)
"""

FAULTY = """
import threading
from trackhub.spi import Backend, BackendRun, Capabilities, ConfigError, ConfirmedBy, PermanentError


class Run(BackendRun):
    def write(self, batch):
        pass

    def finish(self, status):
        pass


class NoOpen(Backend):
    spi = 1
    capabilities = Capabilities(confirmed_by=ConfirmedBy.WRITE)

    def open_run(self, info):
        raise PermanentError("this run cannot be opened")


class NoWriteRun(Run):
    def write(self, batch):
        raise ZeroDivisionError("a defect in the plugin")


class NoWrite(Backend):
    spi = 1
    capabilities = Capabilities(confirmed_by=ConfirmedBy.WRITE)

    def open_run(self, info):
        return NoWriteRun()


class HangsRun(Run):
    def write(self, batch):
        threading.Event().wait()


class Hangs(Backend):
    spi = 1
    capabilities = Capabilities(confirmed_by=ConfirmedBy.WRITE)

    def open_run(self, info):
        return HangsRun()


class Refuses(Backend):
    spi = 1
    capabilities = Capabilities(confirmed_by=ConfirmedBy.WRITE)

    def preflight(self):
        raise ConfigError("the project 'x' does not exist; create it first")

    def open_run(self, info):
        return Run()
"""


@pytest.fixture
def faulty(tmp_path: Path) -> dict[str, str]:
    """Environment in which backends that go wrong are installed."""
    points = {
        "no_open": "faulty:NoOpen",
        "no_write": "faulty:NoWrite",
        "hangs": "faulty:Hangs",
        "refuses": "faulty:Refuses",
    }
    return install_plugin(tmp_path / "plugins", "acme-faulty", points, {"faulty": FAULTY})


def _model(result: JobResult) -> Any:
    return np.load(result.run_dir("server") / "models" / "server.npy")


def _nothing_was_trained(result: JobResult) -> bool:
    return all(not facts.read_text() for facts in result.out.iterdir())


def _assert_all_in_jsonl(result: JobResult, receiver: str, site: str) -> None:
    facts = result.facts(site)
    points = result.jsonl_points(receiver, site)
    assert [(p.key, p.step, p.value) for p in points] == [(f.key, f.step, f.value) for f in facts]


@pytest.mark.filterwarnings("ignore:trackhub. backend")
def test_backends_that_raise_or_hang_change_neither_model_nor_exit_status(
    tmp_path: Path, faulty: dict[str, str]
) -> None:
    """The job is a FedJob without a recipe."""
    tracking = {"server": ["jsonl", "no_open", "no_write", "hangs"], "limits": {"deadline_s": 3}}

    result = Job(tmp_path / "job", TRAINER, tracking, way="fed_job", env=faulty).run()

    assert result.rc == 0, result.log[-6000:]
    assert _model(result).tolist() == [[2.0, 2.0], [2.0, 2.0]]
    report = result.report("server")
    assert report["balanced"]
    for site in SITES:
        _assert_all_in_jsonl(result, "server", site)
        assert report["lanes"]["jsonl"][site]["confirmed"] == 40
        for backend, error in (("no_open", "cannot be opened"), ("no_write", "a defect in the plugin"), ("hangs", "")):
            lane = report["lanes"][backend][site]
            assert (lane["confirmed"], lane["pending"] + sum(lane["rejected"].values())) == (0, 40)
            assert error in lane["last_error"]


@pytest.mark.filterwarnings("ignore:trackhub. backend")
def test_an_unknown_backend_stops_the_job_before_training_and_names_what_there_is(tmp_path: Path) -> None:
    result = Job(tmp_path / "job", TRAINER, {"server": ["acme_board"]}, way="json").run()

    assert result.rc != 0
    assert _nothing_was_trained(result)
    messages = [line for line in result.log.splitlines() if "FATAL_SYSTEM_ERROR" in line]
    assert len(messages) == 1
    assert "acme_board" in messages[0]
    assert "jsonl" in messages[0]
    last = "\n".join(result.log.splitlines()[-5:])
    assert "there is no backend 'acme_board' here" in last
    assert "Therefore the job was stopped before training" in last


@pytest.mark.filterwarnings("ignore:trackhub. backend")
def test_a_backend_that_refuses_at_a_client_stops_the_job_before_training(
    tmp_path: Path, faulty: dict[str, str]
) -> None:
    result = Job(tmp_path / "job", TRAINER, {"clients": ["refuses"]}, way="json", env=faulty).run()

    assert result.rc != 0
    assert _nothing_was_trained(result)
    assert "the project 'x' does not exist; create it first (this site will train nothing" in result.log


@pytest.mark.filterwarnings("ignore:trackhub. backend")
def test_a_script_whose_backend_refuses_ends_with_the_reason_before_flare_starts(
    tmp_path: Path, faulty: dict[str, str]
) -> None:
    result = Job(tmp_path / "job", TRAINER, {"clients": ["refuses"]}, env=faulty).run()

    assert result.rc == 1
    assert result.log.splitlines()[-1] == (
        "trackhub.errors.ConfigError: the job does not start, since the backend 'refuses' cannot be used: the project "
        "'x' does not exist; create it first"
    )
    assert not (result.workspace / "server").exists()


def test_without_a_folder_for_the_receiver_training_goes_on_and_records_wait(tmp_path: Path) -> None:
    nowhere = tmp_path / "a-file"
    nowhere.write_text("not a folder")
    tracking = {"server": ["jsonl"], "state_dir": str(nowhere / "x")}

    # Short, since the simulator puts a socket there, whose path must fit into 108 bytes.
    with tempfile.TemporaryDirectory(prefix="th-") as spools:
        result = Job(tmp_path / "job", TRAINER, tracking, env={"TMPDIR": spools}).run()
        spooled = list(Path(spools).glob("trackhub-spool-*/*.spool"))

    assert result.rc == 0, result.log[-6000:]
    assert _model(result).tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert len(spooled) == 2
    assert "the receiver refuses site site-1 (no_receiver)" in result.log


@pytest.mark.long
def test_a_servers_disk_without_inodes_stops_no_job_and_tracking_begins_with_the_room(tmp_path: Path) -> None:
    """Server and clients have their state on that disk. It gets inodes in the second round."""
    with small_disk(tmp_path / "disk", 64 << 20, inodes=2) as disk, tempfile.TemporaryDirectory(prefix="th-") as spools:
        trainer = f"""
        import subprocess
        from trackhub import Writer

        writer = Writer()


        def train(n):
            if n == 1 and SITE == "site-1":
                subprocess.run(["mount", "-o", "remount,nr_inodes=0", {str(disk)!r}], check=True)
            for i in range(20):
                values = {{"loss": n + i / 7}}
                fact(lambda: writer.log(values, 20 * n + i), values, 20 * n + i)
            time.sleep(3 * n)


        rounds(train)
        """
        tracking = {"server": ["jsonl"], "state_dir": str(disk / "state"), "limits": {"barrier_s": 2}}

        result = Job(tmp_path / "job", trainer, tracking, rounds=3, env={"TMPDIR": spools}).run()
        reports = list(disk.glob("state/*/server/delivery.json"))
        report = json.loads(reports[0].read_text()) if reports else None

    assert result.rc == 0, result.log[-6000:]
    assert "cannot start yet" in result.log
    assert report is not None, result.log[-6000:]
    assert report["balanced"]
    for site in SITES:
        _assert_all_in_jsonl(result, "server", site)
    assert report["lanes"]["jsonl"]["federation"]["confirmed"] > 0


def test_a_receiver_that_never_answers_is_waited_for_once_and_not_in_every_round(tmp_path: Path) -> None:
    # The sender's receiver has another name than the one that the server has.
    more = """
    from trackhub.flare.sender_widget import TrackhubSender
    from trackhub.flare.flare_internals import reference_package
    limits = {"barrier_s": 1, "sites_s": 2}
    reference_package(job, "trackhub")
    recipe._add_to_client_apps(TrackhubSender("somebody_else", limits=limits), id="trackhub_sender")
    """

    result = Job(tmp_path, TRAINER, more=more, rounds=3).run()

    assert result.rc == 0, result.log[-6000:]
    assert result.log.count("did not acknowledge the records of site site-1") == 1
    assert "site site-1: 60 records were not acknowledged; they stay in" in result.log


def test_a_killed_external_trainer_loses_no_record_whose_call_had_returned(tmp_path: Path) -> None:
    trainer = """
    import random, signal, threading
    from trackhub import Writer

    writer = Writer()

    def train(n):
        if n == 1 and SITE == "site-1":
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(random.uniform(0.2, 0.6), kill).start()
        i = 0
        while i < 100 or (n == 1 and SITE == "site-1"):
            values = {"loss": n + i / 7}
            fact(lambda: writer.log(values, i), values, i)
            i += 1

    rounds(train)
    """

    result = Job(tmp_path / "job", trainer, {"server": ["jsonl"]}, external=True).run()

    report = result.report("server")
    assert report["balanced"]
    for site in SITES:
        noted = [(f.key, f.step, f.value) for f in result.facts(site)]
        points = [(p.key, p.step, p.value) for p in result.jsonl_points("server", site)]
        assert points[: len(noted)] == noted
        # The call that was being made when the signal came may have written its record, too.
        assert len(points) - len(noted) <= (1 if site == "site-1" else 0)
    assert len(result.facts("site-1")) > 110
    ends = {site: _end(result, site) for site in SITES}
    assert ends["site-1"] == "failed"
    assert report["status"] == "failed"


def _end(result: JobResult, site: str) -> str:
    last = read_jsonl(result.jsonl_file("server", site))[-1]
    assert last["kind"] == "end"
    return str(last["status"])
