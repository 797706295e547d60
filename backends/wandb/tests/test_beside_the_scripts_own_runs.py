# SPDX-License-Identifier: Apache-2.0
"""A script that uses W&B itself, in the process of a receiver: neither sees the other's runs, sweep or environment."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trackhub_wandb import WandBBackend, sdk_start_and_stop
from trackhub_wandb.offline_readback import find_runs

from backends.wandb.tests.conftest import Rig, losses
from tests.support.wandb_emulator import Emulator
from trackhub.spi import PermanentError, RunStatus

Online = Callable[..., WandBBackend]

SWEEP = {"WANDB_SWEEP_ID": "abc"}
LAUNCH = {"WANDB_LAUNCH": "true"}
SAGEMAKER = {"SM_TRAINING_ENV": "{}", "TRAINING_JOB_NAME": "job-of-sagemaker"}
OTHER_RUN = {"WANDB_RUN_ID": "of-the-script", "WANDB_NAME": "of the script", "WANDB_RESUME": "must"}
RESUMED = {"WANDB_RESUME_FROM": "other?_step=3"}
FORKED = {"WANDB_FORK_FROM": "other?_step=3"}
ENVIRONMENTS = pytest.mark.parametrize(
    "environment",
    [SWEEP, LAUNCH, SAGEMAKER, OTHER_RUN, RESUMED, FORKED],
    ids=["sweep", "launch", "sagemaker", "other run", "resumed", "forked"],
)


@pytest.mark.parametrize("reinit", ["default", "return_previous", "finish_previous", True, "create_new", "notebook"])
def test_a_scripts_own_run_is_another_one(
    rig: Rig, tmp_path: Path, reinit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    if reinit == "notebook":
        monkeypatch.setattr("wandb.sdk.lib.ipython.in_notebook", lambda: True)
    settings = {"silent": True, "console": "off", **({} if reinit == "notebook" else {"reinit": reinit})}
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write(losses(range(5)))

    own = wandb.init(project="mine", mode="offline", dir=tmp_path, config={"lr": 0.1}, settings=settings)
    own.log({"mine": 1.0})
    run.write(losses(range(5, 10)))
    own.log({"mine": 2.0})
    own.finish()
    run.write(losses(range(10, 12)))
    run.flush()
    run.finish(RunStatus.FINISHED)

    (ours,) = find_runs(rig.wandb_dir)
    (theirs,) = find_runs(tmp_path / "wandb")
    assert [row["loss"] for row in ours.rows] == [position / 2 for position in range(12)]
    assert ours.config.keys() == {"trackhub"}
    assert [row["mine"] for row in theirs.rows] == [1.0, 2.0]
    assert (theirs.settings["project"], theirs.settings["run_id"]) == ("mine", own.id)


@ENVIRONMENTS
def test_what_the_environment_has_for_the_scripts_run_is_not_for_ours(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    run = rig.backend(mode="offline", project="demo").open_run(rig.info())
    run.write(losses(range(3)))
    run.flush()
    run.finish(RunStatus.FINISHED)

    (ours,) = find_runs(rig.wandb_dir)
    assert len(ours.rows) == 3
    assert ours.config.keys() == {"trackhub"}
    named = {key: ours.settings[key] for key in ("run_id", "project", "display_name")}
    assert named == {"run_id": rig.info().run_id, "project": "demo", "display_name": "fedavg lr=0.1/site-1"}


@ENVIRONMENTS
def test_an_online_run_goes_on_in_itself_whatever_the_environment_has(
    online: Online, rig: Rig, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    for end in (3, 6):
        backend = online()
        run = backend.open_run(rig.info())
        run.write(losses(range(end)))
        run.flush()
        run.finish(RunStatus.FINISHED)
        backend.close()

    assert [json.loads(row)["loss"] for row in emulator.state.run(rig.info().run_id).rows] == [p / 2 for p in range(6)]
    assert len(emulator.state.runs) == 1


def test_the_script_keeps_its_sweep_and_what_it_sets_in_the_environment_later(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write(losses(range(3)))
    monkeypatch.setenv("WANDB_PROJECT", "later")
    monkeypatch.setenv("WANDB_SILENT", "true")

    own = wandb.init(mode="offline", dir=tmp_path)
    seen = own.settings.sweep_id, own.project
    own.finish()
    run.finish(RunStatus.FINISHED)

    assert seen == ("abc", "later")


def test_a_run_that_the_sdk_opens_under_another_id_gets_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = sdk_start_and_stop._FROM_ENVIRONMENT | {"sweep_id"}
    monkeypatch.setattr(sdk_start_and_stop, "_FROM_ENVIRONMENT", taken)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")

    with pytest.raises(PermanentError, match=rf"opened the run \w+ instead of {rig.info().run_id}: see which WANDB_"):
        rig.backend(mode="offline").open_run(rig.info())


def test_a_thread_of_the_script_that_opens_its_run_at_the_same_time_gets_its_own(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    own: list[Any] = []
    inform = wandb.sdk.lib.service.service_connection.ServiceConnection.inform_init

    def in_the_middle(self: Any, settings: Any, run_id: str) -> Any:
        interface = inform(self, settings, run_id)
        if run_id == rig.info().run_id:
            thread = threading.Thread(
                target=lambda: own.append(wandb.init(project="mine", mode="offline", dir=tmp_path))
            )
            thread.start()
            thread.join()
        return interface

    monkeypatch.setattr("wandb.sdk.lib.service.service_connection.ServiceConnection.inform_init", in_the_middle)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write(losses(range(3)))
    own[0].log({"mine": 1.0})
    own[0].finish()
    run.flush()
    run.finish(RunStatus.FINISHED)

    (ours,) = find_runs(rig.wandb_dir)
    (theirs,) = find_runs(tmp_path / "wandb")
    assert (len(ours.rows), ours.settings["run_id"]) == (3, rig.info().run_id)
    assert [row["mine"] for row in theirs.rows] == [1.0]
    assert own[0].settings.sweep_id == "abc"


def test_what_ends_the_scripts_run_leaves_ours_open(rig: Rig, tmp_path: Path) -> None:
    import wandb

    run = rig.backend(mode="offline").open_run(rig.info())
    run.write(losses(range(3)))
    wandb.init(project="mine", mode="offline", dir=tmp_path, settings={"silent": True})
    wandb.log({"mine": 1.0})
    wandb.finish()
    run.write(losses(range(3, 6)))
    run.flush()
    run.finish(RunStatus.FINISHED)

    (ours,) = find_runs(rig.wandb_dir)
    assert len(ours.rows) == 6
    assert wandb.run is None
