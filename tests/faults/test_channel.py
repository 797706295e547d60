# SPDX-License-Identifier: Apache-2.0
"""A channel that loses, repeats and delays messages, or is silent, and a receiver that refuses a batch."""

from __future__ import annotations

import time

import pytest

from tests.faults.conftest import MakeJob
from tests.faults.independent_readers import count_receiver
from tests.faults.process import wait_for

CALLS = 1500
SEEDS = [pytest.param(seed, marks=[] if seed < 1 else pytest.mark.long) for seed in range(10)]


@pytest.mark.parametrize("seed", SEEDS)
def test_with_30_percent_of_the_acks_lost_each_record_is_there_once(make_job: MakeJob, seed: int) -> None:
    job = make_job({"jsonl": {}, "at_least_once": {}}, files=True, sites_s=30)
    trainer = job.trainer(calls=CALLS)
    receiver, sender = job.receiver(), job.sender(ack_loss=0.3, seed=seed)
    assert trainer.wait() == 0, trainer.log

    job.end(sender, receiver, sites_s=30)

    job.check_all_delivered()
    here = count_receiver(job.journal)["site-1"]
    assert (here.journaled, here.duplicates > 0) == (CALLS, True)
    assert len(job.held("at_least_once")) == CALLS


def test_batches_that_arrive_again_later_are_recognised(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}})
    trainers = [job.trainer(name, calls=500) for name in ("a", "b")]
    receiver, sender = job.receiver(), job.sender(again=1.0)
    for trainer in trainers:
        assert trainer.wait() == 0, trainer.log

    job.end(sender, receiver)

    job.check_all_delivered()
    here = count_receiver(job.journal)["site-1"]
    assert here.received == 1000 + here.duplicates
    assert here.duplicates > 0


@pytest.mark.parametrize(
    ("silent_s", "barrier_s"), [(2.5, 0.5), pytest.param(30.0, 10.0, marks=pytest.mark.long)], ids=["short", "30s"]
)
def test_a_site_waits_once_for_a_silent_receiver_and_then_goes_on(
    make_job: MakeJob, silent_s: float, barrier_s: float
) -> None:
    job = make_job({"jsonl": {}}, barrier_s=barrier_s, request_s=0.5)
    receiver, sender = job.receiver(), job.sender(silent_from=8, silent_s=silent_s)
    trainer = job.trainer(calls=CALLS)
    assert trainer.wait() == 0, trainer.log

    began = time.monotonic()
    assert sender.ask("flush") is False
    first_s = time.monotonic() - began
    assert sender.ask("flush") is False
    both_s = time.monotonic() - began

    assert barrier_s <= first_s < barrier_s + 3.0
    assert both_s - first_s < barrier_s / 2
    wait_for(lambda: sender.ask("flush"), "the delivery after the silence")
    job.end(sender, receiver)
    job.check_all_delivered()


def test_a_receiver_that_never_answers_costs_one_wait_and_the_site_ends_in_time(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}}, barrier_s=0.5, request_s=0.5)
    mute = job.receiver(mute=True)
    sender = job.sender()
    trainer = job.trainer(calls=CALLS)
    assert trainer.wait() == 0, trainer.log

    began = time.monotonic()
    answers = [sender.ask("flush") for _ in range(20)]
    flushed_s = time.monotonic() - began
    counts = sender.ask("close 1")
    closed_s = time.monotonic() - began - flushed_s
    assert sender.wait() == 0
    mute.kill()

    assert answers == [False] * 20
    assert 0.5 <= flushed_s < 3.0
    assert closed_s < 1 + 0.5 + 1 + 2.0
    assert (counts["logged"], counts["acked"], counts["spooled"]) == (CALLS, 0, CALLS)
    job.check_equations()
    job.replay_all()


def test_a_refused_batch_is_counted_and_all_others_are_delivered(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}})
    assert job.trainer(calls=CALLS).wait() == 0
    receiver = job.receiver(refuse_batch=5)
    sender = job.sender()

    answer = job.end(sender, receiver)

    refused = answer["report"]["sites"]["site-1"]["at_site"]["refused"]
    assert list(refused) == ["test"]
    assert 0 < refused["test"] <= 50
    assert (answer["report"]["balanced"], answer["report"]["sites"]["site-1"]["missing"]) == (True, 0)
    job.check_delivered(lost={"jsonl": {"a": refused["test"]}})


def test_a_site_that_falls_silent_does_not_delay_the_end_of_the_job(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}}, sites_s=30, silence_s=1)
    trainers = [job.trainer("a", "site-1", calls=CALLS), job.trainer("b", "site-2", calls=CALLS)]
    receiver = job.receiver()
    senders = [job.sender("site-1"), job.sender("site-2")]
    for trainer in trainers:
        assert trainer.wait() == 0, trainer.log
    senders[1].kill()

    answer = job.end(senders[0], receiver)

    assert answer["silent"] == ["site-2"]
    assert answer["took_s"] < 15
    job.check_equations()
    job.replay_all()
