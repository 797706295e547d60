# SPDX-License-Identifier: Apache-2.0
"""Backends that are down, busy, slow, hung, wrong or gone: they harm neither the job nor each other."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MakeWorld
from tests.faults.harness import wait_for

CALLS = 600
SEEDS = [pytest.param(seed, marks=[] if seed < 1 else pytest.mark.long) for seed in range(10)]


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def runs(report: dict[str, Any], site: str = "site-1") -> dict[str, dict[str, Any]]:
    return {name: lane[site] for name, lane in report["lanes"].items()}


def test_dead_backends_cost_the_deadline_and_lose_nothing_that_a_replay_does_not_bring(make_world: MakeWorld) -> None:
    """Hangs for good, 1 record/s, dies in the middle, refuses everything from the middle on, and two servers away."""
    world = make_world(
        {"jsonl": {}, "http_late": {"url": free_url()}, "http_outage": {"url": free_url()}}, deadline_s=2
    )
    hang = world.folder / "hang"
    hang.touch()
    world.backends |= {
        "hangs": {"hang_while": str(hang)},
        "slow": {"pause_s": 1, "max_batch": 1},
        "dies": {"dies_at": 3},
        "gone": {"dies_at": 3, "permanent": True},
    }
    outage = world.peer("http_outage")
    trainer = world.trainer(calls=CALLS)
    receiver, sender = world.receiver(), world.sender()
    wait_for(lambda: world.count() >= CALLS // 2 and world.held("http_outage"), "half of the calls")
    outage.kill()
    assert trainer.wait() == 0, trainer.log

    answer = world.end(sender, receiver)

    assert set(answer["threads"]) <= {"trackhub-lane-hangs", "trackhub-lane-slow"}
    world.check_equations()
    run = runs(answer["report"])
    assert answer["report"]["balanced"]
    assert run["jsonl"]["confirmed"] == CALLS
    assert (run["hangs"]["confirmed"], run["hangs"]["pending"]) == (0, CALLS)
    assert "has not returned" in run["hangs"]["last_error"]
    assert run["slow"]["confirmed"] <= len(world.held("slow")) < 60
    assert (0 < run["dies"]["confirmed"] <= 200, run["dies"]["rejected"]) == (True, {})
    assert run["http_late"]["pending"] == CALLS
    assert "no answer" in run["http_outage"]["last_error"]
    rejected = run["gone"]["rejected"]
    assert rejected == {"permanent_error": CALLS - run["gone"]["confirmed"]}

    hang.unlink()
    world.peer("http_late")
    world.peer("http_outage")
    flags = world.flags(slow={"pause_s": 0, "max_batch": 100}, dies={"dies_at": 0})
    world.replay_all(*flags, lost={"gone": {"a": CALLS - run["gone"]["confirmed"]}})


@pytest.mark.parametrize("seed", SEEDS)
def test_servers_with_faults_get_every_record_once_before_the_job_ends(make_world: MakeWorld, seed: int) -> None:
    """Down at start, killed and started again, 429 with Retry-After, 500 after applying, hung calls, rejections."""
    chance = random.Random(seed)
    names = ["http_late", "http_restarted", "http_busy", "http_fails", "http_hangs", "http_rejects"]
    world = make_world({"jsonl": {}, **{name: {"url": free_url()} for name in names}}, deadline_s=60)
    restarted = world.peer("http_restarted")
    world.peer("http_busy", f"busy {chance.randrange(2, 4)}")
    world.peer("http_fails", f"fail {chance.randrange(2, 4)}")
    world.peer("http_hangs", f"hang {chance.randrange(3, 5)}")
    world.peer("http_rejects", "reject 7")
    trainer = world.trainer(calls=CALLS)
    receiver, sender = world.receiver(), world.sender()
    target = chance.randrange(CALLS)
    wait_for(lambda: world.count() >= target, f"{target} calls")
    restarted.kill()
    assert trainer.wait() == 0, trainer.log
    world.peer("http_late")
    world.peer("http_restarted")

    answer = world.end(sender, receiver)

    assert answer["threads"] == []
    sevenths = -(-CALLS // 7)
    assert runs(answer["report"])["http_rejects"]["rejected"] == {"seventh": sevenths}
    assert_waits_as_asked(world.folder / "peer-http_busy" / "requests")
    world.check_all_delivered(lost={"http_rejects": {"a": sevenths}})


def assert_waits_as_asked(requests: Path) -> None:
    asked = [line.split() for line in requests.read_text().splitlines()]
    writes = [(float(at), status) for at, path, status in asked if path == "/write"]
    busy = [i for i, (_, status) in enumerate(writes) if status == "429"]
    assert busy
    for i in busy:
        assert writes[i + 1][0] - writes[i][0] >= 1.0


def test_what_a_backend_stored_before_it_failed_is_there_once_or_counted(make_world: MakeWorld) -> None:
    kinds = ("idempotent", "resumable", "rebuild", "at_least_once", "buffered")
    world = make_world({kind: {"fail_after_applying": 3, "max_batch": 40} for kind in kinds}, files=True)
    trainer = world.trainer(calls=CALLS)
    receiver, sender = world.receiver(), world.sender()
    assert trainer.wait() == 0, trainer.log

    answer = world.end(sender, receiver)

    world.check_all_delivered()
    held = world.held("at_least_once")
    twice = len(held) - len(set(held))
    assert 0 < twice == runs(answer["report"])["at_least_once"]["possible_duplicates"]
