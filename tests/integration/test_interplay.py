# SPDX-License-Identifier: Apache-2.0
"""Beside FLARE's own tracking, under floods of records, and where the simulator replaces its client processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.harness import Job, JobResult, read_tensorboard
from tests.integration.test_matrix import SERVER_PARTS

SITES = ("site-1", "site-2")


def test_with_take_over_off_flares_own_receivers_work_beside_trackhub(tmp_path: Path) -> None:
    trainer = """
    from nvflare.client.tracking import SummaryWriter
    from trackhub import Writer

    writer, stock = Writer(), SummaryWriter()

    def train(n):
        fact(lambda: writer.log({"ours": n}, n), {"ours": n}, n)
        stock.add_scalar("stock", n + 0.5, n)

    rounds(train)
    """
    more = """
    from nvflare.recipe.utils import add_experiment_tracking
    from server_parts import Counter
    add_experiment_tracking(recipe, "tensorboard", {"tb_folder": "stock_events"}, client_side=True)
    job.to_server(Counter(), id="counter")
    """
    tracking = {"server": ["jsonl"], "clients": ["jsonl"], "take_over": False}

    result = Job(tmp_path, trainer, tracking, more=more, modules={"server_parts": SERVER_PARTS}).run()

    assert result.rc == 0, result.log[-6000:]
    for site in SITES:
        for receiver in ("server", site):
            assert [(p.key, p.step, p.value) for p in result.jsonl_points(receiver, site)] == [
                ("ours", 0, 0.0),
                ("ours", 1, 1.0),
            ]
            stock = read_tensorboard(result.run_dir(receiver) / "stock_events" / site)
            assert [(p.key, p.step, p.value) for p in stock] == [("stock", 0, 0.5), ("stock", 1, 1.5)]
    # With tracking at the clients only, the matrix counts 0 events. This shows that the counter does count.
    assert json.loads((result.out / "server-counts.json").read_text())["events"] == 4


BURST = """
from trackhub import Writer

writer = Writer()
COUNT = int(os.environ["BURST"])


def train(n):
    for i in range(COUNT):
        writer.log({"a": i / 3}, i)


rounds(train)
time.sleep(float(os.environ["PAUSE"]))
writer.log({"last": 1.0})
"""


@pytest.mark.parametrize(
    ("external", "count", "pause_s"),
    [
        pytest.param(True, 5_000, 0, id="external_process-5000"),
        pytest.param(False, 50_000, 6, id="in_process-50000", marks=pytest.mark.long),
        pytest.param(True, 50_000, 6, id="external_process-50000", marks=pytest.mark.long),
    ],
)
def test_a_flood_of_records_arrives_whole_in_order_and_once(
    tmp_path: Path, external: bool, count: int, pause_s: float
) -> None:
    """So does the last line of the script. The job is written in JSON, and is called as its ``meta.json`` says."""
    env = {"BURST": str(count), "PAUSE": str(pause_s)}

    tracking = {"server": ["jsonl"], "name": None if external else "burst"}

    result = Job(tmp_path, BURST, tracking, way="json", external=external, rounds=1, env=env).run()

    assert result.rc == 0, result.log[-6000:]
    report = result.report("server")
    assert report["balanced"]
    for site in SITES:
        points = result.jsonl_points("server", site)
        assert [(p.key, p.step, p.value) for p in points] == [
            *(("a", i, i / 3) for i in range(count)),
            ("last", None, 1.0),
        ]
        assert report["lanes"]["jsonl"][site]["confirmed"] == count + 1


@pytest.mark.long
@pytest.mark.parametrize("tracking", [{"server": ["jsonl"]}, {"clients": ["jsonl"]}], ids=["server", "client"])
def test_records_survive_a_simulator_that_runs_its_clients_in_turns(
    tmp_path: Path, tracking: dict[str, list[str]]
) -> None:
    trainer = """
    from trackhub import Writer

    def train(n):
        with Writer() as writer:
            for i in range(200):
                values = {"a": n + i / 3}
                fact(lambda: writer.log(values, i), values, i)

    rounds(train)
    """

    result = Job(tmp_path, trainer, tracking, n_clients=3, threads=1).run()

    assert result.rc == 0, result.log[-6000:]
    for site in ("site-1", "site-2", "site-3"):
        noted = sorted((f.step or 0, f.value) for f in result.facts(site))
        assert len(noted) == 400
        assert sorted(_journaled(result, "server" if "server" in tracking else site, site)) == noted


def _journaled(result: JobResult, receiver: str, site: str) -> list[tuple[int, float]]:
    return [(p.step or 0, p.value) for p in result.jsonl_points(receiver, site)]
