# SPDX-License-Identifier: Apache-2.0
"""``trackhub replay`` as people use it: interrupted, twice, from the start, elsewhere, and from a site's machine."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import MakeWorld
from tests.faults.harness import ROOT, World, wait_for
from tests.faults.readers import count_receiver, count_site, read_store
from trackhub.cli.status import journal_status

CALLS = 600
SEEDS = [pytest.param(seed, marks=[] if seed < 1 else pytest.mark.long) for seed in range(20)]


def job_without_backends(world: World) -> None:
    """A job that only filled its journal."""
    world.backends = {}
    assert world.trainer(calls=CALLS, pause_s=0).wait() == 0
    world.end(world.sender(), world.receiver())


def test_a_job_goes_into_another_backend_afterwards_and_a_second_run_adds_nothing(make_world: MakeWorld) -> None:
    world = make_world(files=True)
    job_without_backends(world)
    world.backends = {"jsonl": {}, "idempotent": {}, "resumable": {}, "rebuild": {}}
    flags = world.flags()

    world.replay_all(*flags)
    world.replay_all(*flags)
    world.replay_all(*flags, "--from-start")
    world.replay_all()


def test_what_may_be_there_twice_after_a_replay_from_the_start_is_counted(make_world: MakeWorld) -> None:
    world = make_world()
    job_without_backends(world)
    world.backends = {"at_least_once": {}}

    world.replay_all(*world.flags())
    world.replay_all("--from-start")

    assert len(world.held("at_least_once")) == 2 * CALLS
    assert count_receiver(world.journal)["site-1"].lanes["at_least_once"].possible_duplicates == CALLS


def test_a_replay_into_another_place_brings_everything_there(make_world: MakeWorld) -> None:
    world = make_world()
    assert world.trainer(calls=CALLS).wait() == 0
    world.end(world.sender(), world.receiver())
    elsewhere = world.folder / "elsewhere"

    replay = world.replay("--from-start", "--backend", "jsonl", "--option", f"jsonl.path={elsewhere}")

    assert replay.wait() == 0, replay.log
    assert read_store(elsewhere / "job-1" / "site-1.jsonl") == world.truth("a", CALLS)


def test_a_run_that_was_deleted_is_delivered_again(make_world: MakeWorld) -> None:
    world = make_world({"jsonl": {}})
    world.trainer("a", calls=CALLS).wait()
    receiver, sender = world.receiver(), world.sender()
    assert sender.ask("flush 30") is True
    receiver.kill()
    (world.folder / "server" / "jsonl" / "job-1" / "site-1.jsonl").unlink()
    world.trainer("b", calls=10).wait()

    world.end(sender, world.receiver())

    world.check_all_delivered()


def test_a_replay_can_be_interrupted_by_ctrl_c_and_goes_on(make_world: MakeWorld) -> None:
    world = make_world()
    job_without_backends(world)
    world.backends = {"idempotent": {}}
    replay = world.replay(*world.flags(idempotent={"pause_s": 0.03, "max_batch": 10}))
    wait_for(lambda: world.held("idempotent"), "the first records")
    replay.process.send_signal(signal.SIGINT)

    assert replay.wait(10) == 130, replay.log
    assert len(world.held("idempotent")) < CALLS
    world.check_equations()
    world.replay_all(*world.flags(idempotent={"pause_s": 0, "max_batch": 100}))


def test_two_replays_at_once_do_not_meet(make_world: MakeWorld) -> None:
    world = make_world()
    job_without_backends(world)
    world.backends = {"idempotent": {}}
    pause = world.folder / "pause"
    pause.touch()
    first = world.replay(*world.flags(idempotent={"hang_while": str(pause)}))
    wait_for(pause.with_suffix(".reached").exists, "the first to reach its backend")

    second = world.replay(*world.flags())

    assert second.wait() == 1
    assert "is in use by another process" in second.log
    pause.unlink()
    assert first.wait() == 0
    world.check_all_delivered()


def test_a_copy_of_the_folder_elsewhere_is_as_good(make_world: MakeWorld, tmp_path: Path) -> None:
    """As a job's folder that was downloaded from FLARE's job store."""
    world = make_world(files=True)
    job_without_backends(world)
    copy = tmp_path / "downloaded" / "workspace"
    shutil.copytree(world.folder / "server", copy / "app_server")
    shutil.rmtree(world.folder / "server")

    replay = world.replay("--backend", "jsonl", path=tmp_path / "downloaded")

    assert replay.wait() == 0, replay.log
    assert read_store(copy / "app_server" / "jsonl" / "job-1" / "site-1.jsonl") == world.truth("a", CALLS)


def test_a_replay_that_brings_everything_says_so_whatever_the_sites_had_reported(make_world: MakeWorld) -> None:
    """The receiver died knowing that both sites had more, so that after the first site's part the second's is missing."""
    world = make_world(linger_s=60)
    trainers = [world.trainer(name, f"site-{name}", calls=CALLS, wait_at=10) for name in "ab"]
    receiver = world.receiver()
    senders = [world.sender(site) for site in world.sites()]

    def known(figure: str) -> list[int]:
        sites = journal_status(world.journal)["sites"].values()
        return [site[figure] for site in sites]

    wait_for(lambda: known("received") == [10, 10], "the first message of each site")
    for name in "ab":
        (world.folder / f"{name}.go").touch()
    for trainer in trainers:
        assert trainer.wait() == 0, trainer.log
    wait_for(lambda: known("logged") == [CALLS, CALLS], "the sites' reports of what they have not sent yet")
    assert known("received") == [10, 10]
    for proc in (*senders, receiver):
        proc.kill()

    world.replay_all()


@pytest.mark.parametrize("seed", SEEDS)
def test_from_the_sites_own_machine_the_rest_goes_into_the_same_run(make_world: MakeWorld, seed: int) -> None:
    """The site loses its receiver for good; what it still has is brought into the store that the receiver wrote to."""
    chance = random.Random(seed)
    store = "abcdefgh"[seed % 8]
    kind = ("resumable", "idempotent", "at_least_once", "jsonl")[seed % 4]
    world = make_world({})
    path = world.folder / f"store-{store}"
    world.backends = {kind: {"path": str(path)}}
    trainers = [world.trainer(name, calls=CALLS) for name in ("a", "b")]
    receiver, sender = world.receiver(), world.sender(ack_loss=0.3, seed=seed)
    target = chance.randrange(100, CALLS)
    wait_for(lambda: world.count("b") >= target and world.held(kind), "a part of the training")
    sender.kill()
    for trainer in trainers:
        assert trainer.wait() == 0
    world.end(receiver=receiver)
    left = count_site(world.spool()).spooled
    assert left > 0

    replay = world.replay(*world.flags(**{kind: {"path": str(path)}}), path=world.spool())

    assert replay.wait() == 0, replay.log
    assert count_site(world.spool()).spooled == 0
    if kind == "at_least_once":
        held = world.held(kind)
        beside = count_receiver(world.spool().parent / "replay-server" / "trackhub.db")["site-1"].lanes[kind]
        assert len(held) - len(set(held)) <= beside.possible_duplicates
        assert len(set(held)) == 2 * CALLS
    else:
        world.check_delivered()


def test_a_replay_of_a_spool_goes_on_where_an_earlier_one_gave_up(make_world: MakeWorld) -> None:
    """Then the records are no longer in the spool, but in the journal beside it, in which the first run left them."""
    world = make_world({})
    down = world.folder / "down"
    down.touch()
    world.backends = {"idempotent": {"path": str(world.folder / "store"), "down_while": str(down)}}
    assert world.trainer(calls=CALLS).wait() == 0
    first = world.replay(*world.flags(**world.backends), "--timeout-s", "1", path=world.spool())
    assert first.wait() == 1
    assert f"{CALLS} records are still not delivered" in first.log
    assert count_site(world.spool()).spooled == 0
    down.unlink()

    second = world.replay(path=world.spool())

    assert second.wait() == 0, second.log
    assert world.held("idempotent") == world.truth("a", CALLS, "idempotent")


def test_a_replay_from_the_start_of_a_spool_says_that_it_needs_a_journal(make_world: MakeWorld) -> None:
    world = make_world()
    assert world.trainer(calls=CALLS).wait() == 0
    world.end(world.sender(), world.receiver())

    replay = world.replay("--from-start", path=world.spool())

    assert replay.wait() != 0
    assert "--from-start needs the journal" in replay.log


def test_a_damaged_spool_holds_up_no_other(make_world: MakeWorld) -> None:
    world = make_world(deadline_s=0)
    job_without_backends(world)
    damaged = world.folder / "site-0" / "trackhub" / "spool"
    damaged.mkdir(parents=True)
    (damaged / "spool.json").write_bytes(bytes([255]) * 5)
    world.backends = {"jsonl": {}}

    replay = world.replay("--backend", "jsonl")

    assert replay.wait() == 1
    assert str(damaged) in replay.log
    assert world.held("jsonl") == world.truth("a", CALLS)


def test_on_a_terminal_a_replay_shows_how_far_it_is(make_world: MakeWorld) -> None:
    world = make_world()
    job_without_backends(world)
    world.backends = {"idempotent": {}}
    terminal, side = pty.openpty()
    flags = world.flags(idempotent={"pause_s": 0.003, "max_batch": 100})

    replay = subprocess.Popen(
        [sys.executable, "-m", "trackhub.cli", "replay", str(world.folder), *flags],
        env={**world.env, "COLUMNS": "100"}, stdout=subprocess.DEVNULL, stderr=side, cwd=ROOT,
    )  # fmt: skip
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side has closed a terminal
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)

    assert replay.wait() == 0, shown
    assert re.search(rb"idempotent.*[1-5]00/600", shown), shown


def test_the_servers_part_must_come_before_the_sites(make_world: MakeWorld) -> None:
    """Else the store would take the site's records for the ones that the server still has."""
    world = make_world({})
    path = world.folder / "store"
    hang = world.folder / "down"
    world.backends = {"resumable": {"path": str(path), "down_while": str(hang), "pause_s": 0.005}}
    trainer = world.trainer(calls=1000, wait_at=800)
    receiver, sender = world.receiver(), world.sender()
    wait_for(lambda: len(world.held("resumable")) >= 50, "a part of the delivery")
    hang.touch()
    wait_for(lambda: count_site(world.spool()).acked == 800, "more in the journal")
    sender.kill()
    receiver.kill()
    (world.folder / "a.go").touch()
    assert trainer.wait() == 0
    assert len(world.held("resumable")) < 800
    hang.unlink()
    flags = world.flags(resumable={"path": str(path), "pause_s": 0})

    early = world.replay(*flags, path=world.spool())

    assert early.wait() == 1
    assert "replay that one first" in json.dumps(early.log + stored_errors(world))
    for path_of in (world.journal, world.spool().parent):
        replay = world.replay(*flags, path=path_of)
        assert replay.wait() == 0, replay.log
    world.check_delivered()


def stored_errors(world: World) -> str:
    return "".join(path.read_text() for path in world.folder.rglob("delivery.json"))


def test_runs_keep_the_status_that_the_job_gave_them(make_world: MakeWorld) -> None:
    world = make_world({"resumable": {}}, deadline_s=0)
    down = world.folder / "down"
    down.touch()
    world.backends = {"resumable": {"down_while": str(down)}}
    trainers = [world.trainer("a", "site-1", calls=100), world.trainer("b", "site-2", calls=100)]
    receiver = world.receiver()
    senders = [world.sender("site-1"), world.sender("site-2")]
    for trainer in trainers:
        assert trainer.wait() == 0
    assert senders[1].ask("flush 30") is True
    senders[1].kill()
    world.end(senders[0], receiver)
    down.unlink()

    world.replay_all()

    folder = world.folder / "server" / "resumable"
    assert (folder / "job-1-site-1.status").read_text() == "finished"
    assert (folder / "job-1-site-2.status").read_text() == "failed"
