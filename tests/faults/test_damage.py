# SPDX-License-Identifier: Apache-2.0
"""Files that were cut short or have flipped bits: what can be read is delivered, what cannot is counted and named."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.faults.conftest import MakeWorld
from tests.faults.harness import World
from tests.faults.readers import count_receiver

CALLS = 3000
SEEDS = [pytest.param(seed, marks=[] if seed < 1 else pytest.mark.long) for seed in range(30)]


def damage(path: Path, chance: random.Random, *, start: float = 0.0) -> str:
    """Do one thing to a file behind this share of it that a bad disk or a crash does; return what."""
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


def check_what_is_there(world: World, backend: str, lost: int) -> None:
    """All that is there was logged, is in order and is there once, and the rest is as much as was counted."""
    world.counted = lost
    truth, held = world.truth("a", CALLS), world.held(backend)
    there = set(held)
    assert held == [seen for seen in truth if seen in there]
    assert len(held) == CALLS - lost


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_spool_gives_all_that_can_be_read(make_world: MakeWorld, seed: int) -> None:
    chance = random.Random(seed)
    world = make_world({"jsonl": {}})
    world.spool_bytes = 400_000  # segments of 50 kB: three of them
    assert world.trainer(calls=CALLS, pause_s=0).wait() == 0
    segments = sorted(world.spool().glob("*.spool"))
    victims = chance.sample(segments, chance.randrange(1, 3))
    for victim in victims:
        if chance.random() < 0.2:
            victim.unlink()
        else:
            damage(victim, chance)
    receiver, sender = world.receiver(), world.sender()

    answer = world.end(sender, receiver)

    site = answer["report"]["sites"]["site-1"]
    dropped = site["at_site"]["dropped"]
    assert set(dropped) <= {"damaged"}
    lost = dropped.get("damaged", 0)
    assert (site["at_site"]["logged"], answer["report"]["balanced"]) == (CALLS, True)
    assert site["journaled"] == CALLS - lost
    check_what_is_there(world, "jsonl", lost)
    if lost:
        named = r"bytes \d+ to \d+ cannot be read|is not there|last \d+ records of stream"
        assert re.search(named, sender.log), sender.log


def test_a_spool_cut_in_mid_frame_loses_that_record_and_names_its_bytes(make_world: MakeWorld) -> None:
    world = make_world({"jsonl": {}})
    assert world.trainer(calls=CALLS).wait() == 0
    (segment,) = world.spool().glob("*.spool")
    size = segment.stat().st_size
    with segment.open("r+b") as file:
        file.truncate(size - 10)

    receiver, sender = world.receiver(), world.sender()
    answer = world.end(sender, receiver)

    assert answer["report"]["sites"]["site-1"]["at_site"]["dropped"] == {"damaged": 1}
    assert re.search(rf"{segment.name}: bytes {size - 45} to {size - 10} cannot be read", sender.log)
    check_what_is_there(world, "jsonl", 1)


@pytest.mark.parametrize("name", ["ack", "ledger", "turn", "round"])
def test_a_damaged_file_beside_the_spool_costs_no_record(make_world: MakeWorld, name: str) -> None:
    world = make_world({"jsonl": {}})
    assert world.trainer(calls=500).wait() == 0
    receiver, sender = world.receiver(), world.sender()
    assert sender.ask("flush") is True
    sender.kill()
    (victim,) = world.spool().glob(f"*{name}")
    victim.write_bytes(b"\xff" * 5)
    assert world.trainer("b", calls=500).wait() == 0

    answer = world.end(world.sender(), receiver)

    assert answer["report"]["balanced"]
    assert answer["report"]["sites"]["site-1"]["journaled"] == 1000
    world.check_delivered()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_journal_gives_all_that_can_be_read(make_world: MakeWorld, seed: int) -> None:
    chance = random.Random(seed)
    world = make_world({}, batch_bytes=4096)
    assert world.trainer(calls=CALLS, pause_s=0).wait() == 0
    world.end(world.sender(), world.receiver())
    assert count_receiver(world.journal)["site-1"].journaled == CALLS
    kind = damage(world.journal, chance, start=0.35)  # its head says what it is a journal of
    world.backends = {"jsonl": {}, "idempotent": {}}

    replay = world.replay("--backend", "jsonl", "--backend", "idempotent")

    assert replay.wait() == 0, replay.log
    here = count_receiver(world.journal)["site-1"]
    for name in world.backends:
        rejected = here.lanes[name].rejected
        assert set(rejected) <= {"damaged"}
        lost = rejected.get("damaged", 0)
        assert here.lanes[name].confirmed == CALLS - lost
        check_what_is_there(world, name, lost)
        if lost:
            assert str(world.journal) in replay.log
            assert re.search(r"records \d+ to \d+ of (run|site) site-1", replay.log)
    assert kind != "cut" or here.lanes["jsonl"].rejected


def test_a_journal_of_which_nothing_can_be_read_is_said_to_be_so(make_world: MakeWorld) -> None:
    world = make_world({})
    assert world.trainer(calls=100).wait() == 0
    world.end(world.sender(), world.receiver())
    world.journal.write_bytes(world.journal.read_bytes()[:1000])

    replay = world.replay("--backend", "jsonl")

    assert replay.wait() == 1
    assert f"{world.journal} is damaged, and nothing in it can be read" in replay.log


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_killed_receiver_had_acknowledged_and_its_disk_lost_is_sent_again(
    make_world: MakeWorld, seed: int
) -> None:
    """The write-ahead log cut short is what a loss of power leaves under durability=normal."""
    chance = random.Random(seed)
    world = make_world({"jsonl": {}}, files=seed % 2 == 0)
    assert world.trainer(calls=CALLS, pause_s=0).wait() == 0
    receiver, sender = world.receiver(), world.sender()
    assert sender.ask("flush 30") is True
    receiver.kill()
    world.end(sender, gate_s=0.5)
    log = world.journal.with_name("trackhub.db-wal")
    with log.open("r+b") as file:
        file.truncate(chance.randrange(log.stat().st_size // 4, log.stat().st_size))

    replay = world.replay()
    if replay.wait() != 0:  # the backend holds more than the journal remembers
        assert "another one wrote it" in replay.log
        for path in (world.folder / "server").rglob("*.jsonl"):
            path.unlink()
        replay = world.replay()
    assert replay.wait() == 0, replay.log
    world.check_delivered()
