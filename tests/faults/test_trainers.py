# SPDX-License-Identifier: Apache-2.0
"""What trainers do that is no fault of theirs: fork, run as several ranks, start again, and live with a bad clock."""

from __future__ import annotations

from tests.faults.calls import Notes
from tests.faults.conftest import MakeWorld
from tests.faults.readers import count_site, read_times

CALLS = 1000


def test_a_clock_that_jumps_back_changes_neither_order_nor_count_and_times_stay_those_of_the_calls(
    make_world: MakeWorld,
) -> None:
    world = make_world({"jsonl": {}, "tensorboard": {}, "resumable": {}})
    trainer = world.trainer(calls=CALLS, clock_back_at=400)
    receiver, sender = world.receiver(), world.sender(ack_loss=0.2)
    assert trainer.wait() == 0, trainer.log

    world.end(sender, receiver)

    world.check_all_delivered()
    notes = Notes(world.folder / "a")
    times = read_times(world.folder / "server" / "jsonl" / "job-1" / "site-1.jsonl")
    assert times["a/loss", 401] < times["a/loss", 399] - 3000
    for (_, step), at in times.items():
        before, after = notes.times(step)
        assert before <= at <= after


def test_a_fork_in_the_trainer_makes_a_stream_of_its_own(make_world: MakeWorld) -> None:
    world = make_world({"jsonl": {}, "at_least_once": {}})
    trainer = world.trainer(calls=CALLS, fork_at=300)
    receiver, sender = world.receiver(), world.sender(ack_loss=0.2)
    assert trainer.wait() == 0, trainer.log

    world.end(sender, receiver)

    assert world.count("a-child") == CALLS - 300
    assert count_site(world.spool()).streams == 2
    world.check_all_delivered()


def test_two_ranks_at_each_of_two_sites_each_keep_their_order(make_world: MakeWorld) -> None:
    world = make_world({"jsonl": {}, "tensorboard": {}}, files=True)
    ranks = [world.trainer(f"{site}r{rank}", site, calls=400) for site in ("s1", "s2") for rank in (0, 1)]
    receiver = world.receiver()
    senders = [world.sender(site, ack_loss=0.2, seed=i) for i, site in enumerate(("s1", "s2"))]
    for rank in ranks:
        assert rank.wait() == 0, rank.log

    receiver.tell("finish finished")
    world.end(senders[0])
    world.end(senders[1])
    assert receiver.answer()["report"]["balanced"]
    assert receiver.wait() == 0

    world.check_all_delivered()


def test_a_trainer_that_is_started_again_five_times_goes_on_in_the_same_run(make_world: MakeWorld) -> None:
    world = make_world({"jsonl": {}})
    receiver, sender = world.receiver(), world.sender()
    for name in "abcde":
        assert world.trainer(name, calls=100).wait() == 0

    world.end(sender, receiver)

    assert count_site(world.spool()).streams == 5
    world.check_all_delivered()
    assert [seen.key[0] for seen in world.held("jsonl")] == [name for name in "abcde" for _ in range(100)]
