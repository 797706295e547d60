# SPDX-License-Identifier: Apache-2.0
"""A receiver whose start fails leaves nothing behind, and one that has ended changes nothing any more."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import batch_of, metric
from trackhub.delivery import receiver as receiver_module
from trackhub.delivery import retry_receiver_start, wire
from trackhub.delivery.federation.federation_run import FederationOptions, FederationRun
from trackhub.delivery.job_in_journal import JobInJournal
from trackhub.delivery.journal.read_only import read_journal_meta
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.lane.lane import Lane
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import REPORT_NAME
from trackhub.delivery.set_up_backend import set_up_backends
from trackhub.errors import JournalError
from trackhub.job_and_run_info import RunStatus, Side


def make(folder: Path, **options: Any) -> Receiver:
    return Receiver(folder, job="job-1", side=Side.SERVER, backends={"jsonl": {}}, **options)


def journal_of(receiver: Receiver) -> Path:
    return receiver.folder / "trackhub.db"


def no_thread(*_: Any) -> None:
    raise RuntimeError("can't start new thread")


def test_after_any_error_of_a_start_the_requests_of_two_seconds_cause_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    starts = list[int]()

    def fails(*_: Any, **options: Any) -> Any:
        starts.append(1)
        raise OSError(errno.ENOSPC, "full") if len(starts) == 1 else RuntimeError("can't start new thread")

    monkeypatch.setattr(retry_receiver_start, "_TRY_EVERY_S", 3600.0)
    monkeypatch.setattr(receiver_module, "set_up_backends", fails)
    receiver = make(tmp_path)
    receiver.start()

    for _ in range(20):
        assert isinstance(wire.decode_reply(receiver.handle("site-1", wire.encode(batch_of([metric(0)])))), wire.Busy)

    assert len(starts) == 2
    assert "can't start new thread" in caplog.text


@pytest.mark.parametrize("earlier", ["", RunStatus.ABORTED])
def test_a_start_that_fails_last_of_all_leaves_no_thread_and_the_job_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: str
) -> None:
    if earlier:
        first = make(tmp_path)
        first.start()
        first.finish(RunStatus(earlier))
    before = threading.active_count()
    monkeypatch.setattr(FederationRun, "start", no_thread)
    receiver = make(tmp_path, federation=FederationOptions())

    with pytest.raises(RuntimeError, match="new thread"):
        receiver.start()

    assert threading.active_count() == before
    report = read_journal_report(journal_of(receiver))
    assert report.status == (earlier or RunStatus.FAILED)
    assert (receiver.folder / REPORT_NAME).exists()
    with pytest.raises(JournalError, match="is not started yet; call start"):
        receiver.finish(RunStatus.FINISHED)


@pytest.mark.parametrize(("owner", "name"), [(Lane, "_preflight"), (JobInJournal, "store_start")])
def test_a_status_that_comes_while_the_receiver_starts_is_in_the_journal_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """It may come before the journal has the facts of the job, and right after."""
    receiver, method = make(tmp_path), getattr(owner, name)

    def then_noted(*args: Any) -> None:
        method(*args)
        receiver.note_status(RunStatus.ABORTED)

    monkeypatch.setattr(owner, name, then_noted)

    receiver.start()

    assert read_journal_meta(journal_of(receiver))["status"] == RunStatus.ABORTED
    receiver.finish(RunStatus.ABORTED)


def test_a_receiver_that_has_ended_changes_nothing_any_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    receiver = make(tmp_path)
    receiver.start()
    receiver.finish(RunStatus.FINISHED)
    report = (receiver.folder / REPORT_NAME).read_bytes()
    caplog.clear()

    receiver.note_status(RunStatus.ABORTED)
    receiver.abandon()
    with pytest.raises(JournalError, match="is closed; call start"):
        receiver.finish(RunStatus.ABORTED)

    assert (receiver.folder / REPORT_NAME).read_bytes() == report
    assert read_journal_meta(journal_of(receiver))["status"] == RunStatus.FINISHED
    assert not caplog.records


def test_a_receiver_that_is_abandoned_while_a_request_starts_it_stays_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, go_on = threading.Event(), threading.Event()

    def no_space(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "full")

    def slow(*args: Any, **options: Any) -> Any:
        starts.set()
        assert go_on.wait(60)
        return set_up_backends(*args, **options)

    before = threading.active_count()
    receiver = make(tmp_path)
    monkeypatch.setattr(receiver_module, "set_up_backends", no_space)
    receiver.start()
    monkeypatch.setattr(receiver_module, "set_up_backends", slow)
    request = threading.Thread(target=receiver.handle, args=("site-1", b""))
    abandon = threading.Thread(target=receiver.abandon)
    request.start()
    assert starts.wait(60)
    abandon.start()
    abandon.join(0.2)  # long enough for an `abandon` that does not wait
    go_on.set()
    request.join(60)
    abandon.join(60)

    assert isinstance(wire.decode_reply(receiver.handle("site-1", b"")), wire.Busy)
    assert threading.active_count() == before
