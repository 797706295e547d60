# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of one process at a random moment. `make test` runs a few seeds of each test, `make faults` runs fifty."""

from __future__ import annotations

import random

import pytest

from tests.faults.conftest import MakeJob
from tests.faults.independent_readers import count_receiver
from tests.faults.job_processes import JobProcesses
from tests.faults.process import wait_for

SEEDS = [pytest.param(seed, marks=[] if seed < 2 else pytest.mark.long) for seed in range(50)]
EVERY_KIND = ("resumable", "idempotent", "rebuild", "at_least_once", "buffered", "jsonl", "tensorboard")
CALLS = 1000
WAITS_AT = 900
"""The call before which a trainer waits that must not end before the kill; see `JobProcesses.go`."""
ENDLESS = 50_000
"""Calls of a trainer that is killed before it can make them all."""


def some_backends(seed: int) -> dict[str, dict[str, object]]:
    """Return ``jsonl`` and one backend of another kind, which changes with the seed."""
    return {"jsonl": {}, EVERY_KIND[seed % len(EVERY_KIND)]: {}}


def reach(job: JobProcesses, chance: random.Random, name: str = "a", least: int = 1, most: int = WAITS_AT) -> None:
    """Wait for a random moment of the training at which the receiver has a part of the records."""
    target = chance.randrange(least, most)
    wait_for(lambda: job.count(name) >= target, f"{target} calls")
    wait_for(lambda: job.journal.exists() and count_receiver(job.journal), "the first records to be journaled")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_trainer_loses_no_call_that_had_returned(make_job: MakeJob, seed: int) -> None:
    chance = random.Random(seed)
    job = make_job(some_backends(seed), files=seed % 2 == 0)
    receiver, sender = job.receiver(), job.sender()
    trainer = job.trainer("a", calls=ENDLESS)

    reach(job, chance)
    trainer.kill()
    assert trainer.wait() == -9
    job.in_doubt = 1
    if seed % 2:  # a user, or FLARE's launcher, starts it again
        assert job.trainer("b", calls=200).wait() == 0
    job.end(sender, receiver)

    job.check_all_delivered()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_sender_loses_nothing(make_job: MakeJob, seed: int) -> None:
    chance = random.Random(seed)
    job = make_job(some_backends(seed), files=seed % 2 == 0)
    receiver, sender = job.receiver(), job.sender(ack_loss=0.2, seed=seed)
    trainers = [job.trainer(name, calls=CALLS, wait_at=WAITS_AT) for name in "ab"]

    reach(job, chance)
    sender.kill()
    assert sender.wait() == -9
    assert job.count("a") < CALLS
    job.go("a", "b")
    if seed % 2:
        sender = job.sender()
    for trainer in trainers:
        assert trainer.wait() == 0, trainer.log
    job.end(sender if seed % 2 else None, receiver)

    job.check_equations()
    job.replay_all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_receiver_loses_nothing(make_job: MakeJob, seed: int) -> None:
    chance = random.Random(seed)
    job = make_job(some_backends(seed), files=seed % 2 == 0)
    receiver, sender = job.receiver(), job.sender()
    trainer = job.trainer("a", calls=CALLS, wait_at=WAITS_AT)

    reach(job, chance)
    receiver.kill()
    assert receiver.wait() == -9
    assert job.count("a") < CALLS
    job.go("a")
    if seed % 2:
        receiver = job.receiver()
    assert trainer.wait() == 0, trainer.log
    job.end(sender, receiver if seed % 2 else None, sites_s=None if seed % 2 else 0.5)

    job.check_equations()
    job.replay_all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_receiver_that_dies_during_a_commit_loses_nothing(make_job: MakeJob, seed: int) -> None:
    chance = random.Random(seed)
    job = make_job(some_backends(seed), durability="full" if seed % 5 == 0 else "normal")
    trainer = job.trainer("a", calls=CALLS)
    receiver = job.receiver(kill_at_commit=chance.randrange(4, 40), kill_after_us=chance.uniform(0, 300))
    sender = job.sender()

    assert receiver.wait() == -9, receiver.log
    assert trainer.wait() == 0, trainer.log
    job.check_equations()
    receiver = job.receiver()
    job.end(sender, receiver)

    job.check_all_delivered()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lane_that_dies_between_write_and_confirm_loses_and_repeats_nothing(make_job: MakeJob, seed: int) -> None:
    chance = random.Random(seed)
    kind = EVERY_KIND[seed % len(EVERY_KIND)]
    job = make_job({kind: {}}, files=kind != "tensorboard")
    method = chance.choice(["write", "flush"]) if kind in ("rebuild", "buffered") else "write"
    trainer = job.trainer("a", calls=600)
    # The suite's stores take 100 records in a write. The others may take all records in one.
    number = chance.randrange(1, 5) if kind not in ("jsonl", "tensorboard") and method == "write" else 1
    receiver = job.receiver(kill_at_write=(kind, method, number))
    sender = job.sender()

    assert receiver.wait() == -9, receiver.log
    assert trainer.wait() == 0, trainer.log
    job.check_equations()
    if seed % 2:
        job.end(sender, job.receiver())
    else:
        job.end(sender, sites_s=0.5)

    job.check_equations()
    job.replay_all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replay_that_is_killed_again_and_again_delivers_everything_once(make_job: MakeJob, seed: int) -> None:
    chance = random.Random(seed)
    kind = EVERY_KIND[seed % len(EVERY_KIND)]
    job = make_job({})
    assert job.trainer("a", calls=1000).wait() == 0
    receiver, sender = job.receiver(), job.sender()
    job.end(sender, receiver)
    options = {} if kind in ("jsonl", "tensorboard") else {"pause_s": 0.001}
    job.backends = {kind: options}
    flags = ["--backend", kind, *(f for k, v in options.items() for f in ("--option", f"{kind}.{k}={v}"))]

    killed = 0
    for _ in range(3):
        replay = job.replay(*flags)
        held = len(job.held(kind))
        target = chance.randrange(held, held + (1000 - held) // 2 + 1)
        wait_for(lambda: len(job.held(kind)) > target or not replay.is_alive(), f"{target} records")  # noqa: B023
        replay.kill()
        killed += replay.wait() == -9
        job.check_equations()

    assert killed or not options  # without a pause, the replay may end before the test looks
    job.replay_all(*flags)
