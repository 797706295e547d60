# SPDX-License-Identifier: Apache-2.0
"""The end of a script that leaves its MLflow run open, where Python starts no new threads any more."""

from __future__ import annotations

from pathlib import Path

from tests.support.mlflow_server import Server
from tests.support.script_without_new_threads import run_script_without_new_threads


def test_a_run_that_logs_its_model_last_is_finished_without_new_threads(tmp_path: Path, server: Server) -> None:
    ended = run_script_without_new_threads(tmp_path, "mlflow", {"tracking_uri": server.url})

    assert (ended.run.confirmed, ended.run.pending, ended.run.state) == (7, 0, "finished"), ended.stderr
    assert ended.run.last_error == ""
