# SPDX-License-Identifier: Apache-2.0
"""A provisioned federation on this machine: separate services, mutual TLS, job processes, downloaded results."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from .harness import Job, flare_environment, read_jsonl

pytestmark = pytest.mark.long

ADMIN = "admin@nvidia.com"
SITES = ("site-1", "site-2")


@dataclass(frozen=True)
class Poc:
    """A running federation, and a session of its administrator."""

    workspace: Path
    out: Path
    session: Session

    def run(self, job: Path, *, meanwhile: Callable[[str], None] = lambda job_id: None) -> PocResult:
        """Submit a job, wait for its end, and fetch its result."""
        job_id = self.session.submit_job(str(job))
        meanwhile(job_id)
        self.session.monitor_job(job_id, timeout=180, poll_interval=1.0)
        status = self.session.get_job_meta(job_id)["status"]
        download = Path(self.session.download_job_result(job_id))
        return PocResult(job_id, status, download / "workspace", self.workspace / "example_project" / "prod_00", self.out)


@dataclass(frozen=True)
class PocResult:
    """What a job left."""

    job: str
    status: str
    server: Path
    startup: Path
    out: Path

    def facts(self, site: str) -> list[list[Any]]:
        """What the trainer of this site noted."""
        return [json.loads(line) for line in (self.out / self.job / f"{site}.facts").read_text().splitlines()]

    def client(self, site: str) -> Path:
        """The job's run folder at a client, where it stays."""
        return self.startup / site / self.job

    def records(self, run_dir: Path, site: str) -> list[dict[str, Any]]:
        """The jsonl records of a site's run, the line that ends it included."""
        return read_jsonl(run_dir / "jsonl" / self.job / f"{site}.jsonl")


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Poc]:
    root = tmp_path_factory.mktemp("poc")
    (root / "home").mkdir()
    out = root / "out"
    env = flare_environment() | {
        "HOME": str(root / "home"),
        "NVFLARE_POC_WORKSPACE": str(root / "ws"),
        "TRACKHUB_TEST_OUT": str(out / "{job}"),
    }

    def poc(*args: str) -> None:
        done = subprocess.run(["nvflare", "poc", *args], env=env, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    poc("prepare", "-n", str(len(SITES)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    project = root / "project.yml"
    project.write_text((root / "ws" / "project.yml").read_text().replace("8002", str(port)))
    poc("prepare", "-i", str(project), "--force")
    kits = root / "ws" / "example_project" / "prod_00"
    services = [
        subprocess.Popen([kits / name / "startup" / "sub_start.sh", "--once"], env=env, stdin=subprocess.DEVNULL,
                         stdout=(root / f"{name}.log").open("wb"), stderr=subprocess.STDOUT, start_new_session=True)
        for name in ("server", *SITES)
    ]  # fmt: skip
    session = None
    try:
        session = new_secure_session(ADMIN, str(kits / ADMIN), timeout=60.0)
        _wait_until(lambda: len(session.get_system_info().client_info) == len(SITES), 60)
        yield Poc(root / "ws", out, session)
    finally:
        if session is not None:
            session.close()
        for service in services:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(service.pid, signal.SIGKILL)
            service.wait()


def _wait_until(true: Callable[[], bool], timeout_s: float) -> None:
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.2)):
        if true():
            return
        pause.wait(0.2)
    raise AssertionError(f"not within {timeout_s} s")


FORGER = """
import json, os, time, uuid
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.fqcn import FqcnInfo
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.widgets.widget import Widget

from trackhub.delivery.wire import Batch, encode
from trackhub.flare.compat import Channel
from trackhub.records import Metrics, Record, encode_frame


class Forger(Widget):
    '''A component of site-1 that sends records and says that it is site-2, in every way that it can.'''

    def handle_event(self, event_type, fl_ctx):
        if event_type == EventType.BEFORE_SEND_TASK_RESULT:
            engine = fl_ctx.get_engine()
            fl_ctx.put(ReservedKey.IDENTITY_NAME, "site-2", private=False, sticky=False)
            target = Channel(engine, "trackhub_receiver")._ask(10.0)
            cell, job = engine.get_cell(), fl_ctx.get_job_id()
            replies = {"plain": self.send(cell, target, {}, "forged/plain")}
            claim = {MessageHeaderKey.ORIGIN: "site-2." + job}
            replies["header"] = self.send(cell, target, claim, "forged/header")
            true = cell.core_cell.my_info
            cell.core_cell.my_info = FqcnInfo("site-2." + job)
            try:
                replies["cell"] = self.send(cell, target, {}, "forged/cell", 4.0)
            finally:
                cell.core_cell.my_info = true
            folder = os.environ["TRACKHUB_TEST_OUT"].replace("{job}", job)
            with open(os.path.join(folder, "forger.json"), "w") as file:
                json.dump(replies, file)

    def send(self, cell, target, headers, key, timeout=10.0):
        frames = encode_frame(Record(0, time.time(), 0, 0, Metrics({key: 1.0})))
        request = encode(Batch(uuid.uuid4().hex, 0, 1, 1, frames))
        message = new_cell_message(headers, {"trackhub": request})
        reply = cell.send_request(channel="trackhub", topic="trackhub_receiver", target=target, request=message,
                                  timeout=timeout, optional=True)
        return reply.get_header(MessageHeaderKey.RETURN_CODE)
"""

TRAINER = """
from trackhub import Writer

writer = Writer()


def train(n):
    for i in range(50):
        values = {"loss": n + i / 7}
        fact(lambda: writer.log(values, 50 * n + i), values, 50 * n + i)


rounds(train)
fact(lambda: writer.log({"last": 1.0}), {"last": 1.0})
"""


@pytest.mark.filterwarnings("ignore:trackhub. shutdown_timeout")
@pytest.mark.parametrize("external", [False, True], ids=["in_process", "external_process"])
def test_a_site_writes_as_itself_whatever_it_claims(poc: Poc, tmp_path: Path, external: bool) -> None:
    more = """
    from forger import Forger
    job.to(Forger(), "site-1", id="forger")
    """
    tracking = {"server": ["jsonl"], "clients": ["jsonl"]}
    job = Job(tmp_path, TRAINER, tracking, external=external, more=more, modules={"forger": FORGER}, own_apps=True)

    result = poc.run(job.export())

    assert result.status == "FINISHED:COMPLETED"
    replies = json.loads((result.out / result.job / "forger.json").read_text())
    assert replies["plain"] == "ok"
    report = json.loads((result.server / "trackhub" / "delivery.json").read_text())
    assert report["job"] == result.job
    assert report["status"] == "finished"
    assert set(report["sites"]) == set(SITES)
    for site in SITES:
        noted = [(key, step, value) for key, value, step, *_ in result.facts(site)]
        assert _points(result, result.server, site) == noted
        assert _points(result, result.client(site), site) == noted
        keys = {key for r in result.records(result.server, site) if r["kind"] == "metrics" for key in r["values"]}
        forged = {key for key in keys if key.startswith("forged/")}
        # The claim in a header is not believed; what really came from another cell's name did not get through.
        assert forged == ({"forged/plain", "forged/header"} if site == "site-1" else set())


def _points(result: PocResult, run_dir: Path, site: str) -> list[tuple[str, int | None, float]]:
    return [
        (key, record["step"], value)
        for record in result.records(run_dir, site)
        if record["kind"] == "metrics"
        for key, value in record["values"].items()
        if not key.startswith("forged/")
    ]


def test_an_aborted_job_keeps_what_was_logged_and_says_that_it_was_aborted(poc: Poc, tmp_path: Path) -> None:
    trainer = """
    from trackhub import Writer

    writer = Writer()

    def train(n):
        i = 0
        while flare.is_running():
            values = {"loss": float(i)}
            fact(lambda: writer.log(values, i), values, i)
            i += 1
            time.sleep(0.01)

    rounds(train)
    """
    job = Job(tmp_path, trainer, {"server": ["jsonl"], "clients": ["jsonl"]})

    def abort(job_id: str) -> None:
        files = [poc.out / job_id / f"{site}.facts" for site in SITES]
        _wait_until(lambda: all(f.exists() and f.read_text().count("\n") > 50 for f in files), 60)
        poc.session.abort_job(job_id)

    result = poc.run(job.export(), meanwhile=abort)

    report = json.loads((result.server / "trackhub" / "delivery.json").read_text())
    assert report["status"] == "aborted"
    for site in SITES:
        noted = [(key, step, value) for key, value, step, *_ in result.facts(site)]
        points = _points(result, result.server, site)
        assert points == noted[: len(points)]
        assert len(points) > 50
        assert result.records(result.server, site)[-1]["status"] == "aborted"
