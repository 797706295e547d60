# SPDX-License-Identifier: Apache-2.0
"""Files that are cut short or have flipped bits: what can be read is delivered, the rest is counted and named."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.faults.conftest import MakeJob
from tests.faults.independent_readers import count_receiver
from tests.faults.job_processes import JobProcesses
from tests.faults.trainer_calls import files_last

CALLS = 3000
SEEDS = [pytest.param(seed, marks=[] if seed < 1 else pytest.mark.long) for seed in range(30)]


def damage(path: Path, chance: random.Random, *, start: float = 0.0) -> str:
    """Damage a file as a bad disk or a crash does, somewhere behind this share of it. Return the kind of damage."""
    data = bytearray(path.read_bytes())
    at = chance.randrange(int(len(data) * start), len(data))
    kind = chance.choice(["cut", "bits", "zeros"])
    if kind == "cut":
        del data[at:]
    elif kind == "zeros":
        data[at : at + 4096] = bytes(min(4096, len(data) - at))
    else:
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(at, len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return kind


def check_what_is_there(job: JobProcesses, backend: str, lost: int) -> None:
    """Check that the backend holds logged records only, in order and once, and lacks as many as were counted."""
    job.counted = lost
    truth, held = job.truth("a", CALLS), job.held(backend)
    there = set(held)
    assert held == [seen for seen in truth if seen in there]
    assert len(held) == CALLS - lost


@pytest.mark.parametrize("seed", SEEDS)
def test_all_that_can_be_read_of_a_damaged_spool_is_delivered(make_job: MakeJob, seed: int) -> None:
    chance = random.Random(seed)
    job = make_job({"jsonl": {}})
    job.spool_bytes = 400_000  # so that the spool has three segments, of 50 kB each
    assert job.trainer(calls=CALLS, pause_s=0).wait() == 0
    segments = sorted(job.spool().glob("*.spool"))
    victims = chance.sample(segments, chance.randrange(1, 3))
    for victim in victims:
        if chance.random() < 0.2:
            victim.unlink()
        else:
            damage(victim, chance)
    receiver, sender = job.receiver(), job.sender()

    answer = job.end(sender, receiver)

    site = answer["report"]["sites"]["site-1"]
    dropped = site["at_site"]["dropped"]
    assert set(dropped) <= {"damaged"}
    lost = dropped.get("damaged", 0)
    assert (site["at_site"]["logged"], answer["report"]["balanced"]) == (CALLS, True)
    assert site["journaled"] == CALLS - lost
    check_what_is_there(job, "jsonl", lost)
    if lost:
        named = r"bytes \d+ to \d+ cannot be read|is missing, though its stream|last \d+ of the \d+ records of stream"
        assert re.search(named, sender.log), sender.log


def test_a_spool_cut_in_mid_frame_loses_that_record_and_names_its_bytes(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}})
    assert job.trainer(calls=CALLS).wait() == 0
    (segment,) = job.spool().glob("*.spool")
    size = segment.stat().st_size
    with segment.open("r+b") as file:
        file.truncate(size - 10)

    receiver, sender = job.receiver(), job.sender()
    answer = job.end(sender, receiver)

    assert answer["report"]["sites"]["site-1"]["at_site"]["dropped"] == {"damaged": 1}
    assert re.search(rf"{segment.name}: bytes {size - 45} to {size - 10} cannot be read", sender.log)
    check_what_is_there(job, "jsonl", 1)


@pytest.mark.parametrize("name", ["ack", "ledger", "turn", "round"])
def test_a_damaged_file_beside_the_spool_costs_no_record(make_job: MakeJob, name: str) -> None:
    job = make_job({"jsonl": {}})
    assert job.trainer(calls=500).wait() == 0
    receiver, sender = job.receiver(), job.sender()
    assert sender.ask("flush 30") is True
    sender.kill()
    (victim,) = job.spool().glob(f"*{name}")
    victim.write_bytes(b"\xff" * 5)
    assert job.trainer("b", calls=500).wait() == 0
    successor = job.sender()
    assert successor.ask("flush 30") is True  # the receiver waits for no site that it takes for dead

    answer = job.end(successor, receiver)

    assert answer["report"]["balanced"]
    assert answer["report"]["sites"]["site-1"]["journaled"] == 1000
    job.check_delivered()


@pytest.mark.parametrize("seed", SEEDS)
def test_all_that_can_be_read_of_a_damaged_journal_is_delivered(make_job: MakeJob, seed: int) -> None:
    chance = random.Random(seed)
    job = make_job({}, batch_bytes=4096)
    assert job.trainer(calls=CALLS, pause_s=0).wait() == 0
    job.end(job.sender(), job.receiver())
    assert count_receiver(job.journal)["site-1"].journaled == CALLS
    kind = damage(job.journal, chance, start=0.35)  # the head of the file says which job the journal belongs to
    job.backends = {"jsonl": {}, "idempotent": {}}

    replay = job.replay("--backend", "jsonl", "--backend", "idempotent")

    assert replay.wait() == 0, replay.log
    here = count_receiver(job.journal)["site-1"]
    for name in job.backends:
        rejected = here.lanes[name].rejected
        assert set(rejected) <= {"damaged"}
        lost = rejected.get("damaged", 0)
        assert here.lanes[name].confirmed == CALLS - lost
        check_what_is_there(job, name, lost)
        if lost:
            assert str(job.journal) in replay.log
            assert re.search(r"records \d+ to \d+ of (run|site) site-1", replay.log)
    assert kind != "cut" or here.lanes["jsonl"].rejected


def test_a_replay_says_that_nothing_in_a_journal_can_be_read(make_job: MakeJob) -> None:
    job = make_job({})
    assert job.trainer(calls=100).wait() == 0
    job.end(job.sender(), job.receiver())
    job.journal.write_bytes(job.journal.read_bytes()[:1000])

    replay = job.replay("--backend", "jsonl")

    assert replay.wait() == 1
    assert f"{job.journal} is damaged, and nothing in it can be read" in replay.log


@pytest.mark.parametrize("seed", SEEDS)
def test_records_that_a_receiver_acknowledged_and_its_disk_lost_are_retries(make_job: MakeJob, seed: int) -> None:
    """Cutting the write-ahead log short has the same effect as a loss of power under durability=normal."""
    chance = random.Random(seed)
    job = make_job({"jsonl": {}}, files=seed % 2 == 0)
    assert job.trainer(calls=CALLS, pause_s=0).wait() == 0
    receiver, sender = job.receiver(), job.sender()
    assert sender.ask("flush 30") is True
    receiver.kill()
    job.end(sender, sites_s=0.5)
    log = job.journal.with_name("trackhub.db-wal")
    with log.open("r+b") as file:
        file.truncate(chance.randrange(log.stat().st_size // 4, log.stat().st_size))

    replay = job.replay()
    assert replay.wait() == 0, replay.log
    held, truth = job.held("jsonl"), job.truth("a", CALLS)
    lane = count_receiver(job.journal)["site-1"].lanes["jsonl"]
    assert set(held) == set(truth)
    assert len(held) - len(truth) <= lane.possible_duplicates
    assert ("The journal has lost" in replay.log) == (lane.possible_duplicates > 0)
    assert files_last(list(dict.fromkeys(held))) == files_last(truth)
