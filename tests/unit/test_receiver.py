# SPDX-License-Identifier: Apache-2.0
"""The receiver stores what it acknowledges, refuses bad requests, and never raises or hangs, whatever it is sent."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import STREAM, WAIT_S, batch_of, json_lines, metric, small_disk
from trackhub.delivery import wire
from trackhub.delivery.blob_store import BlobStore, Stored
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport, read_report
from trackhub.errors import ConfigError, InvalidOptionError, JournalError, UnknownBackendError
from trackhub.framing import FORMAT_VERSION, encode_frame
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.records import Artifact, Blob, Record

SITE = "site-1"


class Rig:
    """A receiver with the backend ``jsonl``, which is asked with messages in place of bytes."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.folder = folder
        self.receiver = Receiver(
            folder, job=JobInfo("job-1"), side=Side.SERVER, backends={"jsonl": {}}, limits=Limits(**limits)
        )

    def start(self) -> Rig:
        self.receiver.start()
        return self

    def ask(self, request: wire.Request, site: str = SITE) -> wire.Reply:
        return wire.decode_reply(self.receiver.handle(site, wire.encode(request)))

    def stored(self, site: str = SITE) -> list[dict[str, Any]]:
        path = self.folder / "jsonl" / "job-1" / f"{site}.jsonl"
        return json_lines(path) if path.exists() else []

    def finish(self, status: RunStatus = RunStatus.FINISHED, deadline_s: float = WAIT_S) -> DeliveryReport:
        return self.receiver.finish(status, deadline_s=deadline_s)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "run").start()
    yield rig
    rig.finish(deadline_s=5)


def batch(first: int, n: int = 5) -> wire.Batch:
    return batch_of([metric(first + i) for i in range(n)])


def test_an_accepted_batch_is_in_the_journal_before_the_reply(rig: Rig) -> None:
    assert rig.ask(wire.Hello()) == wire.Accepted(job="job-1")
    assert rig.ask(batch(0)) == wire.Accepted()
    assert rig.receiver._journal is not None
    assert rig.receiver._journal.report().sites[SITE].journaled == 5


def test_repeated_batches_are_delivered_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path).start()
    for first in (0, 5, 0, 5, 10, 5):
        assert rig.ask(batch(first)) == wire.Accepted()
    counts = wire.SiteCounts(logged=15, acked=15)
    assert rig.ask(wire.KeepAlive(counts)) == wire.Accepted()
    for _ in range(2):
        assert rig.ask(wire.Final(counts)) == wire.Accepted()
    report = rig.finish()

    assert [line["seq"] for line in rig.stored()] == list(range(15))
    site = report.sites[SITE]
    assert (site.received, site.duplicates, site.journaled, site.final) == (30, 15, 15, True)
    assert report.lanes["jsonl"][SITE].confirmed == 15
    assert report.balanced
    assert read_report(tmp_path / "trackhub" / "delivery.json") == report


@settings(
    max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(data=st.binary(max_size=100))
def test_bytes_that_hold_no_request_are_refused(rig: Rig, data: bytes) -> None:
    reply = wire.decode_reply(rig.receiver.handle(SITE, data))
    try:
        wire.decode_request(data)
    except msgspec.DecodeError:
        assert isinstance(reply, wire.Refused)
        assert reply.reason == "malformed"


def changed(**fields: Any) -> wire.Batch:
    return msgspec.structs.replace(batch(0), **fields)


def unreadable() -> bytes:
    frame = bytearray(encode_frame(metric(0)))
    frame[-1] ^= 1
    return bytes(frame)


@pytest.mark.parametrize(
    "request_",
    {
        "too few records": changed(records=4),
        "too many records": changed(records=6),
        "too short": changed(next_seq=4),
        "too long": changed(next_seq=6),
        "backwards": changed(first_seq=5, next_seq=0),
        "negative": changed(first_seq=-5, next_seq=0),
        "beyond what can be counted": changed(first_seq=2**64 - 6, next_seq=2**64 - 1),
        "numbers of other records": changed(first_seq=7, next_seq=12),
        "a damaged frame": wire.Batch(STREAM, 0, 1, 1, unreadable()),
        "half a frame": changed(frames=batch(0).frames[:-3]),
        "no frames": changed(frames=b""),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_batch_whose_numbers_or_frames_are_wrong_is_refused_and_leaves_no_trace(
    rig: Rig, request_: tuple[str, wire.Batch]
) -> None:
    reply = rig.ask(request_[1])
    assert isinstance(reply, wire.Refused)
    assert reply.reason == "malformed"
    assert rig.ask(batch(0)) == wire.Accepted()
    assert rig.receiver._journal is not None
    found = rig.receiver._journal.report().sites[SITE]
    assert (found.received, found.journaled, found.missing, found.explained) == (5, 5, 0, {})


@pytest.mark.parametrize(("minor", "accepted"), [(-1, True), (0, True), (1, True), (2, False)])
def test_a_site_that_is_two_minor_versions_ahead_is_refused(rig: Rig, minor: int, accepted: bool) -> None:
    reply = rig.ask(wire.Hello((FORMAT_VERSION[0], FORMAT_VERSION[1] + minor)))
    if accepted:
        assert reply == wire.Accepted(job="job-1")
    else:
        assert isinstance(reply, wire.Refused)
        assert reply.reason == "version"
        assert "install the same" in reply.detail


DATA = bytes(range(256)) * 40
NAME = f"{STREAM}-0"
BLOB = Blob(NAME, len(DATA), hashlib.sha256(DATA).hexdigest(), "application/octet-stream")


def chunk(offset: int, size: int, *, blob: Blob = BLOB, data: bytes = DATA) -> wire.Chunk:
    return wire.Chunk(blob.name, blob.size, blob.sha256, offset, data[offset : offset + size])


def artifact(blob: Blob = BLOB) -> wire.Batch:
    return batch_of([Record(0, 1.0, None, None, Artifact("model", blob, "model.bin"))])


def blob_file(rig: Rig, site: str = SITE) -> Path:
    path = rig.receiver._blobs.path(site, NAME)
    assert path is not None
    return path


def test_a_record_is_accepted_only_after_the_bytes_of_its_blob(rig: Rig) -> None:
    assert rig.ask(artifact()) == wire.NeedBlob(NAME)
    assert rig.ask(chunk(0, 4000)) == wire.Accepted(4000)
    assert rig.ask(artifact()) == wire.NeedBlob(NAME)
    assert rig.ask(chunk(0, 4000)) == wire.Accepted(4000)  # sent again
    assert rig.ask(chunk(8000, 100)) == wire.Accepted(4000)  # one was skipped
    assert rig.ask(chunk(4000, 10_000)) == wire.Accepted(len(DATA))
    assert rig.ask(artifact()) == wire.Accepted()
    assert rig.ask(chunk(0, 4000)) == wire.Accepted(len(DATA))  # late
    assert blob_file(rig).read_bytes() == DATA


def test_the_end_of_a_job_deletes_no_file_whose_record_has_just_been_stored(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that stored the record may come to its next line only after another thread has ended the job."""
    append = Journal.append

    def append_and_end(journal: Journal, *arguments: Any, **options: Any) -> int:
        new = append(journal, *arguments, **options)
        rig.receiver._blobs.delete_unused()
        return new

    monkeypatch.setattr(Journal, "append", append_and_end)
    rig.ask(chunk(0, len(DATA)))

    assert rig.ask(artifact()) == wire.Accepted()

    assert blob_file(rig).read_bytes() == DATA


def test_bytes_that_do_not_match_their_digest_are_refused_and_may_be_retries(rig: Rig) -> None:
    assert rig.ask(chunk(0, 5000)) == wire.Accepted(5000)
    reply = rig.ask(chunk(5000, 10_000, data=DATA[:-1] + b"x"))
    assert isinstance(reply, wire.Refused)
    assert reply.reason == "blob_damaged"
    assert not rig.receiver._blobs.has(SITE, NAME)
    assert rig.ask(chunk(0, 100_000)) == wire.Accepted(len(DATA))


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "", ".", "a/b", f"{STREAM}-0/../x", f"{STREAM}-0\n", "x" * 300]
)
def test_no_blob_name_leads_out_of_the_folder(rig: Rig, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    blob = msgspec.structs.replace(BLOB, name=name)
    assert isinstance(rig.ask(chunk(0, 100_000, blob=blob)), wire.Refused)
    assert rig.ask(artifact(blob)) == wire.Accepted(refused={"undecodable": 1})
    assert sorted(tmp_path.rglob("*")) == before


def test_two_sites_may_have_blobs_of_the_same_name(rig: Rig) -> None:
    other = b"other" * 10
    blob = Blob(NAME, len(other), hashlib.sha256(other).hexdigest(), "x")
    rig.ask(chunk(0, 100_000))
    rig.ask(chunk(0, 1000, blob=blob, data=other), "site-2")
    assert (blob_file(rig).read_bytes(), blob_file(rig, "site-2").read_bytes()) == (DATA, other)
    assert rig.ask(artifact()) == wire.Accepted()


def test_a_piece_that_arrives_twice_at_once_is_stored_once(rig: Rig) -> None:
    """A site repeats a chunk when the reply is late, and the receiver may still be storing the first one."""
    data = bytes(1 << 20)
    for n in range(20):
        name = f"{STREAM}-{n}"
        blob = Blob(name, len(data), hashlib.sha256(data).hexdigest(), "x")
        gate = threading.Barrier(4)
        replies: list[wire.Reply] = []

        def send(blob: Blob = blob, gate: threading.Barrier = gate, replies: list[wire.Reply] = replies) -> None:
            gate.wait()
            replies.append(rig.ask(chunk(0, 1 << 19, blob=blob, data=data)))

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wire.Accepted(1 << 19) in replies
        assert all(reply == wire.Accepted(1 << 19) or isinstance(reply, wire.Busy) for reply in replies)
        assert rig.ask(chunk(1 << 19, 1 << 19, blob=blob, data=data)) == wire.Accepted(len(data))


def test_a_second_request_of_a_site_is_turned_away_while_the_first_is_worked_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    store = BlobStore.add

    def slow(blobs: BlobStore, site: str, piece: wire.Chunk) -> Stored | None:
        entered.set()
        assert go_on.wait(WAIT_S)
        return store(blobs, site, piece)

    monkeypatch.setattr(BlobStore, "add", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(rig.ask, chunk(0, 4000))
        assert entered.wait(WAIT_S)

        again, other_site = rig.ask(batch(0)), rig.ask(batch(0), "site-2")
        go_on.set()

        assert isinstance(again, wire.Busy)
        assert other_site == wire.Accepted()
        assert first.result() == wire.Accepted(4000)
    assert rig.ask(batch(0)) == wire.Accepted()


def test_few_requests_are_worked_on_at_a_time(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Semaphore(0), threading.Event()

    def slow(blobs: BlobStore, site: str, piece: wire.Chunk) -> None:
        entered.release()
        assert go_on.wait(WAIT_S)

    monkeypatch.setattr(BlobStore, "add", slow)
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(rig.ask, chunk(0, 10), f"site-{i}") for i in range(16)]
        for _ in asked:
            assert entered.acquire(timeout=WAIT_S)

        one_more = rig.ask(chunk(0, 10), "one more")
        go_on.set()

        assert isinstance(one_more, wire.Busy)
        assert all(isinstance(reply.result(), wire.Refused) for reply in asked)


def test_the_records_of_many_sites_at_once_are_kept_apart(tmp_path: Path) -> None:
    rig = Rig(tmp_path).start()
    sites = [f"site-{i}" for i in range(8)]

    def send(site: str) -> None:
        rig.ask(wire.Hello(), site)
        for first in range(0, 100, 10):
            assert rig.ask(batch(first, 10), site) == wire.Accepted()
            assert rig.ask(batch(first, 10), site) == wire.Accepted()
        rig.ask(wire.Final(wire.SiteCounts(logged=100, acked=100)), site)

    threads = [threading.Thread(target=send, args=(site,)) for site in sites]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = rig.finish()
    for site in sites:
        assert [line["seq"] for line in rig.stored(site)] == list(range(100))
        assert (report.sites[site].duplicates, report.lanes["jsonl"][site].confirmed) == (100, 100)


def test_a_receiver_that_has_not_started_or_has_finished_replies_busy(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    assert isinstance(rig.ask(batch(0)), wire.Busy)
    with pytest.raises(JournalError, match="not started"):
        rig.finish()
    rig.start()
    assert rig.ask(batch(0)) == wire.Accepted()
    rig.finish()
    for request in (batch(5), wire.Hello(), wire.Final(wire.SiteCounts())):
        assert isinstance(rig.ask(request), wire.Busy)
    again = Rig(tmp_path).start()
    assert again.ask(batch(0)) == wire.Accepted()
    assert again.ask(batch(5)) == wire.Accepted()
    again.finish()
    assert [line["seq"] for line in again.stored()] == list(range(10))


def test_a_receiver_on_a_full_disk_replies_busy_until_there_is_space(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        rig = Rig(disk / "run").start()
        assert rig.ask(batch(0)) == wire.Accepted()
        filler = disk / "filler"
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        replies: Counter[type] = Counter()
        accepted = 5
        while not replies[wire.Busy]:
            reply = rig.ask(batch(accepted, 1000))
            replies[type(reply)] += 1
            accepted += 1000 * isinstance(reply, wire.Accepted)
        assert set(replies) <= {wire.Busy, wire.Accepted}
        assert isinstance(rig.ask(chunk(0, 100_000)), wire.Busy)
        filler.unlink()
        assert rig.ask(batch(accepted, 10)) == wire.Accepted()
        assert rig.ask(chunk(0, 100_000)) == wire.Accepted(len(DATA))
        report = rig.finish()
        assert [line["seq"] for line in rig.stored()] == list(range(accepted + 10))
        assert report.lanes["jsonl"][SITE].confirmed == accepted + 10


def test_a_receiver_whose_disk_stays_full_still_makes_a_report(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        rig = Rig(disk / "run").start()
        with pytest.raises(OSError, match="No space"), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        first = 0
        while isinstance(rig.ask(batch(first, 500)), wire.Accepted):
            first += 500
        report = rig.finish(deadline_s=0.2)
        assert report.adds_up
        assert not report.balanced, "what the site logged is not known"
        assert report.sites[SITE].at_site is None
        if first:
            run = report.lanes["jsonl"][SITE]
            assert run.confirmed + run.pending == report.sites[SITE].journaled == first


def test_the_wait_for_sites_ends_with_the_last_final_message(rig: Rig) -> None:
    sites = ["a", "b"]
    opened = threading.Event()
    found: list[set[str]] = []

    def wait() -> None:
        found.append(rig.receiver.wait_for_sites(sites, WAIT_S))
        opened.set()

    for site in sites:
        rig.ask(wire.Hello(), site)
    threading.Thread(target=wait, daemon=True).start()
    rig.ask(wire.Final(wire.SiteCounts()), "a")
    assert not opened.wait(0.1)
    rig.ask(wire.Final(wire.SiteCounts()), "b")
    assert opened.wait(WAIT_S)
    assert found == [set()]


def test_the_wait_for_sites_leaves_out_a_site_that_fell_silent(tmp_path: Path) -> None:
    rig = Rig(tmp_path, silence_s=0.3, keepalive_s=0.1).start()
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.05):
            rig.ask(wire.KeepAlive(wire.SiteCounts()), "alive")

    rig.ask(wire.Hello(), "dead")
    thread = threading.Thread(target=live)
    thread.start()
    start = time.monotonic()
    assert rig.receiver.wait_for_sites(["dead", "never came", "alive"], 1.0) == {"dead", "never came", "alive"}
    assert time.monotonic() - start >= 1.0  # for the one that lives
    stop.set()
    thread.join()
    rig.ask(wire.Final(wire.SiteCounts()), "alive")
    start = time.monotonic()
    assert rig.receiver.wait_for_sites(["dead", "never came", "alive"], WAIT_S) == {"dead", "never came"}
    assert time.monotonic() - start < 5
    rig.finish()


@pytest.mark.parametrize(
    ("job", "final", "expected"),
    [
        (RunStatus.FINISHED, wire.Final(wire.SiteCounts()), "finished"),
        (RunStatus.FINISHED, wire.Final(wire.SiteCounts(), failed=True), "failed"),
        (RunStatus.FINISHED, None, "failed"),
        (RunStatus.ABORTED, wire.Final(wire.SiteCounts()), "aborted"),
        (RunStatus.FAILED, wire.Final(wire.SiteCounts()), "failed"),
    ],
)
def test_a_run_ends_with_the_status_of_its_site(
    tmp_path: Path, job: RunStatus, final: wire.Final | None, expected: str
) -> None:
    rig = Rig(tmp_path).start()
    rig.ask(batch(0))
    if final:
        rig.ask(final)
    report = rig.finish(job)
    lines = (tmp_path / "jsonl" / "job-1" / f"{SITE}.jsonl").read_text().splitlines()
    assert f'"status":"{expected}"' in lines[-1]
    assert (report.status, report.sites[SITE].final) == (job, final is not None)


def test_a_wrong_configuration_is_an_error_before_any_file_is_made(tmp_path: Path) -> None:
    def start(backends: dict[str, dict[str, Any]]) -> None:
        Receiver(tmp_path, job=JobInfo("j"), side=Side.SERVER, backends=backends).start()

    with pytest.raises(UnknownBackendError, match=r"available: .*jsonl"):
        start({"nonsense": {}})
    with pytest.raises(InvalidOptionError, match=r"jsonl\.pth.*path"):
        start({"jsonl": {"pth": "x"}})
    assert not (tmp_path / "trackhub").exists()


def test_a_backend_that_cannot_be_used_leaves_no_lock_and_no_thread(tmp_path: Path) -> None:
    (tmp_path / "occupied").touch()
    options = {"jsonl": {"path": str(tmp_path / "occupied" / "x")}}
    before = threading.active_count()
    for _ in range(2):
        receiver = Receiver(tmp_path, job=JobInfo("j"), side=Side.SERVER, backends=options)
        with pytest.raises(ConfigError, match="occupied"):
            receiver.start()
    assert threading.active_count() == before
