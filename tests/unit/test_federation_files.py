# SPDX-License-Identifier: Apache-2.0
"""Files and labels of the federation run: bytes arrive whole and are counted, and a restart labels nothing anew."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.test_federation_run import make_receiver, stored
from trackhub.delivery.blob_store import BlobStore
from trackhub.errors import JournalError
from trackhub.job_and_run_info import RunStatus


def test_a_file_becomes_an_artifact_of_the_federation_run(tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    model.write_bytes(bytes(range(256)) * 10_000)
    receiver = make_receiver(tmp_path / "job")
    receiver.start()
    assert receiver.federation is not None

    with model.open("rb") as file:
        receiver.federation.log_file(file, "model/model.pt", "model")
    report = receiver.finish(RunStatus.FINISHED)

    (line,) = [line for line in stored(tmp_path / "job") if line["kind"] == "artifact"]
    assert (line["key"], line["artifact_type"]) == ("model/model.pt", "model")
    copies = [path for path in (tmp_path / "job" / "jsonl").rglob("*.pt") if path.is_file()]
    assert [path.read_bytes() for path in copies] == [model.read_bytes()]
    site = report.sites["federation"]
    assert site.at_site is not None
    assert (site.at_site.logged, site.journaled) == (1, 1)
    assert report.lanes["jsonl"]["federation"].confirmed == 1


def test_a_file_waits_only_a_moment_for_a_locked_journal(tmp_path: Path) -> None:
    """FLARE's server logs its model in the thread that ends the job."""
    model = tmp_path / "model.pt"
    model.write_bytes(b"weights")
    receiver = make_receiver(tmp_path / "job")
    receiver.start()
    assert receiver.federation is not None
    with closing(sqlite3.connect(receiver.folder / "trackhub.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        with model.open("rb") as file, pytest.raises(JournalError, match="locked"):
            receiver.federation.log_file(file, "model/model.pt", "model")
        took_s = time.monotonic() - start
        other.execute("ROLLBACK")
    receiver.finish(RunStatus.FINISHED)

    assert took_s < 5.0


def test_a_later_receiver_of_the_job_labels_the_run_no_second_time(tmp_path: Path) -> None:
    for value in (1, 2):
        receiver = make_receiver(tmp_path)
        receiver.start()
        assert receiver.federation is not None
        receiver.federation.log_params({"context/x": value, "": "no key"})
        receiver.federation.set_tags({"source.git.commit": str(value)})
        receiver.federation.log({"fl/x": value}, value)
        receiver.finish(RunStatus.FINISHED)

    labels = [line["values"] for line in stored(tmp_path) if line["kind"] in ("params", "tags")]
    assert labels == [{"context/x": 1}, {"source.git.commit": "1"}]


def test_a_file_that_cannot_be_read_leaves_nothing_behind(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")

    (tmp_path / "closed").write_bytes(b"x")
    with (tmp_path / "closed").open("rb") as file:
        pass

    with pytest.raises(ValueError, match="closed file"):
        store.keep("federation", f"{'a' * 32}-1", file, "model.pt")

    assert [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == []
