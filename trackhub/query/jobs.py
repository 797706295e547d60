# SPDX-License-Identifier: Apache-2.0
"""Reads finished or running jobs from what they left on a disk: records, params, files and delivery.

`read_jobs` finds the journals at or under a path, and puts those of one job together. Export, report and
`trackhub.load` use it. Nothing on the disk is changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, overload

from trackhub.delivery.blob_store import BlobStore
from trackhub.delivery.journal.find_journals_and_spools import find_all
from trackhub.delivery.report import RUNNING, status_of_job
from trackhub.delivery.report_text import format_counted, format_job
from trackhub.errors import ConfigError, JournalError
from trackhub.job_and_run_info import RunStatus, Side
from trackhub.query.journal_file import JournalFile
from trackhub.records import Blob, Kind, Record

__all__ = ["StoredJob", "StoredJobs", "StoredRecord", "read_jobs"]

_MAX_NAMES = 5


class StoredRecord(NamedTuple):
    """A record, and where it comes from.

    Attributes:
        site: the site that logged it, or ``server``, or ``federation``.
        stream: the id of the writing process, 32 hex digits. The records of a stream are in order.
        record: time, step, round and payload.
    """

    site: str
    stream: str
    record: Record


class StoredJob:
    """A job, as one or more journals have it: the server's, and those of sites with a receiver of their own.

    `read_jobs` makes it. One thread may use it. A job that runs is read as it was when it was opened.

    Attributes:
        id: the job's id.
        name: what a person calls the job.
        notes: its description, in Markdown.
        tags: its labels.
        created: unix seconds (UTC) of the job's first record; 0 if it has none.
        status: how it ended, as in `trackhub.job_and_run_info.RunStatus`, or ``running``.
        sites: the names of the sites that have records, sorted.
        reports: receiver -> what became of the records. A receiver is ``server``, a client's site, or else the
            journal's path.
    """

    def __init__(self, journals: list[JournalFile]) -> None:
        """Put together what the journals have. Call `read_jobs` instead, which finds them.

        Args:
            journals: the journals of one job; at least one.
        """
        # A server's journal comes first. A journal that continues another one comes last, since it has only later
        # records.
        self._journals = sorted(journals, key=lambda j: (j.continues, j.side != Side.SERVER, str(j.path)))
        job = self._journals[0].job
        self.id, self.name, self.notes, self.tags = job.id, job.name, job.notes, job.tags
        sites = [site for journal in self._journals for site in journal.sites.values()]
        self.created = min((site.created for site in sites), default=0.0)
        self.sites = sorted({site.name for site in sites})
        self.reports = {_receiver_name(journal): journal.report for journal in self._journals}
        self.status = status_of_job([journal.report for journal in self._journals])

    def close(self) -> None:
        """Remove temporary files. Idempotent."""
        for journal in self._journals:
            journal.close()

    def records(self, site: str, kinds: Collection[Kind] | None = None) -> Iterator[StoredRecord]:
        """Yield each record of a site once, in the order of each stream. Takes little memory.

        A record that two receivers have is yielded once. A record that cannot be read is left out, and `problems` says
        so.

        Args:
            site: its name.
            kinds: the kinds of records to yield; None for all.

        Raises:
            JournalError: a journal cannot be read any more.
        """
        reached: dict[str, int] = {}
        for journal in sorted(self._journals, key=lambda j: (j.continues, -_records_of(j, site))):
            streams = journal.sites[site].streams if site in journal.sites else {}
            for stream, record in journal.records(site, kinds):
                if record.seq >= reached.get(stream, 0):
                    yield StoredRecord(site, stream, record)
            for stream, next_seq in streams.items():
                reached[stream] = max(next_seq, reached.get(stream, 0))

    def blob_path(self, site: str, blob: Blob) -> Path | None:
        """Return the file with the bytes of an image or artifact. None if it is not there.

        Args:
            site: the site that logged it.
            blob: the reference in the record.
        """
        for journal in self._journals:
            blobs = BlobStore(journal.path.parent / "blobs")
            if blobs.has(site, blob.name) and not blobs.folder(site).is_symlink():
                return blobs.folder(site) / blob.name
        return None

    def problems(self) -> list[str]:
        """Return why records may be missing, as sentences. Call it after reading, which may find more reasons."""
        found = []
        if self.status == RUNNING:
            found.append("The job still runs. This is what had arrived when it was read.")
        elif any(report.delivering for report in self.reports.values()):
            found.append("The job has ended, and its records are still being delivered. This is what had arrived.")
        if self.status == RunStatus.KILLED and any(report.left_over() for report in self.reports.values()):
            found.append("The job's processes were killed. `trackhub replay` delivers what they left.")
        for journal in self._journals:
            if journal.rebuilt:
                found.append(
                    f"The journal {journal.path} is damaged ({journal.rebuilt}). This is what can still be read of it. "
                    "`trackhub replay` repairs it."
                )
            found += [f"{n:,} records of {site} cannot be read." for site, n in sorted(journal.unreadable.items())]
            found += [
                f"{n:,} records of {site} were removed by `trackhub prune` after their delivery."
                for site, n in sorted(journal.pruned.items())
            ]
        doubts: dict[str, list[str]] = {}
        for report in self.reports.values():
            for name, site in sorted(report.sites.items()):
                waiting = site.at_site.spooled + site.at_site.unreadable if site.at_site is not None else 0
                if waiting and site.final:
                    found.append(f"{waiting:,} records of {name} are still in its spool.")
                for doubt in format_counted(site):
                    doubts.setdefault(doubt, []).append(name)
        found += [f"{_some(list(dict.fromkeys(names)))}: {doubt}." for doubt, names in doubts.items()]
        return list(dict.fromkeys(found))


class StoredJobs(Sequence[StoredJob]):
    """The jobs at or under a path, the oldest first. Use it in a ``with`` block, or call ``close``.

    Attributes:
        errors: the journals and folders that cannot be read at all, each with the reason.
    """

    def __init__(self, jobs: list[StoredJob], errors: list[JournalError]) -> None:
        """Keep the jobs and the errors. Call `read_jobs` instead, which finds them."""
        self._jobs = jobs
        self.errors = errors

    @overload
    def __getitem__(self, index: int) -> StoredJob: ...

    @overload
    def __getitem__(self, index: slice) -> list[StoredJob]: ...

    def __getitem__(self, index: int | slice) -> StoredJob | list[StoredJob]:
        return self._jobs[index]

    def __len__(self) -> int:
        return len(self._jobs)

    def __enter__(self) -> StoredJobs:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove temporary files. Idempotent."""
        for job in self._jobs:
            job.close()

    def problems(self) -> list[str]:
        """Return why records may be missing, as sentences. Call it after reading, which may find more reasons."""
        found = [str(error) for error in self.errors]
        for job in self._jobs:
            about = f"{format_job(job.id, job.name)}: " if len(self._jobs) > 1 else ""
            found += [about + problem for problem in job.problems()]
        return found


def read_jobs(*paths: str | Path) -> StoredJobs:
    """Return the jobs at or under one or more paths, the oldest first.

    Args:
        paths: each a journal (``trackhub.db``); a run folder, of a job, a server or a site; a folder of many jobs; or
            what ``download_job`` of FLARE made.

    Raises:
        ConfigError: there is no journal at or under the paths.
        JournalError: none of the journals can be read.
    """
    found = find_all(map(Path, paths))
    if not found.journals:
        raise ConfigError(
            f"there is no journal at or under {', '.join(map(str, paths))}, only a spool, with records that no "
            "receiver has yet. `trackhub replay` delivers them"
        )
    by_job: dict[str, list[JournalFile]] = {}
    errors = [*found.unreadable]
    for file in found.journals:
        try:
            journal = JournalFile(file)
        except JournalError as error:
            errors.append(error)
        else:
            by_job.setdefault(journal.job.id, []).append(journal)
    if not by_job:
        raise errors[0]
    jobs = [StoredJob(journals) for journals in by_job.values()]
    return StoredJobs(sorted(jobs, key=lambda job: (job.created, job.id)), errors)


def _some(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def _receiver_name(journal: JournalFile) -> str:
    if journal.side == Side.SERVER and not journal.continues:
        return str(Side.SERVER)
    names = [*journal.sites] or [*journal.report.sites]
    return names[0] if len(names) == 1 and not journal.continues else str(journal.path)


def _records_of(journal: JournalFile, site: str) -> int:
    return sum(journal.sites[site].streams.values()) if site in journal.sites else 0
