# SPDX-License-Identifier: Apache-2.0
"""In a folder that others may write to, no link is followed where ``jsonl`` keeps its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from trackhub.builtin.jsonl import JsonlBackend, JsonlOptions
from trackhub.spi import Artifact, BackendContext, Blob, Entry, JobInfo, Metrics, Payload, RunInfo, Side, TransientError


def entry(payload: Payload) -> Entry:
    return Entry(0, 1.0, 0, None, payload, "s", 0)


@pytest.mark.parametrize("what", ["run", "artifact"])
def test_a_link_in_place_of_a_file_is_an_error_and_its_target_stays(tmp_path: Path, what: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("no line")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "b-0").write_text("content")
    backend = JsonlBackend(JsonlOptions(), BackendContext(tmp_path / "jsonl", JobInfo("job"), Side.SERVER))
    info = RunInfo(JobInfo("job"), "site-1", Side.SERVER, 0.0, resume_from=0, blob_dir=tmp_path / "blobs", parent=None)
    folder = (tmp_path / str(backend.results(info).path)).parent
    folder.mkdir(parents=True)
    link = folder / "site-1.jsonl" if what == "run" else folder / "site-1.files" / "0.bin"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(victim)

    artifact = Artifact("model", Blob("b-0", 7, "", "application/octet-stream"), "model.bin", "file")
    with pytest.raises(TransientError):
        backend.open_run(info).write([entry(Metrics({"loss": 1.0}) if what == "run" else artifact)])

    assert victim.read_text() == "no line"
