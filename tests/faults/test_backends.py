# SPDX-License-Identifier: Apache-2.0
"""Backends that are down, busy, slow or gone, or that hang: they harm neither the job nor each other."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MakeJob
from tests.faults.process import wait_for

CALLS = 600
SEEDS = [pytest.param(seed, marks=[] if seed < 1 else pytest.mark.long) for seed in range(10)]


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def runs(report: dict[str, Any], site: str = "site-1") -> dict[str, dict[str, Any]]:
    return {name: lane[site] for name, lane in report["lanes"].items()}


def test_dead_backends_cost_the_deadline_and_a_replay_delivers_the_rest(make_job: MakeJob) -> None:
    """One hangs, one takes a record a second, one dies, one refuses everything after a while, two servers are away."""
    job = make_job({"jsonl": {}, "http_late": {"url": free_url()}, "http_outage": {"url": free_url()}}, deadline_s=2)
    hang = job.folder / "hang"
    hang.touch()
    job.backends |= {
        "hangs": {"hang_while": str(hang)},
        "slow": {"pause_s": 1, "max_batch": 1},
        "dies": {"dies_at": 3},
        "gone": {"dies_at": 3, "permanent": True},
    }
    outage = job.tracking_server("http_outage")
    trainer = job.trainer(calls=CALLS)
    receiver, sender = job.receiver(), job.sender()
    wait_for(lambda: job.count() >= CALLS // 2 and job.held("http_outage"), "half of the calls")
    outage.kill()
    assert trainer.wait() == 0, trainer.log

    answer = job.end(sender, receiver)

    assert set(answer["threads"]) <= {"trackhub-lane-hangs", "trackhub-lane-slow"}
    job.check_equations()
    run = runs(answer["report"])
    assert answer["report"]["balanced"]
    assert run["jsonl"]["confirmed"] == CALLS
    assert (run["hangs"]["confirmed"], run["hangs"]["pending"]) == (0, CALLS)
    assert "has not returned" in run["hangs"]["last_error"]
    assert run["slow"]["confirmed"] <= len(job.held("slow")) < 60
    assert (0 < run["dies"]["confirmed"] <= 200, run["dies"]["rejected"]) == (True, {})
    assert run["http_late"]["pending"] == CALLS
    assert "no reply" in run["http_outage"]["last_error"]
    rejected = run["gone"]["rejected"]
    assert rejected == {"permanent_error": CALLS - run["gone"]["confirmed"]}

    hang.unlink()
    job.tracking_server("http_late")
    job.tracking_server("http_outage")
    flags = job.flags(slow={"pause_s": 0, "max_batch": 100}, dies={"dies_at": 0})
    job.replay_all(*flags, lost={"gone": {"a": CALLS - run["gone"]["confirmed"]}})


@pytest.mark.parametrize("seed", SEEDS)
def test_servers_with_faults_get_every_record_once_before_the_job_ends(make_job: MakeJob, seed: int) -> None:
    """Down at the start, killed and started again, 429 with Retry-After, 500 after storing, hung calls, rejections."""
    chance = random.Random(seed)
    names = ["http_late", "http_restarted", "http_busy", "http_fails", "http_hangs", "http_rejects"]
    job = make_job({"jsonl": {}, **{name: {"url": free_url()} for name in names}}, deadline_s=60)
    restarted = job.tracking_server("http_restarted")
    job.tracking_server("http_busy", f"busy {chance.randrange(2, 4)}")
    job.tracking_server("http_fails", f"fail {chance.randrange(2, 4)}")
    job.tracking_server("http_hangs", f"hang {chance.randrange(3, 5)}")
    job.tracking_server("http_rejects", "reject 7")
    trainer = job.trainer(calls=CALLS)
    receiver, sender = job.receiver(), job.sender()
    target = chance.randrange(CALLS)
    wait_for(lambda: job.count() >= target, f"{target} calls")
    restarted.kill()
    assert trainer.wait() == 0, trainer.log
    job.tracking_server("http_late")
    job.tracking_server("http_restarted")

    answer = job.end(sender, receiver)

    assert answer["threads"] == []
    sevenths = -(-CALLS // 7)
    assert runs(answer["report"])["http_rejects"]["rejected"] == {"seventh": sevenths}
    assert_waits_as_asked(job.folder / "tracking-server-http_busy" / "requests")
    job.check_all_delivered(lost={"http_rejects": {"a": sevenths}})


def assert_waits_as_asked(requests: Path) -> None:
    asked = [line.split() for line in requests.read_text().splitlines()]
    writes = [(float(at), status) for at, path, status in asked if path == "/write"]
    busy = [i for i, (_, status) in enumerate(writes) if status == "429"]
    assert busy
    for i in busy:
        assert writes[i + 1][0] - writes[i][0] >= 1.0


def test_what_a_backend_stored_before_it_failed_is_there_once_or_counted(make_job: MakeJob) -> None:
    kinds = ("idempotent", "resumable", "rebuild", "at_least_once", "buffered")
    job = make_job({kind: {"fail_after_applying": 3, "max_batch": 40} for kind in kinds}, files=True)
    trainer = job.trainer(calls=CALLS)
    receiver, sender = job.receiver(), job.sender()
    assert trainer.wait() == 0, trainer.log

    answer = job.end(sender, receiver)

    job.check_all_delivered()
    held = job.held("at_least_once")
    twice = len(held) - len(set(held))
    assert 0 < twice == runs(answer["report"])["at_least_once"]["possible_duplicates"]
