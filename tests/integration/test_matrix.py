# SPDX-License-Identifier: Apache-2.0
"""The matrix {server, client, both} x {in process, external process}, each with jsonl and TensorBoard at once."""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import Fact, Job, JobResult, Point, files_with
from trackhub.delivery.journal.read_only import read_journal_meta
from trackhub.spool.layout import read_spool_info

PLANTED_VALUE = 31337.424242
SITES = ("site-1", "site-2")
BACKENDS: dict[str, dict[str, Any]] = {"jsonl": {}, "tensorboard": {}}

TRAINER = """
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.client.tracking import MLflowWriter, SummaryWriter, WandBWriter
from trackhub import Writer

# Put together at run time, so that the job's own files do not hold them.
PLANTED = "".join(reversed("cirtem_terces/detnalp"))
SECRET = float("".join(reversed("242424.73313")))
writer = Writer()
writer.log_params({"lr": 0.1, "site": SITE})
writer.set_tags({"stage": "test"})
writer.log_text("note", "hello from " + SITE)


def train(n):
    for i in range(25):
        step = 25 * n + i
        values = {"train/loss": 1 / (step + 3), "train/accuracy": step / 7}
        fact(lambda: writer.log(values, step), values, step)
    values = {PLANTED: SECRET}
    fact(lambda: writer.log(values, n), values, n)
    values = {"odd": float("nan") if n else float("inf")}
    fact(lambda: writer.log(values, 100 - n), values, 100 - n)
    SummaryWriter().add_scalar("stock/tb", n + 0.25, n)
    WandBWriter().log({"stock/wandb": n + 0.5, PLANTED + "/stock": SECRET}, n)
    MLflowWriter().log_metric("stock/mlflow", n + 0.75, n)
    flare.log("stock/flare", n + 0.125, AnalyticsDataType.SCALAR, global_step=n)


rounds(train)
fact(lambda: writer.log({"last": 42.0}), {"last": 42.0})
"""

STOCK = {"stock/tb": 0.25, "stock/wandb": 0.5, "stock/mlflow": 0.75, "stock/flare": 0.125}

SERVER_PARTS = """
import json, os
from nvflare.apis.event_type import EventType
from nvflare.apis.shareable import make_reply
from nvflare.fuel.f3.cellnet.utils import make_reply as cell_reply
from nvflare.widgets.widget import Widget


class Counter(Widget):
    '''Counts what reaches the server: analytics events, and, where no receiver does so, trackhub's own messages.'''

    def __init__(self, listen: bool = False):
        super().__init__()
        self.listen = listen
        self.counts = {"events": 0, "messages": 0}

    def count(self, *args, **kwargs):
        self.counts["messages"] += 1
        return make_reply("OK") if kwargs else cell_reply("ok", body={})

    def handle_event(self, event_type, fl_ctx):
        if "analytix_log_stats" in event_type:
            self.counts["events"] += 1
        elif event_type == EventType.START_RUN and self.listen:
            engine = fl_ctx.get_engine()
            engine.register_aux_message_handler("trackhub.hello.trackhub_receiver", self.count)
            engine.get_cell().register_request_cb(channel="trackhub", topic="*", cb=self.count)
        elif event_type == EventType.END_RUN:
            with open(os.path.join(os.environ["TRACKHUB_TEST_OUT"], "server-counts.json"), "w") as file:
                json.dump(self.counts, file)


class ServerLogger(Widget):
    '''Logs on the server, with trackhub's writer and as FLARE's own components do.'''

    def __init__(self):
        super().__init__()
        self.round = -1

    def handle_event(self, event_type, fl_ctx):
        if event_type == "_round_started":
            from nvflare.apis.analytix import AnalyticsDataType
            from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
            from trackhub import Writer

            self.round += 1
            with Writer() as writer:
                writer.log({"server/own": self.round + 0.5}, self.round)
            value = self.round + 0.25
            dxo = create_analytic_dxo("server/stock", value, AnalyticsDataType.SCALAR, global_step=self.round)
            with fl_ctx.get_engine().new_context() as ctx:
                send_analytic_dxo(self, dxo, ctx)
"""


def _run(folder: Path, tracking: dict[str, Any], external: bool) -> JobResult:
    on_server = "server" in tracking
    more = f"""
        from server_parts import Counter, ServerLogger
        job.to_server(Counter(listen={not on_server}), id="counter")
        if {on_server}:
            job.to_server(ServerLogger(), id="server_logger")
        """
    job = Job(folder, TRAINER, tracking, external=external, more=more, modules={"server_parts": SERVER_PARTS})
    return job.run()


@pytest.mark.parametrize(
    ("sides", "external"),
    [
        pytest.param(("server",), False, id="server-in_process"),
        pytest.param(("server",), True, id="server-external_process", marks=pytest.mark.long),
        pytest.param(("client",), False, id="client-in_process", marks=pytest.mark.long),
        pytest.param(("client",), True, id="client-external_process", marks=pytest.mark.long),
        pytest.param(("server", "client"), False, id="server+client-in_process", marks=pytest.mark.long),
        pytest.param(("server", "client"), True, id="server+client-external_process"),
    ],
)
def test_every_backend_at_every_receiver_has_exactly_what_was_logged(
    tmp_path: Path, sides: tuple[str, ...], external: bool
) -> None:
    tracking = {name: BACKENDS for side, name in (("server", "server"), ("client", "clients")) if side in sides}
    named: dict[str, Any] = (
        {} if sides == ("server",) else {"name": "lr-0.1", "notes": "a *note*", "tags": ["test", "matrix"]}
    )

    result = _run(tmp_path, {**tracking, **named}, external)

    assert result.rc == 0, result.log[-6000:]
    for receiver in (*(["server"] if "server" in sides else []), *(SITES if "client" in sides else [])):
        _assert_named(result, receiver, **named)
    counts = json.loads((result.out / "server-counts.json").read_text())
    if "server" in sides:
        for site in SITES:
            _assert_has_all(result, "server", site)
        _assert_server_run(result)
        _assert_all_confirmed(result.report("server"), {*SITES, "server", "federation"})
        # The server's own two stock events, before they are taken over; none of a client's.
        assert counts["events"] == 2
    else:
        assert counts == {"events": 0, "messages": 0}
        _assert_nothing_planted(result.workspace / "server")
        assert not (result.run_dir("server") / "trackhub").exists()
    for site in SITES:
        if "client" in sides:
            _assert_has_all(result, site, site)
            _assert_all_confirmed(result.report(site), {site})
        else:
            assert not (result.run_dir(site) / "jsonl").exists()


def _assert_named(
    result: JobResult, receiver: str, name: str = "job", notes: str = "", tags: Sequence[str] = ()
) -> None:
    """The receiver knows the job by its name, so its backends do. By default that is the recipe's name."""
    assert result.report(receiver)["job_name"] == name
    journal = read_journal_meta(result.run_dir(receiver) / "trackhub" / "trackhub.db")
    assert json.loads(journal["job_info"]) == {"id": result.job.id, "name": name, "notes": notes, "tags": list(tags)}
    for site in {*SITES} & ({*SITES} if receiver == "server" else {receiver}):
        spool = read_spool_info(result.run_dir(site) / "trackhub" / "spool")
        assert (spool.job, spool.name, spool.notes, spool.tags) == (result.job.id, name, notes, tuple(tags))


def _assert_has_all(result: JobResult, receiver: str, site: str) -> None:
    facts = result.facts(site)
    assert len(facts) == 2 * (2 * 25 + 2) + 1
    points = result.jsonl_points(receiver, site)
    _assert_points(facts, [p for p in points if "stock" not in p.key], float)
    own = [p for p in points if "stock" not in p.key and p.key != "last"]
    assert [p.round for p in own] == [0] * 52 + [1] * 52

    curves = result.tensorboard_points(receiver, site)
    for key, of_key in _by_key(facts).items():
        _assert_points(of_key, [p for p in curves if p.key == key], _float32, unstepped=0)

    for found in (points, curves):
        stock = sorted((p.key, p.step, p.value) for p in found if p.key.startswith("stock/"))
        assert stock == sorted((key, n, n + value) for key, value in STOCK.items() for n in (0, 1))
        assert sum(p.key.endswith("/stock") for p in found) == 2

    others = [line for line in result.jsonl(receiver, site) if line["kind"] != "metrics"]
    assert [line["kind"] for line in others] == ["params", "tags", "text"]
    assert others[0]["values"] == {"lr": 0.1, "site": site}


def _assert_points(facts: list[Fact], points: list[Point], store: Any, unstepped: int | None = None) -> None:
    """Each fact is a point, in order, with its step and value, and a time within the clock readings around the call."""
    assert [p.key for p in points] == [f.key for f in facts]
    assert [p.step for p in points] == [unstepped if f.step is None else f.step for f in facts]
    for point, fact in zip(points, facts, strict=True):
        expected = store(fact.value)
        value = float(point.value)
        assert value == expected or (math.isnan(value) and math.isnan(expected))
        assert fact.before <= point.time <= fact.after


def _by_key(facts: list[Fact]) -> dict[str, list[Fact]]:
    grouped = defaultdict(list)
    for fact in facts:
        grouped[fact.key].append(fact)
    return grouped


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _assert_server_run(result: JobResult) -> None:
    found = result.jsonl_points("server", "server")
    assert all(p.round == p.step for p in found)
    points = [(p.key, p.step, p.value) for p in found]
    assert sorted(points) == sorted(
        (key, n, n + v) for key, v in (("server/own", 0.5), ("server/stock", 0.25)) for n in (0, 1)
    )


def _assert_nothing_planted(server: Path) -> None:
    needles = (
        b"planted/secret_metric",
        b"31337.42",
        struct.pack("<d", PLANTED_VALUE),
        struct.pack("<f", PLANTED_VALUE),
    )
    assert list(files_with(server, *needles)) == []


def _assert_all_confirmed(report: dict[str, Any], sites: set[str]) -> None:
    assert report["balanced"]
    assert report["status"] == "finished"
    assert set(report["sites"]) == sites
    for site, counts in report["sites"].items():
        assert counts["final"]
        assert counts["at_site"]["logged"] == counts["journaled"] > 0
        for lane in report["lanes"].values():
            assert lane[site]["confirmed"] == counts["journaled"]
            assert lane[site]["state"] == "finished"
