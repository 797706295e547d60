# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import shutil
import sqlite3
import stat
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from trackhub.spi import Artifact, Entry, Metrics, RunStatus, Text

if TYPE_CHECKING:
    from pathlib import Path

    from backends.mlflow.tests.conftest import Rig
    from tests.support.mlflow_server import Server


@pytest.mark.parametrize("moved", [".", "mlflow"])
def test_a_moved_folder_opens_with_all_its_artifacts(
    make_rig: Callable[..., Rig],
    make_server: Callable[..., Server],
    entry: Callable[..., Entry],
    tmp_path: Path,
    moved: str,
) -> None:
    """The whole run folder may be moved, or the store's folder alone: the command of ``results`` works in both."""
    rig = make_rig("job")
    run = rig.open()
    artifact = Artifact("model/best.pt", rig.blob("b", b"weights"), "best.pt")
    run.write([entry(0, Metrics({"x": 1.0})), entry(1, artifact, 0), entry(2, Text("note", "# hi"), 0)])
    run.finish(RunStatus.FINISHED)
    results = rig.backend.results(rig.info())
    assert results is not None
    change_folder, _, command = str(results.command).partition(" && ")
    new = tmp_path / "downloaded"
    shutil.move(rig.workdir.parent / moved, new)

    assert change_folder == "cd mlflow"
    server = make_server(new / "mlflow" if moved == "." else new, command.split()[1:])

    run_id = server.database.site_run().id
    assert server.artifact(run_id, "model/best.pt") == b"weights"
    assert server.artifact(run_id, "text/note/step-00000000-p2.md") == b"# hi"
    listed = server.call(f"artifacts/list?run_id={run_id}&path=model")["files"]
    assert [file["path"] for file in listed] == ["model/best.pt"]
    assert server.call(f"metrics/get-history?run_id={run_id}&metric_key=x")["metrics"][0]["value"] == 1.0


@pytest.mark.parametrize(("shared", "folder", "file"), [(0o700, 0o700, 0o600), (0o755, 0o755, 0o644)])
def test_what_is_made_is_for_those_who_may_use_the_folder(
    make_rig: Callable[..., Rig], entry: Callable[..., Entry], shared: int, folder: int, file: int
) -> None:
    """SQLite gives the mode of the database to its files beside it."""
    rig = make_rig(empty=True)
    rig.workdir.chmod(shared)

    run = rig.open()
    artifact = Artifact("model/best.pt", rig.blob("b", b"weights"), "best.pt")
    run.write([entry(0, Metrics({"x": 1.0})), entry(1, artifact, 0), entry(2, Text("note", "# hi"), 0)])

    made = list(rig.workdir.rglob("*"))
    assert {path.name for path in made} >= {"mlflow.db", "best.pt", "step-00000000-p2.md"}
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else file), path


@pytest.mark.parametrize(
    "place", ["file://{outside}", "{outside}", "mlflow-artifacts:/../../../outside", "mlflow-artifacts://host/1"]
)
def test_a_store_in_the_jobs_folder_sends_no_artifact_elsewhere(
    rig: Rig, entry: Callable[..., Entry], tmp_path: Path, place: str
) -> None:
    """Somebody may have made the store of a job that is replayed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    rig.backend.preflight()
    with contextlib.closing(sqlite3.connect(rig.workdir / "mlflow.db")) as store, store:
        store.execute("UPDATE experiments SET artifact_location = ?", (place.format(outside=outside),))
    run = rig.open()

    report = run.write([entry(0, Artifact("a", rig.blob("b", b"x"), "a.desktop")), entry(1, Metrics({"x": 1.0}))])

    assert report is not None
    assert [(r.position, r.reason) for r in report.rejected] == [(0, "refused_by_mlflow")]
    assert list(tmp_path.rglob("a.desktop")) == []
