# SPDX-License-Identifier: Apache-2.0
"""A journal from elsewhere reaches no host, file or secret of whoever replays it, opens or lists it."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import STREAM, batch_of, json_lines, metric
from trackhub import Writer
from trackhub.delivery import create_spool
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.replay_journal_or_spool import journal_for_spool, replay_journal, replay_spool
from trackhub.errors import ConfigError, SpoolError
from trackhub.framing import encode_frame
from trackhub.job_and_run_info import RunStatus
from trackhub.spool.layout import SpoolInfo, read_spool_info

TOKEN = "planted-token-0123456789"


@pytest.fixture
def stranger() -> Iterator[tuple[str, list[str]]]:
    """A server of somebody else, and what it was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers}")
            self.send_error(404)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def journal_from_elsewhere(folder: Path, backends: dict[str, dict[str, Any]]) -> Path:
    """Make the journal of a finished job, with three records of one site and these options."""
    path = folder / "job" / "trackhub" / "trackhub.db"
    journal = Journal.open(path, job="job-1", side="server")
    journal.append(journal.add_site("site-1", 1000.0), batch_of([metric(seq) for seq in range(3)]), {})
    journal.set_facts({"backends": json.dumps(backends), "status": RunStatus.FINISHED})
    journal.close()
    return path


def replay(path: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trackhub.cli", "replay", str(path), "--timeout-s", "3", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environ})


def test_no_host_in_a_journal_gets_a_credential(tmp_path: Path, stranger: tuple[str, list[str]]) -> None:
    host, asked = stranger
    path = journal_from_elsewhere(tmp_path, {"mlflow": {"tracking_uri": host}})

    done = replay(path, MLFLOW_TRACKING_TOKEN=TOKEN)

    assert done.returncode == 1
    assert asked == []
    assert "is not a host that the operator named" in done.stderr
    assert "--option" in done.stderr
    assert "--trust-journal" in done.stderr


@pytest.mark.parametrize(
    ("backend", "option"), [("jsonl", {"path": "{outside}"}), ("mlflow", {"tracking_uri": "sqlite:///{outside}/x.db"})]
)
def test_no_path_in_a_journal_is_written_outside_the_jobs_folder(
    tmp_path: Path, backend: str, option: dict[str, str]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    options = {key: value.format(outside=outside) for key, value in option.items()}

    done = replay(journal_from_elsewhere(tmp_path, {backend: options}))

    assert done.returncode == 1
    assert "is outside the job's own folder" in done.stderr
    assert list(outside.iterdir()) == []


def test_no_secret_that_a_journal_refers_to_is_resolved(tmp_path: Path) -> None:
    path = journal_from_elsewhere(tmp_path, {"wandb": {"api_key": "${secret:PLANTED}"}})

    done = replay(path, PLANTED=TOKEN)

    assert done.returncode == 1
    assert "may not refer to the secret PLANTED" in done.stderr
    assert not any(TOKEN.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_what_the_command_line_says_is_not_restricted(tmp_path: Path) -> None:
    """It replaces what the journal says of the same option, so the rest of the journal's options may stay."""
    path = journal_from_elsewhere(tmp_path, {"jsonl": {"path": "/nobody/names/this"}})

    done = replay(path, "--backend", "jsonl", "--option", f"jsonl.path={tmp_path / 'mine'}")

    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "mine").rglob("*.jsonl")
    assert len(json_lines(file)) == 3


def test_the_operators_file_allows_a_folder_for_a_replay_too(tmp_path: Path) -> None:
    path = journal_from_elsewhere(tmp_path, {"jsonl": {"path": str(tmp_path / "shared")}})
    local = tmp_path / "site" / "local"
    local.mkdir(parents=True)
    (local / "trackhub.toml").write_text(f'[backends.jsonl]\npaths = ["{tmp_path / "shared"}"]\n')

    done = replay(path, "--workspace", str(local.parent))

    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "shared").rglob("*.jsonl"))


def test_a_journal_of_ones_own_can_be_trusted_as_it_is(tmp_path: Path) -> None:
    path = journal_from_elsewhere(tmp_path, {"jsonl": {"path": str(tmp_path / "mine")}})

    done = replay(path, "--trust-journal")

    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "mine").rglob("*.jsonl"))


def test_a_journal_of_another_user_chooses_no_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may name the id of a job of yours, whose runs would then get its records."""
    path = journal_from_elsewhere(tmp_path, {"jsonl": {}})
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)

    with pytest.raises(ConfigError, match=f"the user with the id {me}, and not to you.* 'job-1'.* into jsonl") as error:
        replay_journal(path)

    assert "--backend" in str(error.value)
    assert "--trust-journal" in str(error.value)
    assert not list(tmp_path.rglob("*.jsonl"))
    assert replay_journal(path, backends={"jsonl": {}}).lanes["jsonl"]["site-1"].confirmed == 3
    assert replay_journal(path, operator=None).lanes["jsonl"]["site-1"].confirmed == 3


def test_a_link_in_the_place_of_a_backends_folder_is_not_followed(tmp_path: Path) -> None:
    path = journal_from_elsewhere(tmp_path, {"jsonl": {}, "tensorboard": {}})
    outside = tmp_path / "outside"
    outside.mkdir()
    (path.parent.parent / "jsonl").symlink_to(outside)
    (path.parent.parent / "tensorboard").symlink_to(outside)

    done = replay(path)

    assert done.returncode == 1
    assert list(outside.iterdir()) == []


WRITTEN = [
    ("jsonl", "jsonl/job-1"),
    ("jsonl", "jsonl/job-1/job.json"),
    ("jsonl", "jsonl/job-1/site-1.jsonl"),
    ("jsonl", "jsonl/job-1/site-1.files"),
    ("tensorboard", "tensorboard/job-1"),
    ("tensorboard", "tensorboard/job-1/site-1"),
    ("tensorboard", "tensorboard/job-1/site-1/.hparams.part"),
    ("mlflow", "mlflow/mlflow.db"),
    ("mlflow", "mlflow/mlartifacts"),
    ("mlflow", "mlflow/mlartifacts/1"),
    ("wandb", "wandb/offline-run-20251124_160000-abc"),
    ("wandb", "wandb/settings"),
    ("jsonl", "trackhub/blobs"),
    ("jsonl", "trackhub/blobs/federation"),
    ("jsonl", "trackhub/delivery.json"),
]
"""Backends, and what trackhub or these write below a job's run folder."""


@pytest.mark.parametrize(("backend", "link"), WRITTEN, ids=[link for _, link in WRITTEN])
def test_a_link_below_the_jobs_folder_leads_no_replay_out_of_it(tmp_path: Path, backend: str, link: str) -> None:
    path = journal_from_elsewhere(tmp_path, {backend: {}})
    outside = tmp_path / "outside"
    outside.mkdir()
    place = tmp_path / "job" / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside / "file" if place.suffix else outside)

    with pytest.raises(ConfigError, match="leads out of") as refused:
        replay_journal(path, timeout_s=0)

    assert str(place) in str(refused.value)
    assert list(outside.iterdir()) == []


HARD_LINKS = [
    ("jsonl", "jsonl/job-1/site-1.jsonl"),
    ("tensorboard", "tensorboard/job-1/site-1/events.out.tfevents.1.x"),
    ("mlflow", "mlflow/mlflow.db"),
    ("wandb", "wandb/offline-run-20251124_160000-abc/run-abc.wandb"),
    ("jsonl", f"trackhub/blobs/site-1/{STREAM}-0"),
    ("jsonl", "trackhub/spool/usage"),
]
"""Backends, and files below a job's run folder that are appended to, overwritten or sent to the backend."""


@pytest.mark.parametrize(("backend", "link"), HARD_LINKS, ids=[link for _, link in HARD_LINKS])
def test_a_hard_link_below_the_jobs_folder_leads_no_replay_out_of_it(tmp_path: Path, backend: str, link: str) -> None:
    path = journal_from_elsewhere(tmp_path, {backend: {}})
    mine = tmp_path / "mine"
    mine.write_bytes(b"")
    place = tmp_path / "job" / link
    place.parent.mkdir(parents=True)
    place.hardlink_to(mine)

    with pytest.raises(ConfigError, match="is a hard link") as refused:
        replay_journal(path, timeout_s=0)

    assert str(place) in str(refused.value)
    assert "--trust-journal" in str(refused.value)
    assert mine.read_bytes() == b""


def test_two_names_of_a_file_within_the_jobs_folder_hold_no_replay_up(tmp_path: Path) -> None:
    path = journal_from_elsewhere(tmp_path, {"jsonl": {}})
    notes = path.with_name("notes")
    notes.write_text("mine")
    path.with_name("notes-again").hardlink_to(notes)
    in_backend = path.parent.parent / "wandb" / "notes"
    in_backend.parent.mkdir()
    in_backend.hardlink_to(notes)

    assert replay_journal(path).lanes["jsonl"]["site-1"].confirmed == 3


def test_a_trusted_job_may_have_hard_links(tmp_path: Path) -> None:
    """A backup that `cp -al` made has the files of the job under a second name each."""
    path = journal_from_elsewhere(tmp_path, {"jsonl": {}})
    (tmp_path / "backup").hardlink_to(path)

    assert replay_journal(path, operator=None).lanes["jsonl"]["site-1"].confirmed == 3


def test_a_link_in_the_spool_of_a_site_leads_no_replay_out_of_it(tmp_path: Path) -> None:
    """The spool may lie elsewhere than the journal that its records go through."""
    journal = journal_from_elsewhere(tmp_path, {"jsonl": {}})
    spool, mine = tmp_path / "site-1" / "spool", tmp_path / "mine"
    create_spool(spool, SpoolInfo("site-1", "job-1", ("server",)))
    with Writer(spool) as writer:
        writer.log({"loss": 0.5}, step=0)
    mine.write_text("mine")
    (spool / "round").unlink(missing_ok=True)
    (spool / "round").hardlink_to(mine)

    with pytest.raises(ConfigError, match="is a hard link"):
        replay_spool(spool, cursor="server", journal=journal, timeout_s=0)

    assert mine.read_text() == "mine"


def test_a_link_in_a_folder_that_the_journals_options_name_is_not_followed(tmp_path: Path) -> None:
    path = journal_from_elsewhere(tmp_path, {"jsonl": {"path": "results"}})
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "job" / "results").mkdir()
    (tmp_path / "job" / "results" / "job-1").symlink_to(outside)

    with pytest.raises(ConfigError, match="leads out of"):
        replay_journal(path, timeout_s=0)

    assert list(outside.iterdir()) == []


def test_a_pipe_in_the_place_of_a_backends_file_holds_no_replay_up(tmp_path: Path) -> None:
    path = journal_from_elsewhere(tmp_path, {"jsonl": {}})
    (tmp_path / "job" / "jsonl" / "job-1").mkdir(parents=True)
    os.mkfifo(tmp_path / "job" / "jsonl" / "job-1" / "site-1.jsonl")

    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        replay_journal(path, timeout_s=0)


def test_a_spools_new_journal_is_made_through_no_link(tmp_path: Path) -> None:
    spool, outside = tmp_path / "job" / "trackhub" / "spool", tmp_path / "outside"
    outside.mkdir()
    create_spool(spool, SpoolInfo("job-1", "site-1", ("server",)))
    with Writer(spool) as writer:
        writer.log({"loss": 0.5}, step=0)
    (spool.parent / "replay-server").symlink_to(outside)
    journal = journal_for_spool(spool, "server", [])

    with pytest.raises(ConfigError, match="leads out of"):
        replay_spool(spool, cursor="server", journal=journal, backends={"jsonl": {}}, timeout_s=0)

    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("linked", ["job", "tensorboard"])
def test_a_users_own_links_are_followed(tmp_path: Path, linked: str) -> None:
    """A whole job may be on another disk; a link that stays in a backend's folder, as W&B makes them, hurts nobody."""
    path = journal_from_elsewhere(tmp_path, {"tensorboard": {}})
    runs = tmp_path / "job" / "tensorboard"
    runs.mkdir()
    if linked == "job":
        (tmp_path / "job").rename(tmp_path / "disk")
        (tmp_path / "job").symlink_to(tmp_path / "disk")
    else:
        (runs / "first").mkdir()
        (runs / "latest").symlink_to("first")

    report = replay_journal(path)

    assert report.lanes["tensorboard"]["site-1"].confirmed == 3
    assert list(runs.rglob("events.out.tfevents*"))


def test_a_trusted_job_may_have_links_that_lead_out_of_it(tmp_path: Path) -> None:
    path = journal_from_elsewhere(tmp_path, {"tensorboard": {}})
    (tmp_path / "baseline").mkdir()
    (tmp_path / "job" / "tensorboard").mkdir()
    (tmp_path / "job" / "tensorboard" / "baseline").symlink_to(tmp_path / "baseline")

    report = replay_journal(path, operator=None)

    assert report.lanes["tensorboard"]["site-1"].confirmed == 3


def test_a_journal_that_is_only_looked_at_reaches_nothing(tmp_path: Path, stranger: tuple[str, list[str]]) -> None:
    host, asked = stranger
    path = journal_from_elsewhere(tmp_path, {"mlflow": {"tracking_uri": host, "note": "${secret:PLANTED}"}})
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}

    command = [sys.executable, "-X", "importtime", "-m", "trackhub.cli", "status", str(path)]
    environ = {**os.environ, "PLANTED": TOKEN, "MLFLOW_TRACKING_TOKEN": TOKEN}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)

    assert done.returncode == 1, done.stderr  # the site sent no counts
    assert asked == []
    assert "trackhub.delivery" in done.stderr
    assert "trackhub_mlflow.backend" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()} == before


FILES_OF_A_JOB = [
    "trackhub.db", "trackhub.db-wal", "trackhub.db-journal", "trackhub.lock", "spool/spool.json", "spool/round",
    f"spool/{STREAM}.ledger", f"spool/{STREAM}.server.ack", f"spool/{STREAM}-000000.spool", "spool/server.lock",
    "spool/usage",
]  # fmt: skip


def test_a_pipe_in_the_place_of_a_jobs_file_holds_up_nobody_who_looks(tmp_path: Path) -> None:
    """Nobody writes into the pipe, so that a plain ``open`` would never return."""
    calls = []
    for number, name in enumerate(FILES_OF_A_JOB):
        own = journal_from_elsewhere(tmp_path / str(number), {"jsonl": {}}).parent
        create_spool(own / "spool", SpoolInfo("site-1", "job-1", ("server",)))
        (own / "spool" / f"{STREAM}-000000.spool").write_bytes(encode_frame(metric(0)))
        (own / name).unlink(missing_ok=True)
        os.mkfifo(own / name)
        path = str(own)
        calls += [["status", path], ["export", path, "--to", str(tmp_path / f"{number}.csv")], ["prune", path]]

    done = subprocess.run(
        [sys.executable, "-c", _CALL, json.dumps(calls)], capture_output=True, text=True, timeout=60, check=True
    )

    assert done.stdout.count("returned\n") == len(calls)
    assert "Traceback" not in done.stderr


_CALL = """
import json, sys
from trackhub.cli.app import _trackhub
from trackhub.errors import TrackhubError
for call in json.loads(sys.argv[1]):
    try:
        _trackhub(call)
    except (SystemExit, TrackhubError):
        print("returned")
"""


def test_a_file_of_a_spool_that_is_endless_is_not_read_into_memory(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    create_spool(spool, SpoolInfo("site-1", "job-1", ("server",)))
    with open(spool / "spool.json", "wb") as file:
        file.truncate(1 << 40)  # it takes no disk

    with pytest.raises(SpoolError, match="it has more than"):
        read_spool_info(spool)
