# SPDX-License-Identifier: Apache-2.0
"""What the backend says about looking at an offline run, while it is open and once it is finished."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from trackhub_wandb import WandBBackend

import trackhub
from backends.wandb.tests.conftest import Rig, entry, losses, png
from tests.support.wandb_emulator import Emulator
from trackhub.delivery.replay_journal_or_spool import replay_journal
from trackhub.spi import Artifact, Image, Results, RunStatus, Table


def results_of(backend: WandBBackend, rig: Rig) -> Results:
    """Return what the backend says of the run of site-1."""
    results = backend.results(rig.info())
    assert results is not None
    return results


def run_in_shell(command: str, emulator: Emulator) -> None:
    """Run a command line as somebody who is logged in at the emulator, and has activated this environment."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "WANDB_BASE_URL": emulator.url,
        "WANDB_API_KEY": emulator.state.api_key,
    }
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_a_finished_run_has_a_command_that_uploads_it(rig: Rig, emulator: Emulator) -> None:
    """``wandb sync`` never uploads what is written to a folder after it."""
    backend = rig.backend(mode="offline", project="demo")
    run = backend.open_run(rig.info())
    run.write(losses(range(10)))
    run.flush()

    while_open = results_of(backend, rig).resolved(rig.folder).openings()
    run.write(losses(range(10, 20)))
    run.flush()
    run.finish(RunStatus.FINISHED)
    shows, uploads = results_of(backend, rig).resolved(rig.folder).openings()

    assert while_open == [shows]
    assert "wandb leet " in shows
    run_in_shell(uploads, emulator)
    assert [row["loss"] for row in emulator.state.run(rig.info().run_id).history()] == [n / 2 for n in range(20)]


def test_a_run_that_is_opened_again_is_not_uploaded_until_it_is_finished_again(rig: Rig) -> None:
    for resume_from in (0, 5):
        backend = rig.backend(mode="offline")
        run = backend.open_run(rig.info(resume_from=resume_from))
        run.write(losses(range(resume_from, resume_from + 5)))
        run.flush()

        assert results_of(backend, rig).command == "wandb leet wandb"
        run.finish(RunStatus.FINISHED)
        assert "wandb sync wandb/offline-run-" in str(results_of(backend, rig).command)


def test_results_give_the_folder_and_a_command_that_uploads_it(rig: Rig, emulator: Emulator) -> None:
    """The command also uploads artifacts after somebody moved the run folder and deleted its blobs."""
    backend = rig.backend(mode="offline", project="demo")
    run = backend.open_run(rig.info())
    blob = rig.blob(b"weights", "application/octet-stream")
    run.write([*losses(range(20)), entry(20, Artifact("model", blob, "m.pt", "model"))])
    run.write([entry(21, Table("t", ["a"], [[1]])), entry(22, Image("i", rig.blob(png(), "image/png"), 8, 6))])
    run.finish(RunStatus.FAILED)
    results = results_of(backend, rig)
    (folder,) = (path.name for path in rig.wandb_dir.glob("offline-run-*"))
    assert (results.path, results.command) == (f"wandb/{folder}", f"wandb leet wandb\nwandb sync wandb/{folder}")
    moved = rig.folder.with_name("moved to")
    shutil.rmtree(rig.blobs)
    rig.folder.rename(moved)
    shows, uploads = results.resolved(moved).openings()
    assert shows.startswith(f"cd '{moved}' && ")
    assert shows.endswith("wandb leet wandb")
    run_in_shell(uploads, emulator)
    uploaded = emulator.state.run(rig.info().run_id)
    assert (uploaded.project, uploaded.fields["displayName"], uploaded.state) == (
        "demo",
        "fedavg lr=0.1/site-1",
        "failed",
    )
    assert [row["loss"] for row in uploaded.history()[:20]] == [n / 2 for n in range(20)]
    assert {one.collection: one.state for one in emulator.state.artifacts if one.artifact_type == "model"} == {
        "model--site-1": "COMMITTED"
    }


def test_a_replay_does_not_take_the_backends_own_names_of_a_file_for_a_way_out(tmp_path: Path) -> None:
    """W&B's folder has a logged file under a second name, and a hard link may be somebody's trick."""
    file = tmp_path / "model.bin"
    file.write_bytes(b"weights")
    with trackhub.local({"wandb": {"mode": "offline"}}, folder=tmp_path / "runs", job="a", quiet=True) as writer:
        writer.log_artifact(file)
    (blob,) = (writer.folder / "trackhub" / "blobs" / "local").iterdir()
    assert blob.stat().st_nlink > 1

    report = replay_journal(writer.folder / "trackhub" / "trackhub.db")

    assert report.lanes["wandb"]["local"].pending == 0
