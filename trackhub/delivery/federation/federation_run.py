# SPDX-License-Identifier: Apache-2.0
"""Writes the federation run: facts about the rounds, and the statistics that `Aggregation` computes.

The receiver of a job starts one `FederationRun`, and tells it of new rows in the journal. The run's records go into the
journal under the site name `trackhub.job_and_run_info.FEDERATION`. So lanes, counts and replays treat them like a
site's records. One transaction stores statistics together with the id of the last row that was read. So a killed
receiver repeats no statistics, and skips none.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import msgspec

from trackhub.delivery.blob_store import BlobStore
from trackhub.delivery.federation.aggregation import JOB_ENDED, Aggregation, Output, in_records
from trackhub.delivery.federation.delivery_health import DeliveryHealth
from trackhub.delivery.federation.row_digest import KnownRows, RowDigest
from trackhub.delivery.federation.waiting_records import WaitingRecords
from trackhub.delivery.journal.journal import WAIT_S, Journal
from trackhub.delivery.journal.tables_and_rows import FEDERATION_ROW, Row, stored_records
from trackhub.delivery.wire import Batch, Final, KeepAlive, SiteCounts
from trackhub.errors import JournalError
from trackhub.framing import decode_body, decode_metrics, encode_frame, metrics_bodies
from trackhub.job_and_run_info import FEDERATION
from trackhub.plain_values_to_structs import prepare
from trackhub.records import Artifact, Kind, Metrics, Params, Payload, Record, Tags, Text
from trackhub.runnable_commands import command_for

__all__ = ["FederationOptions", "FederationRun"]

_READ_BYTES = 1 << 20
_PAUSE_S = 0.1  # between two looks at the journal: a look for each batch of a busy job would cost more
_RETRY_S = 1.0
_BATCH_WAIT_S = 0.5  # the longest wait for the journal while a site waits for the answer to its batch
_FILE_WAIT_S = 0.5
"""The longest wait of each of `log_file`'s two transactions for a locked journal. FLARE's own end of the job waits."""

_MAX_TEXT_CHARS = 100_000
_LAST_ROW = 1 << 62  # higher than the id of any row
_log = logging.getLogger(__name__)


class FederationOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the federation run holds.

    Attributes:
        aggregate: patterns of the keys whose statistics it holds. None for the keys that two or more sites log with the
            round as their step.
        aggregate_weight: the key of the metric that gives a site's weight in weighted means. None for the number of
            steps that the site trained, as FLARE reports it.
    """

    aggregate: tuple[str, ...] | None = None
    aggregate_weight: str | None = None


prepare(FederationOptions)


class FederationRun:
    """Writes one job's federation run with a thread of its own. ``log`` may be called from any thread.

    If the journal cannot be written, the records wait, and the thread tries again.
    """

    def __init__(
        self,
        journal: Journal,
        options: FederationOptions,
        notify: Callable[[int], None],
        job: str,
        blobs: BlobStore,
        *,
        lanes: Sequence[str] = (),
        is_replay: bool = False,
    ) -> None:
        """Prepare the thread; ``start`` starts it.

        Args:
            journal: the journal with the sites' records. The federation run's records go there, too.
            options: what the run holds.
            notify: called with the site's id in the journal when there are new rows of the federation run.
            job: the job's id.
            blobs: where the receiver keeps the bytes of files.
            lanes: the names of all lanes.
            is_replay: True if a replay delivers the rest of a job that has ended.

        Raises:
            JournalError: the journal cannot be read.
        """
        self._journal = journal
        self._notify_lanes = notify
        self._is_replay = is_replay
        self._aggregation = Aggregation(options.aggregate, options.aggregate_weight)
        self._health = DeliveryHealth(journal, lanes)
        self._facts = _Stream(journal, job, "facts", self._health)
        self._statistics = _Stream(journal, job, "statistics", self._health)
        self._files = _Stream(journal, job, "files", self._health)
        self._blobs = blobs
        self._counts = _Counts(journal, is_replay=is_replay)
        self._row = 0
        self._known = KnownRows()
        self._unstored: list[Record] = []
        self._sites: dict[int, str] = {}
        self._waiting = WaitingRecords()
        self._was_begun = bool(journal.stream_states(FEDERATION, (self._facts.name,)))
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._storing = threading.RLock()  # held while records are stored, as their numbers must not have gaps
        self._thread = threading.Thread(target=self._main, name="trackhub-federation", daemon=True)

    def start(self) -> None:
        """Start the thread. It reads the rows that the journal has, and then each new row."""
        self._thread.start()

    def expect_batch(self) -> RowDigest:
        """Store the facts that wait, so that they stand in the journal before a batch that has just come. Thread-safe.

        Otherwise records of a round could stand before the fact that the round has begun again, and count as late.

        Returns:
            A digest, which takes the metrics of the batch while `check_received_batch` checks them.

        Raises:
            JournalError: the facts cannot be stored within half a second or so.
        """
        if not self._waiting.is_closed and self._waiting.records():
            self._store_facts(_BATCH_WAIT_S)
        return self._aggregation.digest()

    def notify(self, site: str, digest: RowDigest, records: int, row: int, stored: int) -> None:
        """Say that the journal has a new row of a site. Thread-safe; does not block.

        Args:
            site: who logged it.
            digest: what was in the batch.
            records: the number of records in the batch.
            row: the row's id.
            stored: the number of records in the row. It is lower if the journal had some of the batch's records
                already.
        """
        self._health.note_stored(row)
        # With its digest, the row need not be read and decoded again.
        is_known = stored == records and self._known.add(row, site, digest)
        # Most rows hold only keys that will never be aggregated. The thread need not wake for them.
        if digest.keys or not is_known:
            self._wake.set()

    def log(self, values: Mapping[str, float], round_number: int) -> None:
        """Add facts about a round, with the round as their step. Thread-safe; does not block.

        Args:
            values: key -> fact. Facts with an invalid key are left out.
            round_number: the round.
        """
        kept = {key: float(value) for key, value in values.items() if self._waiting.is_key(key)}
        if kept:
            self._add(Metrics(kept), round_number)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Add params of the job. Thread-safe; does not block. Does nothing if an earlier receiver began the run."""
        self._label(Params({key: value for key, value in params.items() if self._waiting.is_key(key)}))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Add tags of the job, under the same conditions as ``log_params``."""
        self._label(Tags({key: value for key, value in tags.items() if self._waiting.is_key(key)}))

    def _label(self, payload: Params | Tags) -> None:
        # If the run was begun, an earlier receiver has logged these, perhaps with other values.
        if payload.values and not self._was_begun:
            self._add(payload, None)

    def log_text(self, key: str, text: str, round_number: int) -> None:
        """Add a text in Markdown. Thread-safe; does not block.

        Args:
            key: the key of the text.
            text: the text. Only its first characters are kept if it is too long.
            round_number: the step of the text.
        """
        if self._waiting.is_key(key):
            self._add(Text(key, text[:_MAX_TEXT_CHARS]), round_number)

    def log_file(self, file: BinaryIO, key: str, artifact_type: str) -> None:
        """Add a file as an artifact. Copies it, and stores the record before it returns. Call it from one thread.

        While another program has the journal locked, this blocks for a second at most, and then raises.

        Args:
            file: the file, open for reading. Nobody may write to it meanwhile.
            key: the artifact's name. Its last part is the name of the file.
            artifact_type: what the file is, such as ``model``.

        Raises:
            RefusedRecordError: ``key`` cannot be a key.
            OSError: the file cannot be read or copied.
            JournalError: the journal cannot be written.
        """
        self._waiting.check_key(key)
        now, filename = time.time(), key.rpartition("/")[2]
        blob = self._blobs.keep(
            FEDERATION, f"{self._files.name}-{self._files.next_seq(now, _FILE_WAIT_S)}", file, filename
        )
        record = Record(0, now, None, None, Artifact(key, blob, filename, artifact_type))
        site = self._files.append([record], {}, wait_s=_FILE_WAIT_S)
        self._notify_lanes(site)  # the counts follow, at the latest when the job ends

    def _add(self, payload: Payload, round_number: int | None) -> None:
        if self._waiting.add(Record(0, time.time(), round_number, round_number, payload)):
            self._wake.set()

    def finish(self, timeout_s: float) -> None:
        """Write the statistics that the journal's last rows complete, and end. Blocks up to ``timeout_s``.

        A replay writes whatever is not written by then.
        """
        self._waiting.close()
        self._wake.set()
        self._thread.join(timeout_s)
        self._stop.set()
        if self._thread.is_alive():
            command = command_for("trackhub replay", self._journal.path.parent)
            _log.warning("the federation run is not complete. Complete it with `%s`", command)

    def _main(self) -> None:
        warned = False
        has_restored = False
        while not self._stop.is_set():
            try:
                if not has_restored:
                    self._restore()
                    has_restored = True
                if self._work():
                    return
            except JournalError as e:
                if not warned and not self._stop.is_set():
                    _log.warning("%s; the federation run waits until the journal can be used", e)
                warned = True
                self._stop.wait(_RETRY_S)
            except Exception:  # a defect of trackhub. It must end only this run.
                self._waiting.close()
                _log.exception("the federation run ends here; all other runs go on")
                return

    def _work(self) -> bool:
        """Store facts, take new rows, then wait for more. Return True if the job ends and all is done."""
        self._wake.clear()  # before anything is read, so that later news sets it again
        ending = self._waiting.is_closed
        self._store_facts()
        self._read()
        if ending:
            self._end()
            return True
        self._wake.wait()
        if not self._waiting.is_closed:
            self._stop.wait(_PAUSE_S)
        return False

    def _restore(self) -> None:
        """Read again the rows that the last receiver had read, to build up the same state."""
        upto = int(self._journal.meta().get(FEDERATION_ROW, "0"))
        while self._row < upto and (rows := self._journal.read_all(self._row, _READ_BYTES)):
            for site, row in rows:
                if row.id > upto:
                    return
                self._take(site, row)

    def _read(self) -> None:
        """Take the journal's new rows, and store the statistics that they complete."""
        while True:
            self._store_statistics()
            self._known.forget_to(self._row)
            self._take_known()
            rows = self._journal.read_all(self._row, _READ_BYTES)
            if not rows:
                return
            for site, row in rows:
                if self._take_known() >= row.id:
                    continue
                # Store the statistics before the next row is taken. If that fails, only the rows after this one are
                # read again.
                self._unstored += [_record_of(output) for output in self._take(site, row)]
                self._store_statistics()

    def _take_known(self) -> int:
        """Take the next rows while their digests are enough. Return the id of the last row that was taken."""
        while True:
            known = self._known.pop(self._row + 1)
            if known is None or not self._aggregation.add_digest(*known):
                return self._row
            self._row += 1

    def _take(self, site: int, row: Row) -> list[Output]:
        """Give a row to the aggregation. Return the statistics that the row completes."""
        name = self._sites.get(site)
        if name is None:
            name = self._sites[site] = self._journal.site(site)[0]
        self._row = row.id
        if name == FEDERATION:
            return self._aggregation.add_facts(_metrics(row)) if row.stream == self._facts.name else []
        self._aggregation.add(name, _metrics(row))
        return []

    def _store_facts(self, wait_s: float = WAIT_S) -> None:
        with self._turn(wait_s):
            if waiting := self._waiting.records():
                self._store(self._facts, waiting, {}, wait_s)
                self._waiting.remove_first(len(waiting))

    def _store_statistics(self) -> None:
        if self._unstored:
            self._store(self._statistics, self._unstored, {FEDERATION_ROW: str(self._row)})
            stored, self._unstored = self._unstored, []
            if not self._is_replay:
                self._store_health(stored[-1])

    def _store_health(self, last: Record) -> None:
        """Store how delivery stands when a round's statistics are written."""
        values = {key: value for key, value in self._health.values().items() if self._waiting.is_key(key)}
        parts = [Metrics(part) for part in in_records(values)]
        record = msgspec.structs.replace(last, time=time.time())
        self._store(self._facts, [msgspec.structs.replace(record, payload=part) for part in parts], {})

    def _store(
        self, stream: _Stream, records: Sequence[Record], meta: Mapping[str, str], wait_s: float = WAIT_S
    ) -> None:
        with self._turn(wait_s):
            site = stream.append(records, meta, wait_s=wait_s)
            self._notify_lanes(site)
            self._counts.note(site, self._waiting.dropped, final=False, wait_s=wait_s)

    @contextmanager
    def _turn(self, wait_s: float) -> Iterator[None]:
        if not self._storing.acquire(timeout=wait_s):
            raise JournalError("the journal does not take the records of the federation run in time")
        try:
            yield
        finally:
            self._storing.release()

    def _end(self) -> None:
        """Close the rounds that are open, and store the final counts."""
        if self._aggregation.is_unfinished():
            values = {JOB_ENDED: float(self._aggregation.rounds())}
            number = self._aggregation.last_round()
            self._store(self._facts, [Record(0, self._aggregation.last_time, number, number, Metrics(values))], {})
            self._read()
        for site, (name, _) in self._journal.sites().items():
            if name == FEDERATION:
                self._counts.note(site, self._waiting.dropped, final=True)


class _Counts:
    """Stores the counts of the federation run, in the form in which a sender reports the counts of its site."""

    def __init__(self, journal: Journal, *, is_replay: bool) -> None:
        self._journal = journal
        self._is_replay = is_replay
        self._session = uuid.uuid4().hex
        self._number = 0

    def note(self, site: int, dropped: int, *, final: bool, wait_s: float = WAIT_S) -> None:
        """Store the counts as they are now.

        Args:
            site: the federation run's id in the journal.
            dropped: how many records could not be stored.
            final: True if no record follows.
            wait_s: the longest wait for a locked journal, in seconds.
        """
        journaled = self._journal.position_after(site, _LAST_ROW)
        reasons = {"not_stored": dropped} if dropped else {}
        counts = SiteCounts(logged=journaled + dropped, acked=journaled, dropped=reasons)
        self._number += 1
        session, number = self._session, self._number
        message = Final(counts, False, session, number) if final else KeepAlive(counts, session, number)
        with suppress(JournalError):  # the next counts replace these
            self._journal.note_counts(site, message, keep_end=self._is_replay, wait_s=wait_s)


class _Stream:
    """One stream of the federation run. Its id never changes, so its numbering goes on after a restart."""

    def __init__(self, journal: Journal, job: str, what: str, health: DeliveryHealth) -> None:
        self.name = hashlib.sha256(f"{job}\0{what}".encode()).hexdigest()[:32]
        self._journal = journal
        self._health = health
        self._site: int | None = None
        self._next_seq = 0

    def next_seq(self, began: float, wait_s: float = WAIT_S) -> int:
        """Return the number of the next record.

        Args:
            began: its time, in unix seconds.
            wait_s: the longest wait for a locked journal, in seconds.

        Raises:
            JournalError: the journal cannot be used.
        """
        if self._site is None:
            site = self._journal.add_site(FEDERATION, began, wait_s=wait_s)
            state = self._journal.stream_states(FEDERATION, (self.name,)).get(self.name)
            self._next_seq = 0 if state is None else state.next_seq
            self._site = site
        return self._next_seq

    def append(self, records: Sequence[Record], meta: Mapping[str, str], *, wait_s: float = WAIT_S) -> int:
        """Store records, and entries of the table ``meta``, in one transaction. Return the id of the run's site.

        Args:
            records: the records, whose numbers this sets.
            meta: entries of the journal's table ``meta``.
            wait_s: the longest wait for a locked journal, in seconds.

        Raises:
            JournalError: the journal cannot be written. Nothing was stored.
        """
        began = records[0].time
        first = self.next_seq(began, wait_s)
        assert self._site is not None
        after = first + len(records)
        frames = [encode_frame(msgspec.structs.replace(r, seq=first + i)) for i, r in enumerate(records)]
        batch = Batch(self.name, first, after, len(records), b"".join(frames))
        stored = lambda row, _: self._health.note_stored(row)  # noqa: E731
        self._journal.append(self._site, batch, {}, began=began, facts=meta, stored=stored, wait_s=wait_s)
        self._next_seq = after
        return self._site


def _record_of(output: Output) -> Record:
    return Record(0, output.time, output.round, output.round, Metrics(output.values))


def _metrics(row: Row) -> Iterable[Record]:
    """Return the readable metrics in a row, in their order."""
    bodies, end = metrics_bodies(row.frames, 0, row.records)
    if end == len(row.frames):
        with suppress(msgspec.DecodeError):
            return decode_metrics(bodies)
    return _decodable_metrics(row)


def _decodable_metrics(row: Row) -> Iterator[Record]:
    for _, kind, body in stored_records(row):
        if kind == Kind.METRICS:
            with suppress(msgspec.DecodeError):
                record = decode_body(body)
                if isinstance(record.payload, Metrics):
                    yield record
