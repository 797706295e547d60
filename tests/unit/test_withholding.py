# SPDX-License-Identifier: Apache-2.0
"""What may not leave a site is in no request of its sender. All of it is counted, and the counts stay at the site."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import (
    STREAM,
    WAIT_S,
    assert_accounted,
    assert_balanced,
    json_lines,
    new_spool,
    spool_of,
)
from tests.unit.rigs import SITE, SenderRig
from trackhub.cli.status import spool_status
from trackhub.delivery import wire
from trackhub.errors import ConfigError
from trackhub.framing import decode_body, encode_frame, scan_frames
from trackhub.policy import Policy, SiteRules
from trackhub.policy.thinning import Seen
from trackhub.records import Gap, Metrics, Record, Text
from trackhub.spool.acks import read_ack
from trackhub.spool.apply_policy import Withholding
from trackhub.spool.batch import SpoolBatch
from trackhub.spool.counts import add_up
from trackhub.spool.layout import set_policy
from trackhub.spool.reading import SpoolReader
from trackhub.writer.writer import Writer

VALIDATION_ONLY = Policy(allow=("metrics:val/*",), digits=3)
PLANTED = ("planted", "0.123456", "424242")


def restrict(spool: Path, job: Policy | None = None, operator: Policy | None = None, forbid: tuple[str, ...] = (),
             folder: Path | None = None) -> None:  # fmt: skip
    """Give the spool its rules, as the FLARE widget does before the trainer starts."""
    rules = SiteRules.of_job(job).with_operator(operator, forbid)
    set_policy(spool, msgspec.structs.replace(rules, operator_folder=str(folder or "")).plain())


def log_all_kinds(spool: Path, folder: Path) -> int:
    """Log records of every kind with planted keys and values. Return how many."""
    (folder / "planted.bin").write_bytes(b"planted bytes")
    with Writer(spool) as writer:
        writer.log_params({"planted-param": 424242, "val/x": "planted"})
        writer.set_tags({"planted-tag": "planted"})
        writer.log_text("planted-text", "planted")
        writer.log_image("planted-image", bytes_image(b"planted pixels"))
        writer.log_image("val/image", bytes_image(b"planted pixels"))
        writer.log_histogram("planted-histogram", [424242.0, 1.0])
        writer.log_table("planted-table", ["planted"], [[424242]])
        writer.log_artifact(folder / "planted.bin", "planted-artifact")
        writer.log({"planted/loss": 424242.0, "val/loss": 0.123456}, 1)
        writer.log({"planted/loss": 424242.0}, 2)
        writer.log({"val/loss": 0.5}, 3)
    return 11


def bytes_image(text: bytes) -> Any:
    """Return an image in whose pixels this text stands."""
    import numpy as np

    return np.frombuffer(text.ljust(48, b"\0")[:48], dtype=np.uint8).reshape(4, 4, 3)


def points(rig: SenderRig) -> list[tuple[str, int | None, float]]:
    return [(k, r["step"], v) for r in rig.stored() if r["kind"] == "metrics" for k, v in r["values"].items()]


def test_only_rounded_validation_metrics_leave_and_all_else_is_counted(rig: SenderRig, tmp_path: Path) -> None:
    """The records were written before anybody knew a policy: it holds all the same."""
    carried: list[bytes] = []

    def channel(data: bytes, timeout_s: float) -> bytes:
        carried.append(data)
        return rig.channel(data, timeout_s)

    logged = log_all_kinds(rig.spool, tmp_path)
    restrict(rig.spool, VALIDATION_ONLY)

    counts = rig.sender(channel).close(WAIT_S)

    report = rig.finish()
    assert points(rig) == [("val/loss", 1, 0.123), ("val/loss", 3, 0.5)]
    assert [text for text in PLANTED if any(text.encode() in data for data in carried)] == []
    assert not any(isinstance(request, wire.Chunk) for request in rig.requests)
    assert (counts.logged, counts.withheld, counts.acked, counts.altered) == (logged, 9, 2, {})
    assert_balanced(report, {SITE: logged}, {("jsonl", SITE): 2})
    assert report.sites[SITE].explained == {"withheld": 9}
    # The rules and their counts are at the site, and nowhere else.
    at_site = spool_status(rig.spool)["receivers"]["server"]
    assert (at_site["withheld"], at_site["withheld_by_rule"]) == (9, {"job.allow": 9})
    assert at_site["altered_by_rule"] == {"job.allow": 1, "job.digits": 1}
    assert not any(b"job.allow" in data for data in carried)
    assert list(rig.spool.glob("*.blob")) == []


def test_a_policy_that_withholds_all_leaves_a_balanced_report(rig: SenderRig, tmp_path: Path) -> None:
    restrict(rig.spool, operator=Policy(allow=()))
    logged = log_all_kinds(rig.spool, tmp_path)
    sender = rig.sender()

    assert sender.flush(WAIT_S)
    counts = sender.close(WAIT_S)

    assert (counts.withheld, counts.acked, counts.spooled) == (logged, 0, 0)
    report = rig.finish()
    assert_balanced(report, {SITE: logged})
    assert (report.sites[SITE].journaled, report.undelivered()) == (0, 0)


def test_a_gap_of_withheld_records_says_nothing_but_their_number(rig: SenderRig) -> None:
    restrict(rig.spool, VALIDATION_ONLY)
    with Writer(rig.spool) as writer:
        for _ in range(40):
            writer.log({"planted": 424242.0}, 424242)
        writer.log({"val/loss": 1.0}, 7)

    rig.sender().close(WAIT_S)

    (batch,) = [request for request in rig.requests if isinstance(request, wire.Batch)]
    gap, kept = [decode_body(batch.frames[frame.body : frame.end]) for frame in scan_frames(batch.frames)]
    assert (gap.seq, gap.step, gap.round, gap.payload) == (0, None, None, Gap(40, "withheld"))
    assert (gap.time, kept.seq, kept.step) == (kept.time, 40, 7)
    rig.finish()


def test_the_sites_own_receiver_gets_all_but_what_the_operator_forbids(tmp_path: Path) -> None:
    spool = new_spool(tmp_path / "spool", "server", "client")
    restrict(spool, VALIDATION_ONLY, Policy(allow=()), ("image", "artifact"))
    logged = log_all_kinds(spool, tmp_path)

    def read(cursor: str) -> Counter[str]:
        reader, kinds = SpoolReader(spool, cursor), Counter[str]()
        while batch := reader.next_batch(1000, 1 << 20, final=True):
            for frame in scan_frames(batch.frames):
                kinds[type(decode_body(batch.frames[frame.body : frame.end]).payload).__name__] += 1
            reader.settle(batch)
        count = add_up(reader.counts().values())
        assert_accounted(count, logged)
        assert sum(count.withheld_by_rule.values()) == count.withheld
        return kinds

    own = read("client")
    assert own == {"Metrics": 3, "Params": 1, "Tags": 1, "Text": 1, "Histogram": 1, "Table": 1, "Gap": 1}
    assert read("server").keys() == {"Gap"}
    assert list(spool.glob("*.blob")) == []


def test_what_a_policy_lets_pass_leaves_byte_for_byte(rig: SenderRig) -> None:
    restrict(rig.spool, Policy(deny=("secret*",), digits=7))
    with Writer(rig.spool) as writer:
        for step in range(2500):
            writer.log({"val/loss": step / 8}, step)
        stream = spool_of(writer).stream
    stored = b"".join(file.read_bytes()[8:] for file in sorted(rig.spool.glob(f"{stream}-*.spool")))

    rig.sender().close(WAIT_S)

    assert b"".join(request.frames for request in rig.requests if isinstance(request, wire.Batch)) == stored
    rig.finish()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_batch_that_is_retries_after_a_crash_is_thinned_alike(rig: SenderRig, when: str) -> None:
    """The site's counts and the receiver's agree, also if the site died before it could store a reply."""
    restrict(rig.spool, Policy(every=7, interval_s=0.0001))
    with Writer(rig.spool) as writer:
        for step in range(3000):
            writer.log({"a": step, "b": step} if step % 3 else {"a": step}, step)
    died = threading.Event()

    def die(request: wire.Request) -> None:
        if isinstance(request, wire.Batch) and request.first_seq > 0 and not died.is_set():
            died.set()
            raise SystemExit  # ends the sender's thread as a killed process would

    setattr(rig, when, die)
    first = rig.sender()
    assert died.wait(WAIT_S)
    first._thread.join(WAIT_S)
    first._hold.release()

    counts = rig.sender().close(WAIT_S)

    report = rig.finish()
    site = report.sites[SITE]
    assert counts.logged == 3000 == counts.acked + counts.withheld
    assert (site.journaled, site.explained["withheld"]) == (counts.acked, counts.withheld)
    assert_balanced(report, {SITE: 3000}, {("jsonl", SITE): counts.acked})


def test_the_last_value_of_a_round_leaves_when_the_round_ends(rig: SenderRig) -> None:
    restrict(rig.spool, Policy(every=100, keep_last=True))
    sender = rig.sender()
    with Writer(rig.spool) as writer:
        for number in range(2):
            sender.set_round(number)
            for step in range(10):
                writer.log({"loss": 10 * number + step}, step)
            assert sender.flush(WAIT_S)
            assert sent(rig) == [0, 9, 19][: number + 2]
    counts = sender.close(WAIT_S)

    assert (counts.withheld, counts.acked) == (17, 3)
    rig.finish()


def sent(rig: SenderRig) -> list[float]:
    """Return the values that the sender has sent, in order."""
    frames = b"".join(request.frames for request in rig.requests if isinstance(request, wire.Batch))
    records = [decode_body(frames[frame.body : frame.end]) for frame in scan_frames(frames)]
    return [value for r in records if isinstance(r.payload, Metrics) for value in r.payload.values.values()]


calls = st.lists(st.tuples(st.sampled_from(["a", "b", "ab", "note"]), st.integers(0, 2)), min_size=1, max_size=40)


@settings(deadline=None)
@given(calls, st.integers(2, 4), st.integers(1, 60))
def test_each_nth_value_and_the_last_of_each_round_leave(
    made: list[tuple[str, int]], every: int, batch_records: int
) -> None:
    """Whatever the batches are, in order and without a hole. Only a batch that must go on lets one more value pass."""
    number, records = 0, []
    for seq, (what, new_round) in enumerate(made):
        number += new_round // 2
        payload = Text("note", "x") if what == "note" else Metrics({key: float(seq) for key in what})
        records.append(Record(seq, 1000.0 + seq, seq, number, payload))
    policy = Policy(every=every, keep_last=True, deny=("text:*",))
    withholding = Withholding.for_reader(SiteRules.of_job(policy).plain(), "server")
    assert withholding is not None

    left, batches, at = [], 0, 0
    seen: Seen = {}
    while at < len(records):
        part = records[at : at + batch_records]
        frames = b"".join(map(encode_frame, part))
        batch = SpoolBatch(STREAM, at, at + len(part), len(part), frames, (), (), {}, 0, 8 + len(frames))
        more = at + len(part) < len(records)
        found = withholding.apply(batch, seen, more=more, ended=not more)
        assert found is not None
        assert found.next_seq > at
        inside = [decode_body(found.frames[frame.body : frame.end]) for frame in scan_frames(found.frames)]
        gaps = sum(record.payload.count for record in inside if isinstance(record.payload, Gap))
        assert found.records + gaps == found.next_seq - at
        assert found.explained.get("withheld", 0) == sum(found.withheld.values()) == gaps
        assert found.offset == 8 + sum(len(encode_frame(record)) for record in records[at : found.next_seq])
        left += [(r.seq, key) for r in inside if isinstance(r.payload, Metrics) for key in r.payload.values]
        seen, at, batches = found.seen, found.next_seq, batches + 1

    due = set()
    for key in "ab":
        having = [r for r in records if isinstance(r.payload, Metrics) and key in r.payload.values]
        due |= {(r.seq, key) for i, r in enumerate(having) if i % every == 0}
        due |= {({r.round: r for r in having}[number].seq, key) for number in {r.round for r in having}}
    assert due <= set(left)
    assert len(left) - len(due) <= 2 * (batches - 1)
    assert left == sorted(left)


def test_a_record_that_cannot_be_read_does_not_leave() -> None:
    record = Record(0, 1.0, 1, 0, Text("val/x", "planted"))
    body = bytearray(encode_frame(record))
    as_metrics = encode_frame(Record(0, 1.0, 1, 0, Metrics({"val/x": 1.0})))[8:9]
    body[8:9] = as_metrics  # the frame says metrics, the body says text
    body[:4] = struct.pack("<I", zlib.crc32(bytes(body[4:])))
    withholding = Withholding.for_reader(SiteRules.of_job(Policy(allow=("metrics:*",))).plain(), "server")
    assert withholding is not None

    found = withholding.apply(
        SpoolBatch(STREAM, 0, 1, 1, bytes(body), (), (), {}, 0, len(body)), {}, more=False, ended=True
    )

    assert found is not None
    assert (found.records, found.withheld, b"planted" in found.frames) == (0, {"unreadable": 1}, False)


def test_counts_by_rule_outlive_the_streams_of_ended_processes(rig: SenderRig) -> None:
    restrict(rig.spool, VALIDATION_ONLY)
    sender = rig.sender()
    for i in range(40):
        with Writer(rig.spool) as writer:
            writer.log({"train/loss": i, "val/loss": 0.12345})
            writer.log({"train/loss": i})
        assert sender.flush(WAIT_S)
    sender.close(WAIT_S)

    at_site = spool_status(rig.spool)["receivers"]["server"]
    assert len(list(rig.spool.glob("*.ledger"))) < 40
    assert (at_site["logged"], at_site["withheld_by_rule"]) == (80, {"job.allow": 40})
    assert at_site["altered_by_rule"] == {"job.allow": 40, "job.digits": 40}
    rig.finish()


def test_a_replay_applies_the_rules_of_the_job_and_of_the_operators_file_now(tmp_path: Path) -> None:
    spool, local = new_spool(tmp_path / "site" / "trackhub" / "spool"), tmp_path / "local"
    local.mkdir()
    restrict(spool, Policy(digits=2), Policy(deny=("train/*",)), folder=local)
    with Writer(spool) as writer:
        writer.log({"train/loss": 1.0, "val/loss": 0.12345, "val/other": 1.0}, 0)
        writer.log({"val/other": 1.0}, 1)
    (local / "trackhub.toml").write_text('[policy]\nallow = ["*/loss"]\n')  # stricter since then, and looser

    done = subprocess.run(
        [sys.executable, "-m", "trackhub.cli", "replay", str(spool), "--backend", "jsonl"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    (stored,) = json_lines(next((tmp_path / "site" / "jsonl").rglob("site-1.jsonl")))
    assert stored["values"] == {"val/loss": 0.12}
    shown = json.loads(
        subprocess.run([sys.executable, "-m", "trackhub.cli", "status", str(spool), "--json"],
                       capture_output=True, text=True, timeout=60, check=True).stdout
    )  # fmt: skip
    at_site = shown["spools"][0]["receivers"]["server"]
    assert at_site["withheld_by_rule"] == {"operator.allow": 1}
    assert at_site["altered_by_rule"] == {"operator.deny train/*": 1, "operator.allow": 1, "job.digits": 1}


def test_rules_that_cannot_be_read_let_nothing_leave(tmp_path: Path) -> None:
    spool = new_spool(tmp_path / "spool")
    set_policy(spool, {"policies": [["job", {"allow": "everything"}]]})

    with pytest.raises(ConfigError, match="policy of the spool"):
        SpoolReader(spool, "server")


def test_without_a_policy_the_cursor_file_says_nothing_of_rules(rig: SenderRig) -> None:
    with Writer(rig.spool) as writer:
        writer.log({"loss": 1.0})
        stream = spool_of(writer).stream

    rig.sender().close(WAIT_S)

    ack = read_ack(rig.spool, stream, "server")
    assert (ack.acked, ack.withheld, ack.altered, ack.seen) == (1, {}, {}, {})
    rig.finish()
