# SPDX-License-Identifier: Apache-2.0
"""The newest metrics of each site in a journal that is being written. `trackhub.watch` shows them.

Each look reads only the rows that are new since the last look, up to a limit for each site.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trackhub.delivery.check_received_batch import KnownKeys, RefusedRecordError, check_record
from trackhub.delivery.journal.read_only import open_read_only
from trackhub.delivery.journal.tables_and_rows import Row, stored_records
from trackhub.records import Kind, Metrics

__all__ = ["NewestMetrics", "SiteMetrics"]

_MAX_ROWS = 20
_MAX_BYTES = 1 << 20
_MAX_KEYS = 200


@dataclass
class SiteMetrics:
    """What a site logged last.

    Attributes:
        round: the newest round of its metrics. None if they have no round.
        step: the highest step of its metrics, which shows how far training got. Validation may log lower steps, if it
            counts rounds. None if the metrics have no step.
        values: key -> its newest value. Keys that were logged last come last.
    """

    round: int | None = None
    step: int | None = None
    values: dict[str, float] = field(default_factory=dict)


class NewestMetrics:
    """Follows one journal. Used by one thread.

    Attributes:
        sites: site -> what it logged last. Sites without metrics are left out.
        began: when the journal's first site was heard, in unix seconds (UTC); None before that.
    """

    def __init__(self, journal: Path) -> None:
        """Read nothing yet.

        Args:
            journal: the journal's file. Its receiver may be writing to it.
        """
        self._journal = journal
        self._upto: dict[int, int] = {}
        self.sites: dict[str, SiteMetrics] = {}
        self.began: float | None = None

    def read(self) -> None:
        """Read the new rows. If a site has logged more than the limit of one look, read only its newest rows.

        Raises:
            JournalError: the journal cannot be read.
        """
        with open_read_only(self._journal) as db:
            for site, name, created in db.execute("SELECT id, name, CAST(created AS REAL) FROM sites").fetchall():
                self.began = created if self.began is None else min(self.began, created)
                query = (
                    "SELECT b.id, s.name, b.first_position, b.records, b.frames FROM batches b"
                    " JOIN streams s ON s.id = b.stream WHERE b.site = ? AND b.id > ? ORDER BY b.id DESC LIMIT ?"
                )
                rows: list[Row] = []
                size = 0
                for found in db.execute(query, (site, self._upto.get(site, 0), _MAX_ROWS)):
                    rows.append(Row(*found))
                    size += len(rows[-1].frames)
                    if size > _MAX_BYTES:
                        break
                if rows:
                    self._upto[site] = rows[0].id
                    self._take(self.sites.setdefault(name, SiteMetrics()), rows[::-1])

    def _take(self, newest: SiteMetrics, rows: list[Row]) -> None:
        for row in rows:
            for _, kind, body in stored_records(row):
                if kind != Kind.METRICS:
                    continue
                try:
                    record = check_record(row.stream, kind, body, KnownKeys())  # the journal may come from elsewhere
                except RefusedRecordError:
                    continue
                assert isinstance(record.payload, Metrics)
                if record.round is not None:
                    newest.round = record.round
                if record.step is not None:
                    newest.step = max(record.step, newest.step or 0)
                for key, value in record.payload.values.items():
                    newest.values.pop(key, None)
                    newest.values[key] = value
        for key in list(newest.values)[:-_MAX_KEYS]:
            del newest.values[key]
