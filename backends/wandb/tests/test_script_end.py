# SPDX-License-Identifier: Apache-2.0
"""The end of a script that leaves its W&B run open, where Python starts no new threads any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.script_without_new_threads import run_script_without_new_threads
from tests.support.wandb_emulator import Emulator


def test_an_offline_run_is_finished_and_can_be_uploaded_without_new_threads(tmp_path: Path) -> None:
    ended = run_script_without_new_threads(tmp_path, "wandb", {"mode": "offline"})

    assert (ended.run.confirmed, ended.run.pending, ended.run.state) == (7, 0, "finished"), ended.stderr
    assert ended.run.last_error == ""
    assert "wandb sync" in ended.stderr


def test_an_online_run_that_logs_its_model_last_is_finished_without_new_threads(
    tmp_path: Path, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", emulator.state.api_key)
    options = {"mode": "online", "base_url": emulator.url, "api_key": "${secret:KEY}", "upload_interval_s": 1.0}

    ended = run_script_without_new_threads(tmp_path, "wandb", options)

    assert (ended.run.confirmed, ended.run.pending, ended.run.state) == (7, 0, "finished"), ended.stderr
    (run,) = emulator.state.runs.values()
    assert (run.state, len(run.history())) == ("finished", 6)
    assert [one.state for one in emulator.state.artifacts if one.artifact_type == "model"] == ["COMMITTED"]
