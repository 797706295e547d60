# SPDX-License-Identifier: Apache-2.0
"""Jobs with consumers of FLARE's analytics events of their own, and jobs in which a site has no sender."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import Job, JobResult, Point, read_jsonl, read_tensorboard

TRAINER = """
from nvflare.client.tracking import SummaryWriter

writer = SummaryWriter()
rounds(lambda n: [writer.add_scalar("a", n + i / 8, 5 * n + i) for i in range(5)])
"""

COLLECTOR = """
import json, os
from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.widgets.widget import Widget


class Collector(Widget):
    '''Writes down what it gets, as a user's own component does.'''

    def __init__(self, event="fed.analytix_log_stats"):
        super().__init__()
        self.event = event

    def handle_event(self, event_type, fl_ctx):
        if event_type == self.event:
            data = from_shareable(fl_ctx.get_prop(FLContextKey.EVENT_DATA)).data
            name = fl_ctx.get_identity_name() + ".collected"
            with open(os.path.join(os.environ["TRACKHUB_TEST_OUT"], name), "a") as file:
                file.write(json.dumps([data["track_key"], data["track_value"], data["global_step"]]) + "\\n")
"""

MORE = """
from nvflare.app_opt.tracking.tb.tb_receiver import TBAnalyticsReceiver
from collector_parts import Collector

job.to_server(TBAnalyticsReceiver(tb_folder="own"), id="stock")
job.to_server(Collector(), id="collector")
job.to(Collector(event="analytix_log_stats"), "site-1", id="at_client")
# As where somebody adds tracking by hand, and forgets a site.
del job._deploy_map["site-2"].app_config.components["trackhub_sender"]
"""

CALLS: Counter[tuple[int, float]] = Counter((5 * n + i, n + i / 8) for n in (0, 1) for i in range(5))


def _counted(points: list[Point]) -> Counter[tuple[int, float]]:
    return Counter((point.step or 0, point.value) for point in points if point.key == "a")


def _collected(result: JobResult, name: str) -> Counter[tuple[int, float]]:
    rows: Any = read_jsonl(result.out / f"{name}.collected")
    return Counter((step, value) for _, value, step in rows)


@pytest.mark.parametrize(
    "external", [False, pytest.param(True, marks=pytest.mark.long)], ids=["in_process", "external"]
)
def test_with_copy_all_consumers_get_all_and_a_site_without_sender_is_recorded(tmp_path: Path, external: bool) -> None:
    """The consumers of both sites get everything once, trackhub too, and the report names the site without a sender."""
    tracking = {"server": ["jsonl", "tensorboard"], "take_over": "copy"}

    result = Job(
        tmp_path, TRAINER, tracking, more=MORE, modules={"collector_parts": COLLECTOR}, own_apps=True, external=external
    ).run()

    assert result.rc == 0, result.log[-6000:]
    for site in ("site-1", "site-2"):
        assert _counted(result.jsonl_points("server", site)) == CALLS
        assert _counted(result.tensorboard_points("server", site)) == CALLS
        stock = read_tensorboard(result.run_dir("server") / "own" / site)
        assert Counter((point.step or 0, point.value) for point in stock) == CALLS
    assert (
        _collected(result, "server" if (result.out / "server.collected").exists() else "simulator_server")
        == CALLS + CALLS
    )
    if not external:
        assert _collected(result, "site-1") == CALLS
    sites = result.report("server")["sites"]
    assert [(s["has_sender"], s["counted"]) for s in (sites["site-1"], sites["site-2"])] == [
        (True, "final"), (False, "incomplete"),
    ]  # fmt: skip
    assert sites["site-2"]["at_site"]["by_message"] == 10
    assert {point.round for point in result.jsonl_points("server", "site-2")} == {None}  # nobody knows it
    assert "site site-2 has no TrackhubSender in its app" in result.log
    assert "final message of" not in result.log  # nobody waited for it
    assert result.log.count("received unknown aux message topic") == 1  # FLARE's own line, at the site without a sender
    assert read_jsonl(result.jsonl_file("server", "site-2"))[-1]["status"] == "finished"


@pytest.mark.long
def test_a_listener_at_a_client_gets_everything_and_trackhub_too(tmp_path: Path) -> None:
    more = """
    from collector_parts import Collector
    job.to_clients(Collector(event="analytix_log_stats"), id="at_client")
    """

    result = Job(tmp_path, TRAINER, {"server": ["jsonl"]}, more=more, modules={"collector_parts": COLLECTOR}).run()

    assert result.rc == 0, result.log[-6000:]
    for site in ("site-1", "site-2"):
        assert _counted(result.jsonl_points("server", site)) == CALLS
        assert _collected(result, site) == CALLS
