# SPDX-License-Identifier: Apache-2.0
"""``trackhub replay`` as people use it: interrupted, twice, from the start, elsewhere, and at a site."""

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

from tests.faults.conftest import MakeJob
from tests.faults.independent_readers import count_receiver, count_site, read_store
from tests.faults.job_processes import JobProcesses
from tests.faults.process import ROOT, wait_for
from tests.faults.trainer_calls import files_last
from trackhub.cli.status import journal_status

CALLS = 600
SEEDS = [pytest.param(seed, marks=[] if seed < 1 else pytest.mark.long) for seed in range(20)]


def job_without_backends(job: JobProcesses) -> None:
    """Run a job without backends, which only fills its journal."""
    job.backends = {}
    assert job.trainer(calls=CALLS, pause_s=0).wait() == 0
    job.end(job.sender(), job.receiver())


def test_a_replay_delivers_into_another_backend_and_a_second_adds_nothing(make_job: MakeJob) -> None:
    job = make_job(files=True)
    job_without_backends(job)
    job.backends = {"jsonl": {}, "idempotent": {}, "resumable": {}, "rebuild": {}}
    flags = job.flags()

    job.replay_all(*flags)
    job.replay_all(*flags)
    job.replay_all(*flags, "--from-start")
    job.replay_all()


def test_possible_duplicates_of_a_replay_from_the_start_are_counted(make_job: MakeJob) -> None:
    job = make_job()
    job_without_backends(job)
    job.backends = {"at_least_once": {}}

    job.replay_all(*job.flags())
    job.replay_all("--from-start")

    assert len(job.held("at_least_once")) == 2 * CALLS
    assert count_receiver(job.journal)["site-1"].lanes["at_least_once"].possible_duplicates == CALLS


def test_a_replay_into_another_folder_delivers_everything_there(make_job: MakeJob) -> None:
    job = make_job()
    assert job.trainer(calls=CALLS).wait() == 0
    job.end(job.sender(), job.receiver())
    elsewhere = job.folder / "elsewhere"

    replay = job.replay("--from-start", "--backend", "jsonl", "--option", f"jsonl.path={elsewhere}")

    assert replay.wait() == 0, replay.log
    assert read_store(elsewhere / "job-1" / "site-1.jsonl") == job.truth("a", CALLS)


def test_a_run_that_was_deleted_is_delivered_again(make_job: MakeJob) -> None:
    job = make_job({"jsonl": {}})
    job.trainer("a", calls=CALLS).wait()
    receiver, sender = job.receiver(), job.sender()
    assert sender.ask("flush 30") is True
    receiver.kill()
    (job.folder / "server" / "jsonl" / "job-1" / "site-1.jsonl").unlink()
    job.trainer("b", calls=10).wait()

    job.end(sender, job.receiver())

    job.check_all_delivered()


def test_a_replay_can_be_interrupted_by_ctrl_c_and_called_again(make_job: MakeJob) -> None:
    job = make_job()
    job_without_backends(job)
    job.backends = {"idempotent": {}}
    replay = job.replay(*job.flags(idempotent={"pause_s": 0.03, "max_batch": 10}))
    wait_for(lambda: job.held("idempotent"), "the first records")
    replay.process.send_signal(signal.SIGINT)

    assert replay.wait(10) == 130, replay.log
    assert len(job.held("idempotent")) < CALLS
    job.check_equations()
    job.replay_all(*job.flags(idempotent={"pause_s": 0, "max_batch": 100}))


def test_a_second_replay_at_the_same_time_is_refused(make_job: MakeJob) -> None:
    job = make_job()
    job_without_backends(job)
    job.backends = {"idempotent": {}}
    pause = job.folder / "pause"
    pause.touch()
    first = job.replay(*job.flags(idempotent={"hang_while": str(pause)}))
    wait_for(pause.with_suffix(".reached").exists, "the first replay to reach its backend")

    second = job.replay(*job.flags())

    assert second.wait() == 1
    assert "is in use by another process" in second.log
    pause.unlink()
    assert first.wait() == 0
    job.check_all_delivered()


def test_a_replay_works_on_a_copy_of_the_folder_elsewhere(make_job: MakeJob, tmp_path: Path) -> None:
    """So a job's folder can be replayed that was downloaded from FLARE's job store."""
    job = make_job(files=True)
    job_without_backends(job)
    copy = tmp_path / "downloaded" / "workspace"
    shutil.copytree(job.folder / "server", copy / "app_server")
    shutil.rmtree(job.folder / "server")

    replay = job.replay("--backend", "jsonl", path=tmp_path / "downloaded")

    assert replay.wait() == 0, replay.log
    stored = read_store(copy / "app_server" / "jsonl" / "job-1" / "site-1.jsonl")
    assert files_last(stored) == files_last(job.truth("a", CALLS))


def test_a_replay_that_delivers_everything_says_so_whatever_the_sites_had_reported(make_job: MakeJob) -> None:
    """The dead receiver knew that both sites had more records.

    While the replay has delivered the first site's part only, the second's is still missing.
    """
    job = make_job(linger_s=60)
    trainers = [job.trainer(name, f"site-{name}", calls=CALLS, wait_at=10) for name in "ab"]
    receiver = job.receiver()
    senders = [job.sender(site) for site in job.sites()]

    def known(figure: str) -> list[int]:
        sites = journal_status(job.journal)["sites"].values()
        return [site[figure] for site in sites]

    wait_for(lambda: known("received") == [10, 10], "the first message of each site")
    for name in "ab":
        (job.folder / f"{name}.go").touch()
    for trainer in trainers:
        assert trainer.wait() == 0, trainer.log
    wait_for(lambda: known("logged") == [CALLS, CALLS], "the sites' reports of what they have not sent yet")
    assert known("received") == [10, 10]
    for proc in (*senders, receiver):
        proc.kill()

    job.replay_all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replay_at_the_site_delivers_the_rest_into_the_same_run(make_job: MakeJob, seed: int) -> None:
    """The site lost its receiver for good. Its own part goes into the store that the receiver wrote to."""
    chance = random.Random(seed)
    store = "abcdefgh"[seed % 8]
    kind = ("resumable", "idempotent", "at_least_once", "jsonl")[seed % 4]
    job = make_job({})
    path = job.folder / f"store-{store}"
    job.backends = {kind: {"path": str(path)}}
    trainers = [job.trainer(name, calls=CALLS) for name in ("a", "b")]
    receiver, sender = job.receiver(), job.sender(ack_loss=0.3, seed=seed)
    target = chance.randrange(100, CALLS)
    wait_for(lambda: job.count("b") >= target and job.held(kind), "a part of the training")
    sender.kill()
    for trainer in trainers:
        assert trainer.wait() == 0
    job.end(receiver=receiver)
    left = count_site(job.spool()).spooled
    assert left > 0

    replay = job.replay(*job.flags(**{kind: {"path": str(path)}}), path=job.spool())

    assert replay.wait() == 0, replay.log
    assert count_site(job.spool()).spooled == 0
    if kind == "at_least_once":
        held = job.held(kind)
        beside = count_receiver(job.spool().parent / "replay-server" / "trackhub.db")["site-1"].lanes[kind]
        assert len(held) - len(set(held)) <= beside.possible_duplicates
        assert len(set(held)) == 2 * CALLS
    else:
        job.check_delivered()


def test_a_replay_of_a_spool_goes_on_where_an_earlier_one_gave_up(make_job: MakeJob) -> None:
    """The records are then in the journal beside the spool, where the first replay left them."""
    job = make_job({})
    down = job.folder / "down"
    down.touch()
    job.backends = {"idempotent": {"path": str(job.folder / "store"), "down_while": str(down)}}
    assert job.trainer(calls=CALLS).wait() == 0
    first = job.replay(*job.flags(**job.backends), "--timeout-s", "1", path=job.spool())
    assert first.wait() == 1
    assert f"{CALLS} records are still not delivered" in first.log
    assert count_site(job.spool()).spooled == 0
    down.unlink()

    second = job.replay(path=job.spool())

    assert second.wait() == 0, second.log
    assert job.held("idempotent") == job.truth("a", CALLS, "idempotent")


def test_a_replay_from_the_start_of_a_spool_says_that_it_needs_a_journal(make_job: MakeJob) -> None:
    job = make_job()
    assert job.trainer(calls=CALLS).wait() == 0
    job.end(job.sender(), job.receiver())

    replay = job.replay("--from-start", path=job.spool())

    assert replay.wait() != 0
    assert "--from-start needs the journal" in replay.log


def test_a_damaged_spool_does_not_stop_the_replay_of_the_others(make_job: MakeJob) -> None:
    job = make_job(deadline_s=0)
    job_without_backends(job)
    damaged = job.folder / "site-0" / "trackhub" / "spool"
    damaged.mkdir(parents=True)
    (damaged / "spool.json").write_bytes(bytes([255]) * 5)
    job.backends = {"jsonl": {}}

    replay = job.replay("--backend", "jsonl")

    assert replay.wait() == 1
    assert str(damaged) in replay.log
    assert job.held("jsonl") == job.truth("a", CALLS)


def test_a_replay_on_a_terminal_shows_its_progress(make_job: MakeJob) -> None:
    job = make_job()
    job_without_backends(job)
    job.backends = {"idempotent": {}}
    terminal, side = pty.openpty()
    flags = job.flags(idempotent={"pause_s": 0.003, "max_batch": 100})

    replay = subprocess.Popen(
        [sys.executable, "-m", "trackhub.cli", "replay", str(job.folder), *flags],
        env={**job.env, "COLUMNS": "100"}, stdout=subprocess.DEVNULL, stderr=side, cwd=ROOT,
    )  # fmt: skip
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports a closed terminal so
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)

    assert replay.wait() == 0, shown
    assert re.search(rb"idempotent.*[1-5]00/600", shown), shown


def test_the_servers_part_must_be_replayed_before_the_sites_part(make_job: MakeJob) -> None:
    """Otherwise the store would take the site's records for those that the server still has."""
    job = make_job({})
    path = job.folder / "store"
    hang = job.folder / "down"
    job.backends = {"resumable": {"path": str(path), "down_while": str(hang), "pause_s": 0.005}}
    trainer = job.trainer(calls=1000, wait_at=800)
    receiver, sender = job.receiver(), job.sender()
    wait_for(lambda: len(job.held("resumable")) >= 50, "a part of the delivery")
    hang.touch()
    wait_for(lambda: count_site(job.spool()).acked == 800, "more in the journal")
    sender.kill()
    receiver.kill()
    (job.folder / "a.go").touch()
    assert trainer.wait() == 0
    assert len(job.held("resumable")) < 800
    hang.unlink()
    flags = job.flags(resumable={"path": str(path), "pause_s": 0})

    early = job.replay(*flags, path=job.spool())

    assert early.wait() == 1
    assert "Replay that journal first" in json.dumps(early.log + stored_errors(job))
    for path_of in (job.journal, job.spool().parent):
        replay = job.replay(*flags, path=path_of)
        assert replay.wait() == 0, replay.log
    job.check_delivered()


def stored_errors(job: JobProcesses) -> str:
    return "".join(path.read_text() for path in job.folder.rglob("delivery.json"))


def test_runs_keep_the_status_that_the_job_gave_them(make_job: MakeJob) -> None:
    job = make_job({"resumable": {}}, deadline_s=0)
    down = job.folder / "down"
    down.touch()
    job.backends = {"resumable": {"down_while": str(down)}}
    trainers = [job.trainer("a", "site-1", calls=100), job.trainer("b", "site-2", calls=100)]
    receiver = job.receiver()
    senders = [job.sender("site-1"), job.sender("site-2")]
    for trainer in trainers:
        assert trainer.wait() == 0
    assert senders[1].ask("flush 30") is True
    senders[1].kill()
    job.end(senders[0], receiver)
    down.unlink()

    job.replay_all()

    folder = job.folder / "server" / "resumable"
    assert (folder / "job-1-site-1.status").read_text() == "finished"
    assert (folder / "job-1-site-2.status").read_text() == "failed"
