# SPDX-License-Identifier: Apache-2.0
"""A provisioned federation on this machine: who a record counts for, and what an operator's file and a job may do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.harness import Job, read_jsonl
from tests.integration.poc import FIFTY_CALLS, SITES, Poc, assert_nowhere, operator_file, poc, points, wait_until, wandb
from tests.support.wandb_emulator import Emulator
from trackhub.cli.status import spool_status
from trackhub.delivery.journal.find_journals_and_spools import find

__all__ = ["operator_file", "poc", "wandb"]  # the fixtures that the tests below ask for

pytestmark = pytest.mark.long

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

TRAINER = FIFTY_CALLS + 'fact(lambda: writer.log({"last": 1.0}), {"last": 1.0})\n'


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
        assert points(result, result.client(site), site) == noted
        if site == "site-2" or not swap_cell:  # while it pretends, a forger's own messages may be lost
            assert points(result, result.server, site) == noted
        keys = {key for r in result.records(result.server, site) if r["kind"] == "metrics" for key in r["values"]}
        forged = {key for key in keys if key.startswith("forged/")}
        # Nobody believes the claim in a header. What came in the name of another cell did not get through.
        assert forged == ({"forged/plain", "forged/header"} if site == "site-1" else set())


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
        wait_until(lambda: all(f.exists() and f.read_text().count("\n") > 50 for f in files), 60)
        poc.console.ask("abort", job_id)

    result = poc.run(job.export(), meanwhile=abort)

    report = json.loads((result.server / "trackhub" / "delivery.json").read_text())
    assert (report["status"], report["balanced"]) == ("aborted", True)
    for site in SITES:
        noted = [(key, step, value) for key, value, step, *_ in result.facts(site)]
        stored = points(result, result.server, site)
        assert stored[: len(noted)] == noted[: len(stored)]
        assert len(stored) > 50
        run, known = report["lanes"]["jsonl"][site], report["sites"][site]
        assert (run["confirmed"], run["pending"], known["missing"]) == (len(stored), 0, 0)
        # What the server did not get is still at the site.
        (spool,) = find(result.client(site)).spools
        left = spool_status(spool)["receivers"]["server"]
        assert left["logged"] == left["acked"] + left["spooled"] >= len(noted)
        assert left["acked"] <= len(stored)
        assert result.records(result.server, site)[-1]["status"] == "aborted"


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
        assert sorted(points(result, result.server, site)) == [("loss", 0, 0.5), ("loss", 1, 1.5)]


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
