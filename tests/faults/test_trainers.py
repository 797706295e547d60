# SPDX-License-Identifier: Apache-2.0
"""Unusual trainers: they fork, run as several ranks, are started again, or have a clock that jumps."""

from __future__ import annotations

from tests.faults.conftest import MakeJob
from tests.faults.independent_readers import count_site, read_times
from tests.faults.trainer_calls import Notes

CALLS = 1000


def test_a_clock_that_jumps_back_changes_neither_order_nor_count(make_job: MakeJob) -> None:
    """The stored times stay those of the log calls."""
    job = make_job({"jsonl": {}, "tensorboard": {}, "resumable": {}})
    trainer = job.trainer(calls=CALLS, clock_back_at=400)
    receiver, sender = job.receiver(), job.sender(ack_loss=0.2)
    assert trainer.wait() == 0, trainer.log

    job.end(sender, receiver)

    job.check_all_delivered()
    notes = Notes(job.folder / "a")
    times = read_times(job.folder / "server" / "jsonl" / "job-1" / "site-1.jsonl")
    assert times["a/loss", 401] < times["a/loss", 399] - 3000
    for (_, step), at in times.items():
        before, after = notes.times(step)
        assert before <= at <= after


def test_a_fork_in_the_trainer_makes_a_stream_of_its_own(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}, "at_least_once": {}})
    trainer = job.trainer(calls=CALLS, fork_at=300)
    receiver, sender = job.receiver(), job.sender(ack_loss=0.2)
    assert trainer.wait() == 0, trainer.log

    job.end(sender, receiver)

    assert job.count("a-child") == CALLS - 300
    assert count_site(job.spool()).streams == 2
    job.check_all_delivered()


def test_two_ranks_at_each_of_two_sites_each_keep_their_order(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}, "tensorboard": {}}, files=True)
    ranks = [job.trainer(f"{site}r{rank}", site, calls=400) for site in ("s1", "s2") for rank in (0, 1)]
    receiver = job.receiver()
    senders = [job.sender(site, ack_loss=0.2, seed=i) for i, site in enumerate(("s1", "s2"))]
    for rank in ranks:
        assert rank.wait() == 0, rank.log

    receiver.tell("finish finished")
    job.end(senders[0])
    job.end(senders[1])
    assert receiver.answer()["report"]["balanced"]
    assert receiver.wait() == 0

    job.check_all_delivered()


def test_a_trainer_that_is_started_again_five_times_goes_on_in_the_same_run(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}})
    receiver, sender = job.receiver(), job.sender()
    for name in "abcde":
        assert job.trainer(name, calls=100).wait() == 0

    job.end(sender, receiver)

    assert count_site(job.spool()).streams == 5
    job.check_all_delivered()
    assert [seen.key[0] for seen in job.held("jsonl")] == [name for name in "abcde" for _ in range(100)]
