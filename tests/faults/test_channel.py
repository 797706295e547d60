# SPDX-License-Identifier: Apache-2.0
"""A channel between site and receiver that loses, repeats, delays and refuses messages, or is silent."""

from __future__ import annotations

import time

import pytest

from tests.faults.conftest import MakeWorld
from tests.faults.harness import wait_for
from tests.faults.readers import count_receiver

CALLS = 1500
SEEDS = [pytest.param(seed, marks=[] if seed < 1 else pytest.mark.long) for seed in range(10)]


@pytest.mark.parametrize("seed", SEEDS)
def test_with_30_percent_of_the_acks_lost_each_record_is_there_once(make_world: MakeWorld, seed: int) -> None:
    world = make_world({"jsonl": {}, "at_least_once": {}}, files=True, gate_s=30)
    trainer = world.trainer(calls=CALLS)
    receiver, sender = world.receiver(), world.sender(ack_loss=0.3, seed=seed)
    assert trainer.wait() == 0, trainer.log

    world.end(sender, receiver, gate_s=30)

    world.check_all_delivered()
    here = count_receiver(world.journal)["site-1"]
    assert (here.journaled, here.duplicates > 0) == (CALLS, True)
    assert len(world.held("at_least_once")) == CALLS


def test_batches_that_arrive_again_later_are_recognised(make_world: MakeWorld) -> None:
    world = make_world({"jsonl": {}})
    trainers = [world.trainer(name, calls=500) for name in ("a", "b")]
    receiver, sender = world.receiver(), world.sender(again=1.0)
    for trainer in trainers:
        assert trainer.wait() == 0, trainer.log

    world.end(sender, receiver)

    world.check_all_delivered()
    here = count_receiver(world.journal)["site-1"]
    assert here.received == 1000 + here.duplicates
    assert here.duplicates > 0


@pytest.mark.parametrize(
    ("silent_s", "barrier_s"), [(2.5, 0.5), pytest.param(30.0, 10.0, marks=pytest.mark.long)], ids=["short", "30s"]
)
def test_a_silence_is_waited_for_once_and_then_all_goes_on(
    make_world: MakeWorld, silent_s: float, barrier_s: float
) -> None:
    world = make_world({"jsonl": {}}, barrier_s=barrier_s, request_s=0.5)
    receiver, sender = world.receiver(), world.sender(silent_from=8, silent_s=silent_s)
    trainer = world.trainer(calls=CALLS)
    assert trainer.wait() == 0, trainer.log

    began = time.monotonic()
    assert sender.ask("flush") is False
    first_s = time.monotonic() - began
    assert sender.ask("flush") is False
    both_s = time.monotonic() - began

    assert barrier_s <= first_s < barrier_s + 3.0
    assert both_s - first_s < barrier_s / 2
    wait_for(lambda: sender.ask("flush"), "the delivery after the silence")
    world.end(sender, receiver)
    world.check_all_delivered()


def test_a_receiver_that_never_answers_trips_the_barrier_once_and_the_site_ends_in_time(make_world: MakeWorld) -> None:
    world = make_world({"jsonl": {}}, barrier_s=0.5, request_s=0.5)
    mute = world.receiver(mute=True)
    sender = world.sender()
    trainer = world.trainer(calls=CALLS)
    assert trainer.wait() == 0, trainer.log

    began = time.monotonic()
    answers = [sender.ask("flush") for _ in range(20)]
    flushed_s = time.monotonic() - began
    ledger = sender.ask("close 1")
    closed_s = time.monotonic() - began - flushed_s
    assert sender.wait() == 0
    mute.kill()

    assert answers == [False] * 20
    assert 0.5 <= flushed_s < 3.0
    assert closed_s < 1 + 0.5 + 1 + 2.0
    assert (ledger["logged"], ledger["acked"], ledger["spooled"]) == (CALLS, 0, CALLS)
    world.check_equations()
    world.replay_all()


def test_a_refused_batch_is_counted_and_all_others_are_delivered(make_world: MakeWorld) -> None:
    world = make_world({"jsonl": {}})
    assert world.trainer(calls=CALLS).wait() == 0
    receiver = world.receiver(refuse_batch=5)
    sender = world.sender()

    answer = world.end(sender, receiver)

    refused = answer["report"]["sites"]["site-1"]["at_site"]["refused"]
    assert list(refused) == ["test"]
    assert 0 < refused["test"] <= 50
    assert (answer["report"]["balanced"], answer["report"]["sites"]["site-1"]["missing"]) == (True, 0)
    world.check_delivered(lost={"jsonl": {"a": refused["test"]}})


def test_sites_of_which_one_falls_silent_do_not_hold_up_the_end(make_world: MakeWorld) -> None:
    world = make_world({"jsonl": {}}, gate_s=30, silence_s=1)
    trainers = [world.trainer("a", "site-1", calls=CALLS), world.trainer("b", "site-2", calls=CALLS)]
    receiver = world.receiver()
    senders = [world.sender("site-1"), world.sender("site-2")]
    for trainer in trainers:
        assert trainer.wait() == 0, trainer.log
    senders[1].kill()

    answer = world.end(senders[0], receiver)

    assert answer["silent"] == ["site-2"]
    assert answer["took_s"] < 15
    world.check_equations()
    world.replay_all()
