# SPDX-License-Identifier: Apache-2.0
"""The gate refuses what a site must not send, alone and by reason, and the honest site has all of its records."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.hostile.hostile_site import HONEST, HOSTILE, OTHER_STREAM, Job, batch, frame, metrics, record
from tests.unit.readers_and_bad_backends import STREAM, batch_of, metric
from trackhub.cli.output import print_lines
from trackhub.cli.status import journal_status
from trackhub.delivery import check_received_batch, wire
from trackhub.delivery.check_received_batch import KnownKeys, RefusedRecordError, check_record
from trackhub.delivery.journal import journal as journal_module
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.lane.entry_reader import EntryReader
from trackhub.delivery.lane.fit_records_to_backend import Adaptation
from trackhub.delivery.replay_journal_or_spool import replay_journal
from trackhub.delivery.report_text import format_report
from trackhub.errors import ConfigError
from trackhub.framing import decode_body, encode_frame
from trackhub.job_and_run_info import Side
from trackhub.printable import printable
from trackhub.records import MAX_CAPTION_CHARS, MAX_COUNT, MAX_IMAGE_BYTES, Kind, Metrics, Params, Record

DIGEST = hashlib.sha256(b"x").hexdigest()


def blob(name: str = f"{STREAM}-1", size: Any = 1, digest: str = DIGEST) -> list[Any]:
    return [name, size, digest, "text/plain"]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def deep(depth: int) -> bytes:
    """Return a record of params whose value is nested deeper than any encoder would go."""
    head = record(1, Kind.PARAMS, {"a": None})
    return head[:-1] + b"\x91" * depth + b"\x01"


BAD: dict[str, tuple[str, bytes]] = {
    "an artifact in a frame of metrics": (
        "wrong_kind",
        frame(Kind.METRICS, record(1, Kind.ARTIFACT, "a", blob(), "f.txt", "file")),
    ),
    "an artifact in a frame of metrics, with a path": (
        "undecodable",
        frame(Kind.METRICS, record(1, Kind.ARTIFACT, "a", blob("/etc/passwd"), "f.txt", "file")),
    ),
    "a gap in a frame of metrics": ("wrong_kind", frame(Kind.METRICS, record(1, Kind.GAP, 5, "x"))),
    "a blob with the name of another record": (
        "bad_blob",
        frame(Kind.ARTIFACT, record(1, Kind.ARTIFACT, "a", blob(f"{STREAM}-0"), "f", "file")),
    ),
    "a blob with the name of another stream": (
        "bad_blob",
        frame(Kind.IMAGE, record(1, Kind.IMAGE, "a", blob(f"{OTHER_STREAM}-1"), 1, 1, "")),
    ),
    "a blob with digits of another script": (
        "bad_blob",
        frame(Kind.ARTIFACT, record(1, Kind.ARTIFACT, "a", blob(f"{STREAM}-\u0661"), "f", "file")),
    ),
    "a blob of 2^62 bytes": (
        "undecodable",
        frame(Kind.ARTIFACT, record(1, Kind.ARTIFACT, "a", blob(size=2**62), "f", "file")),
    ),
    "an image of more bytes than an image may have": (
        "too_large",
        frame(Kind.IMAGE, record(1, Kind.IMAGE, "a", blob(size=MAX_IMAGE_BYTES + 1), 1, 1, "")),
    ),
    "an image with a caption of more characters than a line has": (
        "too_large",
        frame(Kind.IMAGE, record(1, Kind.IMAGE, "a", blob(), 1, 1, "c" * (MAX_CAPTION_CHARS + 1))),
    ),
    "an image that is neither PNG nor JPEG": (
        "bad_image",
        frame(Kind.IMAGE, record(1, Kind.IMAGE, "a", [*blob()[:3], "application/postscript"], 1, 1, "")),
    ),
    "a file name with a folder": (
        "bad_blob",
        frame(Kind.ARTIFACT, record(1, Kind.ARTIFACT, "a", blob(), "../../f", "file")),
    ),
    "a file name that is the folder above": (
        "bad_blob",
        frame(Kind.ARTIFACT, record(1, Kind.ARTIFACT, "a", blob(), "..", "file")),
    ),
    "a file name of more bytes than a file system takes": (
        "bad_blob",
        frame(Kind.ARTIFACT, record(1, Kind.ARTIFACT, "a", blob(), "\u00e9" * 200, "file")),
    ),
    "a long file name": (
        "undecodable",
        frame(Kind.ARTIFACT, record(1, Kind.ARTIFACT, "a", blob(), "f" * 5000, "file")),
    ),
    "a key that is not UTF-8": ("undecodable", frame(1, record(1, 1, {"abc": 1.0}).replace(b"abc", b"\xff\xfe\xfd"))),
    "a key of a surrogate": ("undecodable", frame(1, record(1, 1, {"abc": 1.0}).replace(b"abc", b"\xed\xa0\x80"))),
    "a key with an escape sequence": ("bad_key", metrics(1, {"a\x1b[2J": 1.0})),
    "a key of 1001 characters": ("bad_key", metrics(1, {"k" * 1001: 1.0})),
    "an empty key": ("bad_key", metrics(1, {"": 1.0})),
    "a key that is a number": ("undecodable", metrics(1, {7: 1.0})),
    "a value that is text": ("undecodable", metrics(1, {"a": "1.0"})),
    "params nested 21 deep": ("too_deep", frame(2, record(1, 2, {"a": nested(21)}))),
    "params nested 5,000 deep": ("undecodable", frame(2, deep(5000))),
    "params nested 100,000 deep": ("undecodable", frame(2, deep(100_000))),
    "params with keys that are numbers": ("bad_key", frame(2, record(1, 2, {"a": {1: 2}}))),
    "params with keys of control characters": ("bad_key", frame(2, record(1, 2, {"a": {"\n": 2}}))),
    "params of bytes": ("bad_value", frame(2, record(1, 2, {"a": b"\xff"}))),
    "a step of 2^63": ("undecodable", frame(1, record(1, 1, {"loss": 1.0}, step=2**63))),
    "a negative step": ("undecodable", frame(1, record(1, 1, {"loss": 1.0}, step=-1))),
    "a round of 2^64 - 1": ("undecodable", frame(1, record(1, 1, {"loss": 1.0}, round_=2**64 - 1))),
    "NaN as time": ("undecodable", frame(1, record(1, 1, {"loss": 1.0}, time=float("nan")))),
    "infinity as time": ("undecodable", frame(1, record(1, 1, {"loss": 1.0}, time=float("inf")))),
    "a time after the year 9999": ("undecodable", frame(1, record(1, 1, {"loss": 1.0}, time=1e300))),
    "a payload of no kind": ("undecodable", frame(1, record(1, 77, {"loss": 1.0}))),
    "no msgpack": ("undecodable", frame(1, b"\xc1")),
    "an empty body": ("undecodable", frame(1, b"")),
    "two records in one frame": ("undecodable", frame(1, record(1, 1, {"loss": 1.0}) * 2)),
    "an array of 4 billion items": ("undecodable", frame(2, record(1, 2, {"a": 0})[:-1] + b"\xdd" + b"\xff" * 4)),
    "a histogram without bins": ("bad_value", frame(6, record(1, 6, "h", [1.0], []))),
    "a histogram with falling edges": ("bad_value", frame(6, record(1, 6, "h", [2.0, 1.0], [1.0]))),
    "a histogram with NaN": ("bad_value", frame(6, record(1, 6, "h", [1.0, float("nan")], [1.0]))),
    "a histogram with a negative count": ("bad_value", frame(6, record(1, 6, "h", [1.0, 2.0], [-1.0]))),
    "a table with rows that differ": ("bad_value", frame(7, record(1, 7, "t", ["a", "b"], [[1, 2], [1]]))),
    "a table with a list in a cell": ("bad_value", frame(7, record(1, 7, "t", ["a"], [[[1]]]))),
}  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path / "run")
    job.log_honestly()
    yield job
    if job.receiver._state == "open":
        job.finish(5)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_refused_alone_and_counted_by_its_reason(job: Job, case: str) -> None:
    reason, bad = BAD[case]

    reply = job.ask(batch([metrics(0), bad, metrics(2)]))

    assert reply == wire.Accepted(refused={reason: 1})
    job.log_honestly()
    report = job.finish()
    assert [line["seq"] for line in job.stored(HOSTILE)] == [0, 2]
    site = report.sites[HOSTILE]
    assert (site.received, site.journaled, site.refused, site.missing) == (3, 2, {reason: 1}, 0)
    assert report.lanes["jsonl"][HOSTILE].confirmed == 2
    assert f"refused by the receiver ({reason}): 1" in format_report(report)


@pytest.mark.parametrize("case", BAD)
def test_a_lane_refuses_the_same_records_of_a_journal_from_elsewhere(tmp_path: Path, case: str) -> None:
    """Such a journal was filled without this gate. A replay must deliver the rest of it."""
    reason, bad = BAD[case]
    folder = tmp_path / "trackhub"
    journal = Journal.open(folder / "trackhub.db", job="job-1", side=Side.SERVER)
    journal.set_facts({"backends": '{"jsonl": {}}', "status": "finished", "run_dir": ".."})
    site = journal.add_site(HOSTILE, 1000.0)
    journal.append(site, batch([metrics(0), bad, metrics(2)]), {})
    journal.close()

    report = replay_journal(folder / "trackhub.db", timeout_s=20)

    run = report.lanes["jsonl"][HOSTILE]
    assert (run.confirmed, run.rejected, run.pending, run.state) == (2, {reason: 1}, 0, "finished")


def test_a_batch_that_comes_again_gets_the_same_answer_and_counts_once(job: Job) -> None:
    bad = batch([metrics(0), BAD["NaN as time"][1], metrics(2)])
    replies = [job.ask(bad) for _ in range(3)]
    assert replies == [wire.Accepted(refused={"undecodable": 1})] * 3
    report = job.finish()
    site = report.sites[HOSTILE]
    assert (site.received, site.duplicates, site.journaled, site.refused) == (7, 4, 2, {"undecodable": 1})


def test_a_batch_of_bad_records_alone_is_accepted_and_leaves_only_counts(job: Job) -> None:
    bad = [frame(1, record(i, 1, {"loss": 1.0}, step=-1)) for i in range(5)]
    assert job.ask(batch(bad)) == wire.Accepted(refused={"undecodable": 5})
    assert job.ask(batch([metrics(5)], first=5)) == wire.Accepted()
    site = job.finish().sites[HOSTILE]
    assert (site.received, site.journaled, site.missing, site.refused) == (6, 1, 0, {"undecodable": 5})


def test_no_file_of_the_server_is_read_by_the_name_of_a_blob(job: Job, tmp_path: Path) -> None:
    secret = tmp_path / "server.key"
    secret.write_text("the server's key")
    for kind in (Kind.METRICS, Kind.ARTIFACT, Kind.IMAGE, 42):
        for name in (str(secret), "../../../server.key", "/proc/self/environ", "/dev/zero"):
            fields = ["a", blob(name, 16), "f", "file"] if kind != Kind.IMAGE else ["a", blob(name, 16), 1, 1, ""]
            job.ask(batch([frame(kind, record(0, Kind.IMAGE if kind == Kind.IMAGE else Kind.ARTIFACT, *fields))]))
    job.finish()
    assert not any("the server's key" in p.read_text("latin-1") for p in (tmp_path / "run").rglob("*") if p.is_file())


def test_a_link_among_the_blobs_of_a_journal_from_elsewhere_is_not_followed(job: Job, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    name = f"{STREAM}-0"
    job.ask(wire.Chunk(name, 1, DIGEST, 0, b"x"))
    assert job.ask(batch([frame(8, record(0, 8, "a", blob(name), "f.txt", "file"))])) == wire.Accepted()
    job.finish()
    stored = next((tmp_path / "run" / "trackhub" / "blobs").glob(f"*/{name}"))
    stored.unlink()
    stored.symlink_to(secret)

    journal, backends = tmp_path / "run" / "trackhub" / "trackhub.db", {"jsonl": {"path": "again"}}
    with pytest.raises(ConfigError, match="symbolic link"):
        replay_journal(journal, from_start=True, backends=backends)
    # A journal that the operator trusts is replayed, and the link is not followed all the same.
    report = replay_journal(journal, from_start=True, backends=backends, operator=None)

    assert report.lanes["jsonl"][HOSTILE].rejected == {"permanent_error": 1}


@pytest.mark.parametrize(
    "counts",
    [{"logged": -1}, {"acked": 2**64 - 1}, {"dropped": {"a\x1b[2J\nb": 1}}, {"refused": {"x": -5}}, {"logged": 1.5},
     {"dropped": {f"r{i}": 1 for i in range(65)}}],
)  # fmt: skip
def test_counts_that_cannot_be_are_refused_and_the_site_has_none(job: Job, counts: dict[str, Any]) -> None:
    for tag in (4, 5):
        reply = job.receiver.handle(HOSTILE, msgspec.msgpack.encode([tag, counts]))
        assert isinstance(wire.decode_reply(reply), wire.Refused)
    job.ask(batch([metrics(0)]))
    report = job.finish()
    assert report.sites[HOSTILE].at_site is None
    assert not report.balanced
    assert report.adds_up


def test_false_counts_of_one_site_spoil_its_own_part_of_the_report_alone(job: Job, tmp_path: Path) -> None:
    job.ask(batch([metrics(0)]))
    job.ask(wire.Final(wire.SiteCounts(logged=MAX_COUNT, acked=MAX_COUNT, dropped={"x": MAX_COUNT})))
    report = job.finish()
    assert not report.adds_up
    first, *rows = format_report(report).splitlines()
    assert f"DO NOT ADD UP for {HOSTILE}:" in first
    assert HONEST not in first
    honest = next(row for row in rows if row.startswith(HONEST))
    assert honest.split()[:7] == [HONEST, "jsonl", "20", "20", "20", "0", "0"]
    status = journal_status(tmp_path / "run" / "trackhub" / "trackhub.db")
    assert status["sites"][HONEST]["doubts"] == []


@pytest.mark.parametrize("first", [2**63 - 10, 2**64 - 10, MAX_COUNT + 1])
def test_numbers_that_no_stream_reaches_are_refused(job: Job, first: int) -> None:
    assert isinstance(job.ask(batch([metrics(first)], first=first)), wire.Refused)
    assert isinstance(job.ask(wire.Batch(STREAM, 0, first, 0, frame(9, record(0, 9, first, "x")))), wire.Refused)


def test_jumps_and_gaps_add_up_to_whole_numbers_whatever_a_site_sends(job: Job) -> None:
    for i in range(2000):
        job.ask(batch([metrics(MAX_COUNT - 2)], first=MAX_COUNT - 2, stream=f"{i:032x}"))
        gap = frame(9, record(0, 9, MAX_COUNT - 5, f"reason{i}"))
        job.ask(wire.Batch(f"{i + 5000:032x}", 0, MAX_COUNT - 5, 0, gap))
    site = job.finish().sites[HOSTILE]
    assert type(site.missing) is int
    assert site.missing == MAX_COUNT
    assert len(site.explained) <= wire.MAX_REASONS + 1
    assert all(type(n) is int and n <= MAX_COUNT for n in site.explained.values())


def test_sizes_are_checked_before_memory_is_spent(job: Job) -> None:
    many = msgspec.msgpack.encode([1, [1, 0], "", [STREAM] * 1_000_000])
    assert isinstance(wire.decode_reply(job.receiver.handle(HOSTILE, many)), wire.Refused)
    reply = wire.decode_reply(job.receiver.handle(HOSTILE, wire.encode(batch([metrics(0)])) + bytes(9 << 20)))
    assert isinstance(reply, wire.Refused)
    assert "the limit is" in reply.detail
    small = metrics(0)
    assert isinstance(job.ask(wire.Batch(STREAM, 0, 10**6, 10**6, small)), wire.Refused)


@pytest.mark.parametrize(
    "chunk",
    [
        wire.Chunk(f"{STREAM}-0", 2**62, DIGEST, 0, b"x"),
        wire.Chunk(f"{STREAM}-0", 5, DIGEST, 0, b"x" * 100),
        wire.Chunk(f"{STREAM}-0", 5, DIGEST, 4, b"xx"),
        wire.Chunk(f"{STREAM}-0", 5, "no digest", 0, b"x"),
        wire.Chunk(f"{STREAM}-0/../../x", 5, DIGEST, 0, b"x"),
        wire.Chunk(f"{STREAM}-{'9' * 300}", 5, DIGEST, 0, b"x"),
    ],
)
def test_chunks_that_no_sender_makes_are_refused_and_leave_no_file(job: Job, tmp_path: Path, chunk: wire.Chunk) -> None:
    assert isinstance(job.ask(chunk), wire.Refused)
    assert not list((tmp_path / "run" / "trackhub").glob("blobs/*/*"))


def test_a_site_has_few_blobs_that_are_there_in_part_and_none_after_the_job(job: Job, tmp_path: Path) -> None:
    for i in range(100):
        assert job.ask(wire.Chunk(f"{STREAM}-{i}", 1000, DIGEST, 0, b"x" * 10)) == wire.Accepted(10)
    parts = (tmp_path / "run" / "trackhub").glob("blobs/*/*.part")
    assert sorted(int(path.name[33:-5]) for path in parts) == list(range(84, 100))
    job.finish()
    assert not list((tmp_path / "run" / "trackhub").glob("blobs/*/*.part"))


def test_a_piece_of_a_file_that_comes_again_does_not_delay_the_end_of_the_job(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job waits for files while bytes of them arrive, for up to ``files_s``."""
    progress: list[str] = []
    monkeypatch.setattr(job.receiver.sites, "note_progress", progress.append)
    digest = hashlib.sha256(b"xx").hexdigest()
    first, last = (wire.Chunk(f"{STREAM}-0", 2, digest, offset, b"x") for offset in (0, 1))

    for piece in (first, first, last, first, last, wire.Chunk(f"{STREAM}-1", 2, digest, 0, b"")):
        assert isinstance(job.ask(piece), wire.Accepted)

    assert progress == [HOSTILE] * 2  # one for each piece with new bytes


def test_keys_of_one_site_do_not_fill_the_memory(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_received_batch, "MAX_KEYS", 100)
    frames = [metrics(i, {f"key{i}": 1.0}) for i in range(300)]
    assert job.ask(batch(frames)) == wire.Accepted(refused={"too_many_keys": 200})
    assert job.ask(batch([metrics(300, {"key7": 1.0})], first=300)) == wire.Accepted()
    job.log_honestly()
    assert job.finish().lanes["jsonl"][HOSTILE].confirmed == 101


def test_streams_of_one_site_are_limited(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_STREAMS_OF_SITE", 5)
    replies = [job.ask(batch([metrics(0)], stream=f"{i:032x}")) for i in range(7)]
    assert [type(reply) for reply in replies] == [wire.Accepted] * 5 + [wire.Refused] * 2
    assert job.ask(batch([metrics(1)], first=1, stream=f"{0:032x}")) == wire.Accepted()
    job.finish()


def test_columns_that_would_fill_the_memory_are_refused(job: Job) -> None:
    wide = [frame(Kind.TABLE, record(seq, Kind.TABLE, "t", [""] * 90_000, [])) for seq in range(13)]
    assert job.ask(batch(wide)) == wire.Accepted(refused={"too_many_values": 2})
    job.finish()


def test_values_that_would_fill_the_memory_are_refused(job: Job) -> None:
    dense = [frame(2, record(seq, 2, {"a": [0] * 90_000})) for seq in range(12)]
    assert job.ask(batch(dense)) == wire.Accepted(refused={"too_many_values": 1})
    job.finish()


def test_bad_requests_are_logged_once_a_minute_and_without_a_traceback(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "trackhub.delivery.receiver"):
        for _ in range(200):
            job.receiver.handle(HOSTILE, b"\xc1")
            job.receiver.handle(HOSTILE, msgspec.msgpack.encode([4, {"dropped": {"\x1b[31m": 1}}]))
    (message,) = [r for r in caplog.records if r.name == "trackhub.delivery.receiver"]
    assert message.exc_info is None
    assert "\x1b" not in message.getMessage()


@pytest.mark.parametrize("site", ["site-\udcff", "site\x1b[2J", "\u202esite", "a\nb"])
def test_handle_never_raises_whatever_the_sites_name_is(job: Job, site: str) -> None:
    for data in (b"", b"\xc1", wire.encode(batch([metrics(0)])), wire.encode(wire.Hello((9, 9))), os.urandom(50)):
        wire.decode_reply(job.receiver.handle(site, data))


def test_a_defect_in_shaping_one_record_costs_this_record(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt = Adaptation.adapt

    def broken(self: Adaptation, stream: str, record_: Record, position: int) -> Any:
        if isinstance(record_.payload, Metrics) and "poison" in record_.payload.values:
            raise ZeroDivisionError("a defect of trackhub")
        return adapt(self, stream, record_, position)

    monkeypatch.setattr(Adaptation, "adapt", broken)
    job.ask(batch([metrics(0), metrics(1, {"poison": 1.0}), metrics(2)]))
    run = job.finish().lanes["jsonl"][HOSTILE]
    assert (run.confirmed, run.rejected, run.state) == (2, {"not_adaptable": 1}, "finished")


def test_a_defect_in_one_run_costs_this_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    read = EntryReader.read

    def broken(self: EntryReader) -> Any:
        if self._cursor.site == HOSTILE:
            raise ZeroDivisionError("a defect of trackhub")
        return read(self)

    monkeypatch.setattr(EntryReader, "read", broken)
    job.ask(batch([metrics(0)]))
    job.log_honestly()
    run = job.finish().lanes["jsonl"][HOSTILE]
    assert (run.pending, run.state) == (1, "stopped")
    assert "a defect of trackhub" in run.last_error


def test_a_run_whose_state_makes_no_sense_costs_this_run(tmp_path: Path) -> None:
    first = Job(tmp_path / "run")
    first.log_honestly()
    first.ask(batch([metrics(0)]))
    first.finish()
    folder = tmp_path / "run" / "trackhub"
    journal = Journal.open(folder / "trackhub.db", job="job-1", side=Side.SERVER)
    with journal._connections.transaction(1) as db:
        db.execute("UPDATE runs SET progress = x'c1', confirmed = 0 WHERE site = 2")
        db.execute("UPDATE sites SET counts = x'91ff', explained = x'c1' WHERE id = 2")
    journal.close()
    report = replay_journal(folder / "trackhub.db", timeout_s=10)
    assert report.lanes["jsonl"][HONEST].confirmed == 20
    assert report.sites[HOSTILE].at_site is None


def test_a_site_that_sends_much_holds_up_neither_the_others_nor_the_end_of_their_runs(tmp_path: Path) -> None:
    """The hostile site's records would keep the lane busy far beyond the deadline."""
    job = Job(tmp_path / "run")
    flood = [b"".join(metrics(i * 20_000 + j) for j in range(20_000)) for i in range(20)]
    for i, frames in enumerate(flood):
        assert job.ask(wire.Batch(STREAM, i * 20_000, (i + 1) * 20_000, 20_000, frames)) == wire.Accepted()
    for _ in range(20):
        job.log_honestly(50)
    report = job.finish(deadline_s=1.0)
    assert report.lanes["jsonl"][HONEST].state == "finished"
    assert report.lanes["jsonl"][HOSTILE].pending > 0, "the flood was too small to show anything"


def test_beside_a_flooding_site_another_one_is_still_answered_and_loses_nothing(job: Job) -> None:
    """Eight threads flood. The honest site may be told to come again, as by any busy receiver."""
    stop = threading.Event()

    def flood(number: int) -> None:
        seq = 0
        while not stop.is_set():
            request = batch([metrics(seq + i) for i in range(50)], seq, stream=f"{number:032x}")
            seq += 50 if isinstance(job.ask(request), wire.Accepted) else 0

    threads = [threading.Thread(target=flood, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    try:
        first = job.sent
        until = time.monotonic() + 30
        while job.sent < first + 500 and time.monotonic() < until:
            records = [metric(job.sent + i, key="honest/0") for i in range(50)]
            if isinstance(job.ask(batch_of(records), HONEST), wire.Accepted):
                job.honest_records += records
        assert job.sent == first + 500
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    job.finish()


def test_terminals_get_no_command_and_each_cell_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines("a\x1b]0;title\x07b\nsecond \u202e line", "é 東京 👍")
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07b\nsecond \\u202e line\né 東京 👍\n"
    assert printable("a\nb\r\u2028\ud800") == "a\\nb\\r\\u2028\\ud800"


def test_a_reader_of_the_gate_can_rely_on_its_table_of_reasons() -> None:
    assert check_received_batch.__doc__ is not None
    documented = {line.split("``")[1] for line in check_received_batch.__doc__.splitlines() if line.startswith("``")}
    assert {reason for reason, _ in BAD.values()} | {"too_many_keys", "too_many_values"} == documented


def test_what_is_good_passes_unchanged() -> None:
    good = Record(3, 1e9, 2**63 - 1, None, Params({"a": [{"b": [None, True, 1, 2.5, "x"]}], "c": {}}))
    body = encode_frame(good)[9:]
    assert check_record(STREAM, Kind.PARAMS, body, KnownKeys()) == decode_body(body) == good
    assert check_record(STREAM, Kind.METRICS, encode_frame(metric(0))[9:], KnownKeys()) == metric(0)
    with pytest.raises(RefusedRecordError):
        check_record(STREAM, Kind.TAGS, body, KnownKeys())
