# SPDX-License-Identifier: Apache-2.0
"""Scripts that log with FLARE's own writers, unedited: no call is lost, none comes twice, and each has its own time.

So it is in process and in external trainers, also after the last round, and when the trainer is killed. Where trackhub
cannot be in the trainer, FLARE's messages carry the calls, and the report says so.
"""

from __future__ import annotations

import json
import os
import venv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import Job, JobResult, files_with
from tests.integration.test_matrix import SERVER_PARTS

SITES = ("site-1", "site-2")

TRAINER = """
import threading
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.client.tracking import MLflowWriter, SummaryWriter, WandBWriter

tensorboard, wandb, mlflow = SummaryWriter(), WandBWriter(), MLflowWriter()
CALLS, THREADS = int(os.environ["CALLS"]), 3
mlflow.log_params({"lr": 0.1, "site": SITE})


def log(step):
    value = step / 7
    if step % 4 == 0:
        fact(lambda: tensorboard.add_scalar("a", value, step), {"a": value}, step)
    elif step % 4 == 1:
        fact(lambda: wandb.log({"b": value, "c": 1.0}, step), {"b": value, "c": 1.0}, step)
    elif step % 4 == 2:
        fact(lambda: mlflow.log_metric("d", value, step), {"d": value}, step)
    else:
        fact(lambda: flare.log("e", value, AnalyticsDataType.SCALAR, global_step=step), {"e": value}, step)


def train(n):
    for i in range(CALLS):
        log(n * CALLS + i)
    threads = [
        threading.Thread(target=lambda t=t: [tensorboard.add_scalar(f"thread/{t}", n + i / 7, i) for i in range(200)])
        for t in range(THREADS)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]


rounds(train)
assert not flare.is_running()
for i in range(2 * CALLS, 2 * CALLS + 500):
    log(i)
"""


def _assert_whole(result: JobResult, calls: int, receiver: str = "server") -> None:
    """Every call is there once, in its order, with its value, step and round, and the time of the call."""
    report = result.report(receiver)
    assert report["balanced"]
    for site in SITES if receiver == "server" else (receiver,):
        counts = report["sites"][site]["at_site"]
        assert (counts["at_source"], counts["by_message"], counts["dropped"]) == (True, 0, {})
        points = result.jsonl_points(receiver, site)
        main = [p for p in points if not p.key.startswith("thread/")]
        facts = result.facts(site)
        assert len({f.step for f in facts}) == 2 * calls + 500
        assert [(p.key, p.value, p.step) for p in main] == [(f.key, f.value, f.step) for f in facts]
        assert all(f.before <= p.time <= f.after for p, f in zip(main, facts, strict=True))
        assert {(p.round, (p.step or 0) < calls) for p in main[: calls // 2]} == {(0, True)}
        for thread in range(3):
            of_thread = [(p.step, p.value) for p in points if p.key == f"thread/{thread}"]
            assert of_thread == [(i, n + i / 7) for n in (0, 1) for i in range(200)]
        (params,) = [line for line in result.jsonl(receiver, site) if line["kind"] == "params"]
        assert params["values"] == {"lr": 0.1, "site": site}


@pytest.mark.parametrize("mode", ["in_process", "external_killed", pytest.param("external", marks=pytest.mark.long)])
def test_no_call_of_flares_own_writers_is_lost(tmp_path: Path, mode: str) -> None:
    end = "os.kill(os.getpid(), 9)\n" if mode == "external_killed" else ""

    result = Job(
        tmp_path, TRAINER + end, {"server": ["jsonl"]}, external=mode != "in_process", env={"CALLS": "3000"}
    ).run()  # fmt: skip

    assert result.rc == 0, result.log[-6000:]
    _assert_whole(result, 3000)


RANKS = """
import subprocess, sys, threading
from nvflare.client.tracking import SummaryWriter

assert sys.modules["sitecustomize"].__file__ == os.environ["OWN"] and sys.own_was_run == 1
assert not any(path.endswith("startup") for path in sys.path)
RANK = '''
import os, sys
import nvflare.client as flare
from nvflare.client.tracking import SummaryWriter
flare.init(rank=sys.argv[1])
os.environ.clear()
writer = SummaryWriter()
for i in range(500):
    writer.add_scalar("rank/" + sys.argv[1], i / 7, i)
'''
ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank)]) for rank in (1, 2)]
assert [rank.wait() for rank in ranks] == [0, 0]
os.environ.clear()
rounds(lambda n: SummaryWriter().add_scalar("rank/0", n + 0.5, n))
"""


def test_ranks_a_sitecustomize_of_the_users_and_a_cleared_environment(tmp_path: Path) -> None:
    own = tmp_path / "own" / "sitecustomize.py"
    own.parent.mkdir()
    own.write_text("import sys\nsys.own_was_run = getattr(sys, 'own_was_run', 0) + 1\n")
    env = {"PYTHONPATH": str(own.parent), "OWN": str(own)}

    result = Job(tmp_path / "job", RANKS, {"clients": ["jsonl"]}, external=True, env=env).run()

    assert result.rc == 0, result.log[-6000:]
    for site in SITES:
        points = result.jsonl_points(site, site)
        assert [(p.step, p.value) for p in points if p.key == "rank/0"] == [(0, 0.5), (1, 1.5)]
        for rank in (1, 2):
            assert [(p.step, p.value) for p in points if p.key == f"rank/{rank}"] == [(i, i / 7) for i in range(500)]


PLANTED = """
from nvflare.client.tracking import SummaryWriter

KEY = "".join(reversed("cirtem_terces/detnalp"))
writer = SummaryWriter()
rounds(lambda n: [writer.add_scalar(KEY, n + i / 8, i) for i in range(20)])
"""
COUNTER = 'from server_parts import Counter\njob.to_server(Counter(listen=True), id="counter")\n'


def test_a_trainer_without_trackhub_is_recorded_from_messages_and_the_report_says_so(tmp_path: Path) -> None:
    """Its records still do not reach the server, since tracking is at the clients only."""
    venv.create(tmp_path / "venv", symlinks=True)
    env = {"PATH": os.pathsep.join([str(tmp_path / "venv" / "bin"), os.environ["PATH"]])}

    result = Job(
        tmp_path / "job", PLANTED, {"clients": ["jsonl"]}, external=True, env=env, more=COUNTER,
        modules={"server_parts": SERVER_PARTS},
    ).run()  # fmt: skip

    assert result.rc == 0, result.log[-6000:]
    assert json.loads((result.out / "server-counts.json").read_text()) == {"events": 0, "messages": 0}
    assert list(files_with(result.workspace / "server", b"planted/secret_metric")) == []
    for site in SITES:
        counts = result.report(site)["sites"][site]["at_site"]
        assert (counts["at_source"], counts["by_message"], counts["logged"]) == (True, 40, 40)
        points = Counter((p.key, p.step, p.value) for p in result.jsonl_points(site, site))
        assert points == Counter(("planted/secret_metric", i, n + i / 8) for n in (0, 1) for i in range(20))
    assert "40 came in FLARE's messages, which are not counted at their source" in result.log


@pytest.mark.long
@pytest.mark.parametrize("external", [False, True], ids=["in_process", "external"])
def test_a_job_can_leave_the_trainer_as_it_is(tmp_path: Path, external: bool) -> None:
    trainer = """
    import sys
    from nvflare.client.tracking import SummaryWriter

    assert "TRACKHUB_TAKE_OVER" not in os.environ
    writer = SummaryWriter()
    rounds(lambda n: writer.add_scalar("a", n + 0.5, n))
    """
    tracking: dict[str, Any] = {"server": ["jsonl"], "take_over": "events"}

    result = Job(tmp_path, trainer, tracking, external=external).run()

    assert result.rc == 0, result.log[-6000:]
    for site in SITES:
        counts = result.report("server")["sites"][site]["at_site"]
        assert (counts["at_source"], counts["by_message"]) == (False, 2 if external else 0)
        assert sorted((p.step, p.value) for p in result.jsonl_points("server", site)) == [(0, 0.5), (1, 1.5)]


@pytest.mark.long
def test_a_receiver_of_flares_own_at_the_client_still_gets_its_events(tmp_path: Path) -> None:
    trainer = """
    from nvflare.client.tracking import SummaryWriter

    writer = SummaryWriter()
    rounds(lambda n: writer.add_scalar("a", n + 0.5, n))
    """
    more = """
    from nvflare.app_opt.tracking.tb.tb_receiver import TBAnalyticsReceiver
    job.to_clients(TBAnalyticsReceiver(tb_folder="own", events=["analytix_log_stats"]), id="own")
    """

    result = Job(tmp_path, trainer, {"server": ["jsonl"]}, more=more).run()

    assert result.rc == 0, result.log[-6000:]
    for site in SITES:
        assert not result.report("server")["sites"][site]["at_site"]["at_source"]
        assert len(result.jsonl_points("server", site)) == 2
        assert list((result.run_dir(site) / "own").rglob("events*"))
