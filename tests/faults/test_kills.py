# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments. In the bounded form of the suite a few seeds of each, in the full form fifty."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.faults.conftest import MakeWorld
from tests.faults.harness import World, wait_for
from tests.faults.readers import count_receiver

SEEDS = [pytest.param(seed, marks=[] if seed < 2 else pytest.mark.long) for seed in range(50)]
EVERY_KIND = ("resumable", "idempotent", "rebuild", "at_least_once", "buffered", "jsonl", "tensorboard")
CALLS = 1000
WAITS_AT = 900
"""Where a trainer waits that must not end before the kill: see `World.go`."""
ENDLESS = 50_000
"""Calls of a trainer that does not live to make them all."""


def some_backends(seed: int) -> dict[str, dict[str, object]]:
    """A backend of each redelivery kind in turn, and tensorboard in every seventh seed."""
    return {"jsonl": {}, EVERY_KIND[seed % len(EVERY_KIND)]: {}}


def reach(world: World, chance: random.Random, name: str = "a", least: int = 1, most: int = WAITS_AT) -> None:
    """Wait for a random moment of the training, when the receiver has a part of what was logged."""
    target = chance.randrange(least, most)
    wait_for(lambda: world.count(name) >= target, f"{target} calls")
    wait_for(lambda: world.journal.exists() and count_receiver(world.journal), "the first records to be journaled")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_trainer_loses_no_call_that_had_returned(make_world: MakeWorld, seed: int) -> None:
    chance = random.Random(seed)
    world = make_world(some_backends(seed), files=seed % 2 == 0)
    receiver, sender = world.receiver(), world.sender()
    trainer = world.trainer("a", calls=ENDLESS)

    reach(world, chance)
    trainer.kill()
    assert trainer.wait() == -9
    world.in_doubt = 1
    if seed % 2:  # started again, as FLARE's launcher or its user does
        assert world.trainer("b", calls=200).wait() == 0
    world.end(sender, receiver)

    world.check_all_delivered()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_sender_loses_nothing(make_world: MakeWorld, seed: int) -> None:
    chance = random.Random(seed)
    world = make_world(some_backends(seed), files=seed % 2 == 0)
    receiver, sender = world.receiver(), world.sender(ack_loss=0.2, seed=seed)
    trainers = [world.trainer(name, calls=CALLS, wait_at=WAITS_AT) for name in "ab"]

    reach(world, chance)
    sender.kill()
    assert sender.wait() == -9
    assert world.count("a") < CALLS
    world.go("a", "b")
    if seed % 2:
        sender = world.sender()
    for trainer in trainers:
        assert trainer.wait() == 0, trainer.log
    world.end(sender if seed % 2 else None, receiver)

    world.check_equations()
    world.replay_all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_receiver_loses_nothing(make_world: MakeWorld, seed: int) -> None:
    chance = random.Random(seed)
    world = make_world(some_backends(seed), files=seed % 2 == 0)
    receiver, sender = world.receiver(), world.sender()
    trainer = world.trainer("a", calls=CALLS, wait_at=WAITS_AT)

    reach(world, chance)
    receiver.kill()
    assert receiver.wait() == -9
    assert world.count("a") < CALLS
    world.go("a")
    if seed % 2:
        receiver = world.receiver()
    assert trainer.wait() == 0, trainer.log
    world.end(sender, receiver if seed % 2 else None, gate_s=5 if seed % 2 else 0.5)

    world.check_equations()
    world.replay_all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_receiver_that_dies_in_mid_commit_loses_nothing(make_world: MakeWorld, seed: int) -> None:
    chance = random.Random(seed)
    world = make_world(some_backends(seed), durability="full" if seed % 5 == 0 else "normal")
    trainer = world.trainer("a", calls=CALLS)
    receiver = world.receiver(kill_at_commit=chance.randrange(4, 40), kill_after_us=chance.uniform(0, 300))
    sender = world.sender()

    assert receiver.wait() == -9, receiver.log
    assert trainer.wait() == 0, trainer.log
    world.check_equations()
    receiver = world.receiver()
    world.end(sender, receiver)

    world.check_all_delivered()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lane_that_dies_between_write_and_confirm_loses_and_doubles_nothing(make_world: MakeWorld, seed: int) -> None:
    chance = random.Random(seed)
    kind = EVERY_KIND[seed % len(EVERY_KIND)]
    world = make_world({kind: {}}, files=kind != "tensorboard")
    method = chance.choice(["write", "flush"]) if kind in ("rebuild", "buffered") else "write"
    trainer = world.trainer("a", calls=600)
    # The stores of the suite take 100 records in a write, the others perhaps all that there are.
    number = chance.randrange(1, 5) if kind not in ("jsonl", "tensorboard") and method == "write" else 1
    receiver = world.receiver(kill_at_write=(kind, method, number))
    sender = world.sender()

    assert receiver.wait() == -9, receiver.log
    assert trainer.wait() == 0, trainer.log
    world.check_equations()
    if seed % 2:
        world.end(sender, world.receiver())
    else:
        world.end(sender, gate_s=0.5)

    world.check_equations()
    world.replay_all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replay_that_is_killed_again_and_again_delivers_everything_once(make_world: MakeWorld, seed: int) -> None:
    chance = random.Random(seed)
    kind = EVERY_KIND[seed % len(EVERY_KIND)]
    world = make_world({})
    assert world.trainer("a", calls=1000).wait() == 0
    receiver, sender = world.receiver(), world.sender()
    world.end(sender, receiver)
    options = {} if kind in ("jsonl", "tensorboard") else {"pause_s": 0.001}
    world.backends = {kind: options}
    flags = ["--backend", kind, *(f for k, v in options.items() for f in ("--option", f"{kind}.{k}={v}"))]

    killed = 0
    for _ in range(3):
        replay = world.replay(*flags)
        held = len(world.held(kind))
        target = chance.randrange(held, held + (1000 - held) // 2 + 1)
        wait_for(lambda: len(world.held(kind)) > target or not replay.is_alive(), f"{target} records")  # noqa: B023
        replay.kill()
        killed += replay.wait() == -9
        world.check_equations()

    assert killed or not options  # without a pause it may be done before anybody looks
    world.replay_all(*flags)


@pytest.mark.parametrize("seed", [pytest.param(0), *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 50))])
def test_everything_at_once_loses_nothing(make_world: MakeWorld, seed: int) -> None:
    """Lost requests and acks, late repetitions, two ranks, and each process killed and started again."""
    chance = random.Random(seed)
    world = make_world(some_backends(seed), files=True)
    channel: dict[str, Any] = {"ack_loss": 0.3, "request_loss": 0.1, "again": 0.2, "delay_s": 0.005, "seed": seed}
    receiver, sender = world.receiver(), world.sender(**channel)
    doomed = world.trainer("a", calls=ENDLESS, pause_s=0.02)
    trainer = world.trainer("b", calls=CALLS, wait_at=WAITS_AT)

    for victim in chance.sample(["receiver", "sender", "a", "receiver", "sender"], 5):
        least = min(world.count("b"), WAITS_AT - 1)
        reach(world, chance, "b", least, min(WAITS_AT, least + 300))
        if victim == "receiver":
            receiver.kill()
            receiver = world.receiver()
        elif victim == "sender":
            sender.kill()
            sender = world.sender(**channel)
        else:
            doomed.kill()
            assert doomed.wait() == -9
            world.in_doubt = 1
    world.go("b")
    assert trainer.wait() == 0
    world.end(sender, receiver)

    world.check_equations()
    world.replay_all()
