# SPDX-License-Identifier: Apache-2.0
"""Disks that are full or read-only, and one without a write-ahead log: at the site, at the receiver, under a backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Disk, MakeWorld
from tests.faults.harness import wait_for
from tests.faults.readers import count_receiver, count_site

MakeDisk = Callable[[Path, int], Disk]
MANY = 8_000


@pytest.mark.parametrize("reason", ["disk_full", "spool_full"])
def test_a_full_site_drops_the_newest_counts_them_and_goes_on_when_there_is_room(
    make_world: MakeWorld, make_disk: MakeDisk, reason: str
) -> None:
    world = make_world({"jsonl": {}})
    world.spool_bytes = 200_000 if reason == "spool_full" else 800_000
    if reason == "disk_full":
        make_disk(world.spool(), 320)
    trainer = world.trainer(calls=MANY, pause_s=0, wait_at=MANY - 1000)
    wait_for(lambda: world.count() == MANY - 1000, "the training up to its pause")
    assert count_site(world.spool()).dropped[reason] > 100
    receiver, sender = world.receiver(), world.sender()
    assert sender.ask("flush 30") is True
    looked = time.monotonic()
    wait_for(lambda: time.monotonic() > looked + 0.6, "the time after which a writer looks for room again")
    (world.folder / "a.go").touch()
    assert trainer.wait() == 0, trainer.log

    answer = world.end(sender, receiver)

    site = answer["report"]["sites"]["site-1"]
    dropped = site["at_site"]["dropped"]
    assert list(dropped) == [reason]
    assert site["explained"] == dropped
    assert site["journaled"] == MANY - dropped[reason]
    assert trainer.log.count("tracking dropped a record") == 1
    world.check_all_delivered(lost={"jsonl": {"a": dropped[reason]}})
    assert len([seen for seen in world.held("jsonl") if (seen.step or 0) >= MANY - 1000]) == 1000


def test_a_site_whose_disk_is_full_before_training_starts_counts_every_record(
    make_world: MakeWorld, make_disk: MakeDisk
) -> None:
    world = make_world({"jsonl": {}})
    disk = make_disk(world.spool(), 512)
    receiver, sender = world.receiver(), world.sender()
    disk.fill()
    trainer = world.trainer(calls=500)
    assert trainer.wait() == 0, trainer.log

    answer = world.end(sender, receiver)

    assert answer["report"]["sites"]["site-1"]["at_site"] == {
        "logged": 500, "dropped": {"disk_full": 500}, "refused": {}, "withheld": 0, "acked": 0, "spooled": 0,
    }  # fmt: skip
    world.check_equations()


def test_a_receiver_whose_disk_is_full_takes_no_record_and_loses_none(
    make_world: MakeWorld, make_disk: MakeDisk
) -> None:
    world = make_world({"jsonl": {}, "at_least_once": {}}, gate_s=2, deadline_s=2)
    disk = make_disk(world.journal.parent, 2048)
    trainer = world.trainer(calls=3000)
    receiver, sender = world.receiver(), world.sender()
    wait_for(lambda: world.count() > 500, "500 calls")
    filler = disk.fill()
    assert trainer.wait() == 0, trainer.log

    world.end(sender, receiver, gate_s=1)

    world.check_equations()
    assert count_site(world.spool()).spooled > 0
    disk.resize(16384)  # the log alone may take 4 MB before SQLite folds it in
    filler.unlink()
    world.replay_all()


def test_a_receiver_whose_disk_has_room_again_goes_on(make_world: MakeWorld, make_disk: MakeDisk) -> None:
    world = make_world({"jsonl": {}, "at_least_once": {}, "resumable": {}}, files=True)
    disk = make_disk(world.journal.parent, 4096)
    trainer = world.trainer(calls=3000)
    receiver, sender = world.receiver(), world.sender()
    wait_for(lambda: world.count() > 500, "500 calls")
    filler = disk.fill()
    assert trainer.wait() == 0, trainer.log
    assert sender.ask("flush") is False

    disk.resize(16384)
    filler.unlink()
    world.end(sender, receiver)

    world.check_all_delivered()


@pytest.mark.parametrize("fault", ["full", "read_only"])
def test_a_backend_on_a_failing_disk_waits_and_goes_on(make_world: MakeWorld, make_disk: MakeDisk, fault: str) -> None:
    world = make_world({})
    disk = make_disk(world.folder / "disk", 1024)
    world.backends = {"jsonl": {"path": str(disk.folder / "jsonl")}, "tensorboard": {}, "idempotent": {}}
    trainer = world.trainer(calls=3000)
    receiver, sender = world.receiver(), world.sender()
    wait_for(lambda: world.held("jsonl"), "the first records")
    if fault == "full":
        disk.fill()
    else:
        disk.set_read_only(True)
    assert trainer.wait() == 0, trainer.log
    wait_for(lambda: len(world.held("idempotent")) == 3000, "the delivery to the other backend")
    assert len(world.held("jsonl")) < 3000

    if fault == "full":
        disk.resize(8192)
    else:
        disk.set_read_only(False)
    world.end(sender, receiver)

    world.check_all_delivered()


def test_a_receiver_that_cannot_write_its_folder_says_so_and_the_records_stay_at_the_site(
    make_world: MakeWorld, make_disk: MakeDisk
) -> None:
    world = make_world({"jsonl": {}})
    disk = make_disk(world.journal.parent, 1024)
    disk.set_read_only(True)
    trainer = world.trainer(calls=500)
    sender = world.sender()
    with pytest.raises(AssertionError, match=r"JournalError: cannot create the journal .* Read-only file system"):
        world.receiver()
    assert trainer.wait() == 0, trainer.log

    world.end(sender, gate_s=0.5)

    world.check_equations()
    disk.set_read_only(False)
    world.end(world.sender(), world.receiver())
    world.check_all_delivered()


def test_what_is_left_on_a_read_only_disk_can_be_looked_at(make_world: MakeWorld, make_disk: MakeDisk) -> None:
    world = make_world({})
    disk = make_disk(world.journal.parent, 1024)
    assert world.trainer(calls=500).wait() == 0
    world.end(receiver=world.receiver(), sender=world.sender())
    disk.set_read_only(True)

    assert world.check_status()["journals"][0]["sites"]["site-1"]["journaled"] == 500
    replay = world.replay("--backend", "jsonl")
    assert replay.wait() == 1
    assert "Read-only file system" in replay.log

    disk.set_read_only(False)
    world.backends = {"jsonl": {}}
    world.replay_all("--backend", "jsonl")


def test_a_file_system_without_a_write_ahead_log_is_used_and_named(make_world: MakeWorld) -> None:
    """SQLite's own layer ``unix-dotfile`` has no shared memory, which is what a network file system lacks as well."""
    world = make_world({"jsonl": {}, "at_least_once": {}}, files=True)
    trainer = world.trainer(calls=400)
    receiver, sender = world.receiver(vfs="unix-dotfile"), world.sender(ack_loss=0.2)
    assert trainer.wait() == 0, trainer.log

    world.end(sender, receiver)

    assert "this file system has no write-ahead log; SQLite uses 'delete', which is slower" in receiver.log
    world.check_all_delivered()
    assert count_receiver(world.journal)["site-1"].journaled == 400
