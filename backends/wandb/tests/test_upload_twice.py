# SPDX-License-Identifier: Apache-2.0
"""An offline run that was uploaded, goes on, and is uploaded again: W&B has each row once."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest
from trackhub_wandb import sdk_start_and_stop
from trackhub_wandb.offline import is_uploaded
from trackhub_wandb.sdk_start_and_stop import import_sdk

import trackhub
from backends.wandb.tests.conftest import Rig, entry, losses
from backends.wandb.tests.test_results import results_of, run_in_shell
from tests.support.wandb_emulator import Emulator
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.spi import Metrics, Params, RunStatus, Summary, TransientError


def uploading_command(folder: Path) -> str:
    """Return the command that a person reads at the end of the job."""
    results = read_journal_report(folder / "trackhub" / "trackhub.db").lanes["wandb"]["local"].results
    assert results is not None
    (command,) = (line for line in results.openings() if "wandb sync" in line)
    return command


def test_a_run_that_goes_on_after_its_upload_is_uploaded_again_without_doubles(
    tmp_path: Path, emulator: Emulator
) -> None:
    commands = []
    for first in (0, 10):
        with trackhub.local(
            {"wandb": {"mode": "offline"}}, folder=tmp_path, job="j", resume=first > 0, quiet=True
        ) as writer:
            for step in range(first, first + 10):
                writer.log({"loss": float(step), f"from_{first}": 1.0}, step=step)
        commands.append(uploading_command(writer.folder))
        run_in_shell(commands[-1], emulator)

    (run,) = emulator.state.runs.values()
    assert [row["loss"] for row in run.history()] == [float(step) for step in range(20)]
    assert run.resent == 0
    assert '"from_0":1' in run.summary
    assert '"loss":19' in run.summary
    assert commands[0] != commands[1]


def test_what_is_written_after_an_upload_has_all_but_the_uploaded_rows(rig: Rig, emulator: Emulator) -> None:
    records = [*losses(range(5)), entry(5, Params({"lr": 0.1})), entry(6, Summary({"best": 2.0})), *losses(range(7, 9))]
    for end in (len(records), len(records), len(records) + 1):
        backend = rig.backend(mode="offline")
        run = backend.open_run(rig.info())
        run.write([*records, entry(9, Metrics({"loss": 9.0}))][:end])
        run.flush()
        run.finish(RunStatus.FINISHED)
        run_in_shell(results_of(backend, rig).resolved(rig.folder).openings()[-1], emulator)

    uploaded = emulator.state.run(rig.info().run_id)
    assert [row["_step"] for row in uploaded.history()] == [0, 1, 2, 3, 4, 7, 8, 9]
    assert (uploaded.params()["lr"], uploaded.state) == (0.1, "finished")
    assert '"best":2' in uploaded.summary


def test_a_run_that_was_uploaded_while_it_was_open_is_written_anew(rig: Rig, emulator: Emulator) -> None:
    """Nobody knows which of its rows W&B has, and a row that comes twice is better than one that never comes."""
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write(losses(range(5)))
    run.flush()
    run.finish(RunStatus.FINISHED)
    (folder,) = rig.wandb_dir.glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    log.with_suffix(".wandb.synced").touch()
    assert is_uploaded(folder)
    os.utime(log.with_suffix(".wandb.synced"), (1.0, 1.0))
    assert not is_uploaded(folder)

    rig.backend(mode="offline").open_run(rig.info()).finish(RunStatus.FINISHED)

    (anew,) = rig.wandb_dir.glob("offline-run-*")  # of the same name, if it was begun in the same second
    assert not list(anew.glob("*.synced"))


def test_an_uploaded_folder_that_is_damaged_is_named_and_leaves_no_run_open(rig: Rig) -> None:
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write(losses(range(5)))
    run.finish(RunStatus.FINISHED)
    (folder,) = rig.wandb_dir.glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    no_record = b"\xff" * 4
    log.write_bytes(log.read_bytes()[:7] + struct.pack("<IHB", 0, len(no_record), 1) + no_record)
    log.with_suffix(".wandb.synced").touch()

    for _ in range(2):
        named = re.escape(str(folder))
        with pytest.raises(TransientError, match=rf"{named} cannot be read: DecodeError: .*Move the folder away"):
            rig.backend(mode="offline").open_run(rig.info())
        singleton = import_sdk().sdk.wandb_setup._singleton
        assert singleton is None or not sdk_start_and_stop._own_runs.get(singleton)

    folder.rename(rig.folder / "moved")
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write(losses(range(5)))
    run.finish(RunStatus.FINISHED)
    (anew,) = rig.wandb_dir.glob("offline-run-*")
    assert not is_uploaded(anew)
