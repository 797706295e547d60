# SPDX-License-Identifier: Apache-2.0
"""A job and its runs: what identifies them, what a person reads, and how a run ends.

The receiver makes these values. Lanes hand them to backends, which read them through `trackhub.spi`.
"""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import msgspec

from trackhub.errors import ConfigError, PermanentError
from trackhub.records import Blob, key_problem

__all__ = [
    "FEDERATION",
    "SERVER",
    "JobInfo",
    "RunInfo",
    "RunKey",
    "RunStatus",
    "Side",
    "path_component",
    "site_problem",
]

SERVER = "server"
"""The site name of the run that holds what the server itself logs."""

FEDERATION = "federation"
"""The site name of the federation run, which holds statistics across sites."""

_MAX_COMPONENT_CHARS = 150
_MAX_NOTES_CHARS = 100_000
_NOT_IN_NOTES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Side(StrEnum):
    """Where the receiver is."""

    SERVER = "server"
    """On the FLARE server."""
    CLIENT = "client"
    """At a FLARE client."""
    LOCAL = "local"
    """In a script's own process."""


class RunStatus(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    """The site's training ended well."""
    FAILED = "failed"
    """The site's training ended with an error, or the site fell silent."""
    ABORTED = "aborted"
    """Somebody stopped the job."""
    KILLED = "killed"
    """All processes of the job died before they could say how it ended. A replay ends the runs with this status."""


class RunKey(NamedTuple):
    """The identity of a run: one run per site per job.

    Attributes:
        job: the job's id.
        site: the site's name, `SERVER` or `FEDERATION`.
    """

    job: str
    site: str


class JobInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job, as the receiver and its backends know it.

    Attributes:
        id: the identity of the job. Two jobs never share it.
        name: what a person calls the job. Two jobs may share it. Left out, it is the id.
        notes: a description in Markdown; may be empty.
        tags: labels that every run of the job gets.

    Raises:
        ConfigError: id, name or a tag is not a text that `trackhub.records.key_problem` accepts, or the notes are too
            long or cannot be stored.
    """

    id: str
    name: str = ""
    notes: str = ""
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            msgspec.structs.force_setattr(self, "name", self.id)
        for what, text in (("id", self.id), ("name", self.name), *(("tags", tag) for tag in self.tags)):
            if not isinstance(text, str):
                raise ConfigError(f"job: {what}: expected a text, got {text!r}")
            if problem := key_problem(text):
                raise ConfigError(f"job: {what}: {text[:80]!r} {problem}")
        _check_notes(self.notes)

    @property
    def unique_name(self) -> str:
        """The name and, where it differs, the id. It is readable, and tells jobs of one name apart.

        If the id is a UUID, as FLARE's are, only its first eight digits are shown.
        """
        if self.name == self.id:
            return self.id
        return f"{self.name}-{self.id[:8] if _UUID.fullmatch(self.id) else self.id}"


def _check_notes(notes: str) -> None:
    if not isinstance(notes, str):
        raise ConfigError(f"job: notes: expected a text, got {notes!r}")
    if len(notes) > _MAX_NOTES_CHARS:
        raise ConfigError(f"job: notes: {len(notes)} characters; expected at most {_MAX_NOTES_CHARS}")
    if found := _NOT_IN_NOTES.search(notes):
        raise ConfigError(
            f"job: notes: there is a U+{ord(found[0]):04X}; expected no lone surrogates, and no control characters but "
            "line feeds and tabs"
        )


class RunInfo(msgspec.Struct, frozen=True):
    """What a backend is told when it opens a run.

    Attributes:
        job: the job that the run belongs to.
        site: the site whose records the run holds, `SERVER` or `FEDERATION`.
        side: where the receiver is. When both sides may write to one store, they need different runs: use ``run_id``.
        created: unix seconds (UTC) of the run's first record.
        resume_from: position of the first record that the lane will hand over. It is 0 for a new run. After a restart
            and in a replay, it is more, unless the run is rebuilt (``Redelivery.REBUILD``). The run may then hold later
            records, which were written but not confirmed.
        blob_dir: the folder with the bytes of images and artifacts, one file per blob name.
        parent: the run that this run is shown under, where a backend can show that: the job's federation run. None for
            the federation run itself.
    """

    job: JobInfo
    site: str
    side: Side
    created: float
    resume_from: int
    blob_dir: Path
    parent: RunKey | None = None

    @property
    def key(self) -> RunKey:
        """The run's identity: the job's id and the site."""
        return RunKey(self.job.id, self.site)

    @property
    def run_id(self) -> str:
        """32 hex digits. Every run has its own, and it never changes."""
        return hashlib.sha256("\0".join((*self.key, self.side)).encode()).hexdigest()[:32]

    @property
    def display_name(self) -> str:
        """What a person reads as the run's name: the job's name and the site."""
        return f"{self.job.name}/{self.site}"

    def blob_path(self, blob: Blob) -> Path:
        """Return the file that holds this blob's bytes. The file is complete. Do not change it.

        Raises:
            PermanentError: there is a symbolic link in its place. In a journal's folder from somebody else, such a link
                could lead to any file of this machine.
        """
        path = self.blob_dir / blob.name
        if path.is_symlink() or path.parent.is_symlink():
            raise PermanentError(f"{path} is a symbolic link; expected a file. It is not followed")
        return path


def site_problem(site: str) -> str | None:
    """Return why no site can have this name, as the end of a sentence that begins with the name. None if one can."""
    return "is the name of the federation run" if site == FEDERATION else key_problem(site)


def path_component(name: str) -> str:
    """Return a name, such as a site's, as one part of a path. Different names give different parts.

    ASCII letters, digits and ``-._~=`` stay. Other characters become ``%XX``, as in URLs, so the result contains no
    separator. A leading dot is escaped, too, so no name means the folder above or a hidden file. A result that would
    have more than 150 characters is shortened and ends in a hash of the whole name. On a
    file system that ignores upper and lower case, two names may still be one file.
    """
    component = quote(name, safe="=") or "%"
    if component.startswith("."):
        component = "%2E" + component[1:]
    if len(component) > _MAX_COMPONENT_CHARS:
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        component = component[: _MAX_COMPONENT_CHARS - len(digest) - 2] + "%~" + digest
    return component
