# SPDX-License-Identifier: Apache-2.0
"""A provisioned federation on this machine: separate services, mutual TLS, job processes, downloaded results."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import Job, files_with, flare_environment, read_jsonl
from tests.support.wandb_emulator import Emulator
from trackhub.cli.status import spool_status
from trackhub.delivery.journal.find import find

pytestmark = pytest.mark.long

ADMIN = "admin@nvidia.com"
SITES = ("site-1", "site-2")


# It runs in a process of its own, since FLARE's client raises warnings in its threads, and warnings are errors here.
ADMIN_CONSOLE = """
import json, sys
from nvflare.fuel.flare_api.flare_api import new_secure_session

user, kit = sys.argv[1:]
session = new_secure_session(user, kit, timeout=60.0)

def do(what, arg):
    if what == "clients":
        return [client.name for client in session.get_system_info().client_info]
    if what == "submit":
        return session.submit_job(arg)
    if what == "abort":
        return session.abort_job(arg)
    session.monitor_job(arg, timeout=180, poll_interval=0.5)
    return [session.get_job_meta(arg)["status"], session.download_job_result(arg)]


for line in sys.stdin:
    try:
        answer = {"done": do(*json.loads(line))}
    except Exception as e:
        answer = {"failed": f"{type(e).__name__}: {e}"}
    print("@@" + json.dumps(answer), flush=True)
"""


class Console:
    """A session of the federation's administrator."""

    def __init__(self, kit: Path, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", ADMIN_CONSOLE, ADMIN, str(kit)], env=env, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=kit,
        )  # fmt: skip

    def ask(self, what: str, arg: str = "") -> Any:
        """Do one thing, and return FLARE's answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, arg]) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@@"):
                answer = json.loads(line[2:])
                assert "done" in answer, answer
                return answer["done"]
        raise AssertionError(f"the console ended before it answered {what!r}")

    def close(self) -> None:
        """End the session."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class Poc:
    """A running federation."""

    workspace: Path
    out: Path
    console: Console
    wandb: Emulator

    def run(self, job: Path, *, meanwhile: Callable[[str], None] = lambda job_id: None) -> PocResult:
        """Submit a job, wait for its end, and fetch its result."""
        job_id = self.console.ask("submit", str(job))
        meanwhile(job_id)
        status, download = self.console.ask("wait", job_id)
        startup = self.workspace / "example_project" / "prod_00"
        return PocResult(job_id, status, Path(download) / "workspace", startup, self.out)


@dataclass(frozen=True)
class PocResult:
    """What a job left."""

    job: str
    status: str
    server: Path
    startup: Path
    out: Path

    def facts(self, site: str) -> list[list[Any]]:
        """Return what the trainer of this site noted."""
        return [json.loads(line) for line in (self.out / self.job / f"{site}.facts").read_text().splitlines()]

    def client(self, site: str) -> Path:
        """Return the job's run folder at a client, where it stays."""
        return self.startup / site / self.job

    def records(self, run_dir: Path, site: str) -> list[dict[str, Any]]:
        """Return the records in a site's ``jsonl`` file, and the line that ends the run."""
        return read_jsonl(run_dir / "jsonl" / self.job_folder / f"{site}.jsonl")

    @property
    def job_folder(self) -> str:
        """The name of the job's folder in a backend that has such folders: the job's name, and the start of its id."""
        return f"job-{self.job[:8]}"


@pytest.fixture(scope="module")
def wandb() -> Iterator[Emulator]:
    """The W&B server that the environment of the services names, with the key that they have."""
    with Emulator(secrets.token_hex(20)) as server:
        yield server


@pytest.fixture(scope="module")
def poc(tmp_path_factory: pytest.TempPathFactory, wandb: Emulator) -> Iterator[Poc]:
    root = tmp_path_factory.mktemp("poc")
    (root / "home").mkdir()
    out = root / "out"
    env = flare_environment() | {
        "HOME": str(root / "home"),
        "NVFLARE_POC_WORKSPACE": str(root / "ws"),
        "TRACKHUB_TEST_OUT": str(out / "{job}"),
        "WANDB_API_KEY": wandb.state.api_key,
        "WANDB_BASE_URL": wandb.url,
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
    for name in ("server", *SITES):
        _configure(kits / name / "local", root / "storage")
    services = [_start(kits / "server", root / "server.log", env)]
    try:
        # A client that asks a server that is still starting fails its login, and ends.
        _wait_until(lambda: "Server started" in (root / "server.log").read_text(errors="replace"), 60)
        services += [_start(kits / site, root / f"{site}.log", env) for site in SITES]
        console = Console(kits / ADMIN, env)
        try:
            _wait_until(lambda: len(console.ask("clients")) == len(SITES), 60)
            yield Poc(root / "ws", out, console, wandb)
        finally:
            console.close()
    finally:
        for service in services:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(service.pid, signal.SIGKILL)
            service.wait()


def _configure(local: Path, storage: Path) -> None:
    """Do what a site's operator does once, and give the server a job store of its own.

    The operator allows trackhub's components in jobs that bring no code. By default all federations on a machine share
    one job store. Federations that run at once would take each other's jobs, and fail them.
    """
    default = (local / "resources.json.default").read_text()
    resources = json.loads(default.replace("/tmp/nvflare", str(storage)))
    resources["class_allow_list"].append("trackhub.flare.")
    (local / "resources.json").write_text(json.dumps(resources))


def _start(kit: Path, log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(
            [kit / "startup" / "sub_start.sh", "--once"], env=env, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _wait_until(true: Callable[[], bool], timeout_s: float) -> None:
    pause = threading.Event()
    for _ in range(int(timeout_s / 0.2)):
        if true():
            return
        pause.wait(0.2)
    raise AssertionError(f"it did not happen within {timeout_s} s")


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
from trackhub.flare.cell_channel import CellChannel
from trackhub.framing import encode_frame
from trackhub.records import Metrics, Record


class Forger(Widget):
    '''A component of site-1 that sends records and says that it is site-2, in every way that it can.'''

    def __init__(self, swap_cell: bool = False):
        super().__init__()
        self.swap_cell = swap_cell

    def handle_event(self, event_type, fl_ctx):
        if event_type == EventType.BEFORE_SEND_TASK_RESULT:
            engine = fl_ctx.get_engine()
            fl_ctx.put(ReservedKey.IDENTITY_NAME, "site-2", private=False, sticky=False)
            target = CellChannel(engine, "trackhub_receiver")._ask(10.0)
            cell, job = engine.get_cell(), fl_ctx.get_job_id()
            replies = {"plain": self.send(cell, target, {}, "forged/plain")}
            claim = {MessageHeaderKey.ORIGIN: "site-2." + job}
            replies["header"] = self.send(cell, target, claim, "forged/header")
            if self.swap_cell:
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
@pytest.mark.parametrize(
    ("external", "swap_cell"),
    [
        pytest.param(False, False, id="in_process"),
        pytest.param(True, False, id="external_process"),
        pytest.param(False, True, id="with_the_cell_of_another"),
    ],
)
def test_a_site_writes_as_itself_whatever_it_claims(poc: Poc, tmp_path: Path, external: bool, swap_cell: bool) -> None:
    more = f"""
    from forger import Forger
    job.to(Forger({swap_cell}), "site-1", id="forger")
    """
    tracking = {"server": ["jsonl"], "clients": ["jsonl"]}
    job = Job(tmp_path, TRAINER, tracking, external=external, more=more, modules={"forger": FORGER}, own_apps=True)

    result = poc.run(job.export())

    assert result.status == "FINISHED:COMPLETED"
    replies = json.loads((result.out / result.job / "forger.json").read_text())
    assert replies["plain"] == "ok"
    report = json.loads((result.server / "trackhub" / "delivery.json").read_text())
    assert (report["job"], report["job_name"]) == (result.job, "job")
    assert report["status"] == "finished"
    assert set(report["sites"]) == {*SITES, "federation"}
    for site in SITES:
        noted = [(key, step, value) for key, value, step, *_ in result.facts(site)]
        assert _points(result, result.client(site), site) == noted
        if site == "site-2" or not swap_cell:  # while it pretends, a forger's own messages may be lost
            assert _points(result, result.server, site) == noted
        keys = {key for r in result.records(result.server, site) if r["kind"] == "metrics" for key in r["values"]}
        forged = {key for key in keys if key.startswith("forged/")}
        # Nobody believes the claim in a header. What came in the name of another cell did not get through.
        assert forged == ({"forged/plain", "forged/header"} if site == "site-1" else set())


def _points(result: PocResult, run_dir: Path, site: str) -> list[tuple[str, int | None, float]]:
    return [
        (key, record["step"], value)
        for record in result.records(run_dir, site)
        if record["kind"] == "metrics"
        for key, value in record["values"].items()
        if not key.startswith("forged/")
    ]


def test_an_aborted_job_keeps_what_was_logged_and_ends_as_aborted(poc: Poc, tmp_path: Path) -> None:
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
        poc.console.ask("abort", job_id)

    result = poc.run(job.export(), meanwhile=abort)

    report = json.loads((result.server / "trackhub" / "delivery.json").read_text())
    assert (report["status"], report["balanced"]) == ("aborted", True)
    for site in SITES:
        noted = [(key, step, value) for key, value, step, *_ in result.facts(site)]
        points = _points(result, result.server, site)
        assert points[: len(noted)] == noted[: len(points)]
        assert len(points) > 50
        run, known = report["lanes"]["jsonl"][site], report["sites"][site]
        assert (run["confirmed"], run["pending"], known["missing"]) == (len(points), 0, 0)
        # What the server did not get is still at the site.
        (spool,) = find(result.client(site)).spools
        left = spool_status(spool)["receivers"]["server"]
        assert left["logged"] == left["acked"] + left["spooled"] >= len(noted)
        assert left["acked"] <= len(points)
        assert result.records(result.server, site)[-1]["status"] == "aborted"


@pytest.fixture
def operator_file(poc: Poc) -> Iterator[Callable[[str, str], None]]:
    """Write an operator's file: give it the service's name and the text. A job that starts later reads it."""
    written = []

    def write(service: str, text: str) -> None:
        path = poc.workspace / "example_project" / "prod_00" / service / "local" / "trackhub.toml"
        path.write_text(text)
        written.append(path)

    yield write
    for path in written:
        path.unlink(missing_ok=True)


SHORT_TRAINER = """
from trackhub import Writer

writer = Writer()
rounds(lambda n: fact(lambda: writer.log({"loss": 1.0}, n), {"loss": 1.0}, n))
"""


@pytest.mark.parametrize("side", ["server", "clients"])
def test_a_job_cannot_reach_past_itself_and_is_told_why(poc: Poc, tmp_path: Path, side: str) -> None:
    """Nobody wrote an operator's file. The training script may start, and no round of it."""
    outside = tmp_path / "outside"
    job = Job(tmp_path, SHORT_TRAINER, {side: {"jsonl": {"path": str(outside)}}})

    result = poc.run(job.export())

    assert result.status != "FINISHED:COMPLETED"
    assert not outside.exists()
    assert not any(file.read_text() for file in (result.out / result.job).glob("*.facts"))
    run_dirs = [result.server] if side == "server" else [result.client(site) for site in SITES]
    logs = "".join(log.read_text() for run_dir in run_dirs for log in run_dir.rglob("log.txt"))
    assert f"jsonl.path: '{outside}' is outside the job's own folder" in logs
    assert "local/trackhub.toml" in logs


def test_the_operator_of_the_server_allows_a_folder_and_sets_limits(
    poc: Poc, tmp_path: Path, operator_file: Callable[[str, str], None]
) -> None:
    outside = tmp_path / "outside"
    operator_file("server", f'[limits]\nflush_s = 0.5\n[backends.jsonl]\npaths = ["{outside}"]\n')
    job = Job(tmp_path, SHORT_TRAINER, {"server": {"jsonl": {"path": str(outside)}}})

    result = poc.run(job.export())

    assert result.status == "FINISHED:COMPLETED"
    for site in SITES:
        (kept,) = outside.glob(f"*/{site}.jsonl")
        assert [r["values"] for r in read_jsonl(kept) if r["kind"] == "metrics"] == [{"loss": 1.0}] * len(
            result.facts(site)
        )


def test_the_operator_of_a_client_can_keep_trackhub_out_of_its_trainers(
    poc: Poc, tmp_path: Path, operator_file: Callable[[str, str], None]
) -> None:
    operator_file("site-1", 'take_over = "events"\n')
    trainer = """
    from nvflare.client.tracking import SummaryWriter

    writer = SummaryWriter()
    rounds(lambda n: writer.add_scalar("loss", n + 0.5, n))
    """
    job = Job(tmp_path, trainer, {"server": ["jsonl"]}, external=True)

    result = poc.run(job.export())

    assert result.status == "FINISHED:COMPLETED"
    report = json.loads((result.server / "trackhub" / "delivery.json").read_text())
    for site, way in (("site-1", (False, 2)), ("site-2", (True, 0))):
        counts = report["sites"][site]["at_site"]
        assert (counts["at_source"], counts["by_message"]) == way
        assert sorted(_points(result, result.server, site)) == [("loss", 0, 0.5), ("loss", 1, 1.5)]


def test_an_operator_s_file_that_is_wrong_stops_every_job(
    poc: Poc, tmp_path: Path, operator_file: Callable[[str, str], None]
) -> None:
    operator_file("site-2", 'backend_allowed = ["jsonl"]')
    job = Job(tmp_path, SHORT_TRAINER, {"server": ["jsonl"]})

    result = poc.run(job.export())

    assert result.status != "FINISHED:COMPLETED"
    logs = "".join(log.read_text() for log in result.client("site-2").rglob("log.txt"))
    assert "unknown field `backend_allowed`" in logs


def test_a_server_with_a_key_of_wandb_needs_no_operator_s_file(poc: Poc, tmp_path: Path) -> None:
    job = Job(tmp_path, SHORT_TRAINER, {"server": {"wandb": {"project": "cifar10"}}})

    result = poc.run(job.export())

    assert result.status == "FINISHED:COMPLETED"
    report = json.loads((result.server / "trackhub" / "delivery.json").read_text())
    for site in SITES:
        run = report["lanes"]["wandb"][site]
        assert (run["confirmed"], run["pending"]) == (len(result.facts(site)), 0)
        assert run["results"]["url"].startswith(poc.wandb.url)
    assert_nowhere(poc.wandb.state.api_key, poc, result)


def test_the_server_s_key_of_wandb_is_sent_to_no_host_that_a_job_names(poc: Poc, tmp_path: Path) -> None:
    with Emulator(poc.wandb.state.api_key) as evil:
        job = Job(tmp_path, SHORT_TRAINER, {"server": {"wandb": {"mode": "online", "base_url": evil.url}}})

        result = poc.run(job.export())

        assert evil.state.requests == []
    assert result.status != "FINISHED:COMPLETED"
    assert not any(file.read_text() for file in (result.out / result.job).glob("*.facts"))
    logs = "".join(log.read_text() for log in result.server.rglob("log.txt"))
    assert f"wandb.base_url '{evil.url}' is not a host that the operator named; named: {poc.wandb.url}" in logs


def assert_nowhere(secret: str, poc: Poc, result: PocResult) -> None:
    """The secret is in no file of the federation, and in no file of the result."""
    assert [path for folder in (poc.workspace, result.server) for path in files_with(folder, secret.encode())] == []
