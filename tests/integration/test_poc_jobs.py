# SPDX-License-Identifier: Apache-2.0
"""Jobs in a provisioned federation: two at once, one without code of its own, and one at a site that lies or dies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stores import BACKENDS, read_run
from tests.integration.harness import Fact, Job, files_with
from tests.integration.poc import ALLOWED_CLASSES, FIFTY_CALLS, SITES, Poc, PocResult, poc, points, wandb
from trackhub.job_and_run_info import JobInfo, Side

__all__ = ["poc", "wandb"]  # the fixtures that the tests below ask for

pytestmark = pytest.mark.long


def noted(result: PocResult, site: str) -> list[tuple[str, int | None, float]]:
    """Return what the trainer of a site noted, as `points` returns what is stored."""
    return [(key, step, value) for key, value, step, *_ in result.facts(site)]


def report_of(result: PocResult) -> dict[str, Any]:
    """Return the delivery report of the server."""
    report: dict[str, Any] = json.loads((result.server / "trackhub" / "delivery.json").read_text())
    return report


MEETING_TRAINER = """
from pathlib import Path
from trackhub import Writer

writer = Writer()
here = Path(OUT)


def train(n):
    # No job trains before both do, so that they run at the same time.
    while len(list(here.parent.glob("*/" + SITE + ".facts"))) < 2:
        time.sleep(0.1)
    for i in range(200):
        values = {"loss": float(int(here.name[:8], 16) + i)}
        fact(lambda: writer.log(values, 200 * n + i), values, 200 * n + i)


rounds(train)
"""


def test_two_jobs_at_once_have_each_its_own_records(poc: Poc, tmp_path: Path) -> None:
    """Nothing of one job is in the other's files, although both name the same sites, keys and steps."""
    folder = Job(tmp_path, MEETING_TRAINER, {"server": ["jsonl"], "clients": ["jsonl"]}).export()
    for left in poc.out.glob("*/*.facts"):
        left.unlink()

    ids = [poc.console.ask("submit", str(folder)) for _ in range(2)]
    results = [poc.result(job_id) for job_id in ids]

    for result in results:
        assert result.status == "FINISHED:COMPLETED"
        report = report_of(result)
        assert (report["job"], report["status"], report["balanced"]) == (result.job, "finished", True)
        for site in SITES:
            expected = noted(result, site)
            assert len(expected) == 400
            assert expected[0][2] == int(result.job[:8], 16)
            assert points(result, result.server, site) == expected
            assert points(result, result.client(site), site) == expected


@pytest.fixture(scope="module")
def at_the_sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the sites, in which their operators have installed a training script."""
    return tmp_path_factory.mktemp("installed")


def without_code(folder: Path, job: Path) -> Path:
    """Take a job's code away. The sites have the training script, and the job names its path there."""
    shutil.copy(job / "app" / "custom" / "client.py", folder / "client.py")
    shutil.rmtree(job / "app" / "custom")
    file = job / "app" / "config" / "config_fed_client.json"
    config = json.loads(file.read_text())
    (executor,) = config["executors"]
    executor["executor"]["args"]["task_script_path"] = str(folder / "client.py")
    file.write_text(json.dumps(config))
    return job


def test_a_user_without_byoc_runs_a_job_without_code_and_gets_its_records(
    poc: Poc, tmp_path: Path, at_the_sites: Path
) -> None:
    """FLARE's list of classes holds for such a job. It has the lines of docs/deploying.md."""
    page = (Path(__file__).parents[2] / "docs" / "deploying.md").read_text()
    assert all(f'"{name}"' in page for name in ALLOWED_CLASSES)
    written = Job(tmp_path, FIFTY_CALLS, {"server": ["jsonl"], "clients": ["jsonl"]}).export()
    bringing_code = tmp_path / "with_code"
    shutil.copytree(written, bringing_code)

    refused = poc.lead.ask("submit", str(bringing_code))
    accepted = poc.lead.ask("submit", str(without_code(at_the_sites, written)))
    result = poc.result(accepted, poc.lead)

    assert poc.lead.ask("status", refused) != "FINISHED:COMPLETED"
    assert result.status == "FINISHED:COMPLETED"
    for site in SITES:
        assert points(result, result.server, site) == noted(result, site)
        assert points(result, result.client(site), site) == noted(result, site)


@pytest.fixture
def no_classes_of_trackhub(poc: Poc) -> Iterator[None]:
    """The operator of the server has not put trackhub into the list of classes."""
    file = poc.kits / "server" / "local" / "resources.json"
    text = file.read_text()
    resources = json.loads(text)
    resources["class_allow_list"] = [name for name in resources["class_allow_list"] if not name.startswith("trackhub.")]
    file.write_text(json.dumps(resources))
    yield
    file.write_text(text)


@pytest.mark.usefixtures("no_classes_of_trackhub")
def test_a_job_without_code_is_refused_where_trackhub_is_not_in_the_list(
    poc: Poc, tmp_path: Path, at_the_sites: Path
) -> None:
    job = without_code(at_the_sites, Job(tmp_path, FIFTY_CALLS, {"server": ["jsonl"]}).export())

    result = poc.result(poc.lead.ask("submit", str(job)), poc.lead)

    assert result.status != "FINISHED:COMPLETED"
    assert not list((poc.out / result.job).glob("*.facts"))


@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_job_without_code_gets_no_file_of_the_server_as_its_model(
    poc: Poc, tmp_path: Path, at_the_sites: Path, is_absolute: bool
) -> None:
    """FLARE's own persistor, which every job may use, says that the model is the server's private key."""
    secret = poc.kits / "server" / "startup" / "server.key"
    tracking = {"server": ["jsonl"], "log_model": "last"}
    job = without_code(at_the_sites, Job(tmp_path, FIFTY_CALLS, tracking).export())
    file = job / "app" / "config" / "config_fed_server.json"
    config = json.loads(file.read_text())
    (persistor,) = [c for c in config["components"] if c["path"].endswith(".NPModelPersistor")]
    folder = str(secret.parent) if is_absolute else "../startup"
    persistor["args"] |= {"model_dir": folder, "model_name": secret.name}
    file.write_text(json.dumps(config))

    result = poc.result(poc.lead.ask("submit", str(job)), poc.lead)

    assert list(files_with(result.server, secret.read_bytes())) == []
    assert [*(result.server / "trackhub" / "blobs").rglob("*")] == []
    log = "".join(path.read_text(errors="replace") for path in result.server.glob("log.txt"))
    assert log.count("outside the job's folder") == 1, log[-4000:]


DEATH = """
import os, signal
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.widgets.widget import Widget


class Death(Widget):
    '''Kills the job's process at its site when the last result was sent. FLARE then ends the job as usual.'''

    def __init__(self):
        super().__init__()
        self.tasks = 0

    def handle_event(self, event_type, fl_ctx):
        if event_type == EventType.AFTER_SEND_TASK_RESULT:
            self.tasks += 1
            if self.tasks == 2:
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_site_that_is_killed_without_a_goodbye_never_reads_as_finished(poc: Poc, tmp_path: Path) -> None:
    more = """
    from death import Death
    job.to(Death(), "site-2", id="death")
    """
    job = Job(tmp_path, FIFTY_CALLS, {"server": ["jsonl"]}, more=more, modules={"death": DEATH}, own_apps=True)

    result = poc.run(job.export())

    report = report_of(result)
    assert not report["sites"]["site-2"]["final"]
    assert report["sites"]["site-1"]["final"]
    ends = {site: result.records(result.server, site)[-1]["status"] for site in SITES}
    assert ends["site-2"] != "finished"
    assert not report["balanced"]
    if result.status == "FINISHED:COMPLETED":
        assert ends["site-1"] == "finished"
    assert points(result, result.server, "site-1") == noted(result, "site-1")


LIAR = """
import json, os, time, uuid
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.widgets.widget import Widget

from trackhub.delivery.wire import Final, KeepAlive, SiteCounts, encode
from trackhub.flare.cell_channel import CellChannel


class Liar(Widget):
    '''A component of site-1. It counts what nobody logged, says goodbye for site-2, and ends the run for all.

    It does so in its last round. FLARE also handles the event at the site that sends it, whose training then ends.
    '''

    def __init__(self):
        super().__init__()
        self.results = 0

    def handle_event(self, event_type, fl_ctx):
        if event_type == EventType.BEFORE_SEND_TASK_RESULT:
            self.results += 1
        if event_type == EventType.BEFORE_SEND_TASK_RESULT and self.results == 2:
            engine, job = fl_ctx.get_engine(), fl_ctx.get_job_id()
            target, cell = CellChannel(engine, "trackhub_receiver")._ask(10.0), engine.get_cell()
            counts = SiteCounts(logged=10**6, acked=7, dropped={"invented": 1000})
            session = uuid.uuid4().hex
            replies = [
                self.send(cell, target, {}, KeepAlive(counts, session, 10**6)),
                self.send(cell, target, {MessageHeaderKey.ORIGIN: "site-2." + job}, Final(counts, True, session, 2)),
            ]
            self.fire_fed_event("_end_run", Shareable(), fl_ctx)
            time.sleep(2.0)  # FLARE sends it from another thread
            folder = os.environ["TRACKHUB_TEST_OUT"].replace("{job}", job)
            with open(os.path.join(folder, "liar.json"), "w") as file:
                json.dump(replies, file)

    def send(self, cell, target, headers, request):
        message = new_cell_message(headers, {"trackhub": encode(request)})
        reply = cell.send_request(channel="trackhub", topic="trackhub_receiver", target=target, request=message,
                                  timeout=10.0, optional=True)
        return reply.get_header(MessageHeaderKey.RETURN_CODE)
"""


LATER_TRAINER = """
from trackhub import Writer

writer = Writer()


def train(n):
    while SITE == "site-2" and n == 1 and not os.path.exists(os.path.join(OUT, "liar.json")):
        time.sleep(0.1)
    for i in range(50):
        values = {"loss": n + i / 7}
        fact(lambda: writer.log(values, 50 * n + i), values, 50 * n + i)


rounds(train)
"""


def test_lies_of_one_site_spoil_its_own_part_of_the_report_alone(poc: Poc, tmp_path: Path) -> None:
    more = """
    from liar import Liar
    job.to(Liar(), "site-1", id="liar")
    """
    tracking, modules = {"server": ["jsonl"]}, {"liar": LIAR}
    job = Job(tmp_path, LATER_TRAINER, tracking, more=more, modules=modules, own_apps=True)

    result = poc.run(job.export())

    assert result.status == "FINISHED:COMPLETED"
    assert json.loads((result.out / result.job / "liar.json").read_text()) == ["ok", "ok"]
    report = report_of(result)
    honest = report["sites"]["site-2"]
    counts = honest["at_site"]
    assert counts["logged"] == counts["acked"] == honest["journaled"] >= 100
    assert (honest["final"], honest["missing"], counts["dropped"]) == (True, 0, {})
    assert report["lanes"]["jsonl"]["site-2"]["state"] == "finished"
    for site in SITES:
        assert points(result, result.server, site) == noted(result, site)
    assert result.records(result.server, "site-2")[-1]["status"] == "finished"


def test_a_job_in_poc_stores_the_same_points_as_in_the_simulator(poc: Poc, tmp_path: Path) -> None:
    """Each job's points are compared with what its own trainers noted: the clock differs, and nothing else may."""
    here = Job(tmp_path / "here", FIFTY_CALLS, {"server": BACKENDS}).run()
    there = poc.run(Job(tmp_path / "there", FIFTY_CALLS, {"server": BACKENDS}).export())

    assert (here.rc, there.status) == (0, "FINISHED:COMPLETED"), here.log
    for site in SITES:
        facts = [Fact(*fact) for fact in there.facts(site)]
        assert [(f.key, f.value, f.step) for f in facts] == [(f.key, f.value, f.step) for f in here.facts(site)]
        for backend in BACKENDS:
            simulated = read_run(backend, here.run_dir("server"), here.job, site, Side.SERVER)
            stored = read_run(backend, there.server, JobInfo(there.job, "job"), site, Side.SERVER)
            assert without_time(stored.points) == without_time(simulated.points), backend
            assert len(stored.points) == len(facts), backend
            for point, fact in zip(by_step(stored.points), facts, strict=True):
                assert fact.before - 0.001 <= point.time <= fact.after + 0.001, backend
            assert (stored.tags, stored.status) == (simulated.tags, simulated.status), backend


def by_step(found: list[Any]) -> list[Any]:
    """Return points in the order of their steps."""
    return sorted(found, key=lambda point: point.step)


def without_time(found: list[Any]) -> list[tuple[str, int | None, float]]:
    """Return key, step and value of points, in the order of their steps."""
    return [(point.key, point.step, point.value) for point in by_step(found)]
