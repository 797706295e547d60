# SPDX-License-Identifier: Apache-2.0
"""What identifies a run, what a backend is told of it, and how it ends."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import msgspec

from trackhub.records import Blob

__all__ = ["FEDERATION", "SERVER", "RunInfo", "RunKey", "RunStatus", "Side", "path_component"]

_MAX_COMPONENT = 150

SERVER = "server"
"""The run of what the server itself logs."""

FEDERATION = "federation"
"""The run that holds statistics across sites."""


class Side(StrEnum):
    """Where the receiver is: on the FLARE server, at the client, or in a script's own process."""

    SERVER = "server"
    CLIENT = "client"
    LOCAL = "local"


class RunStatus(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    FAILED = "failed"
    """The site's training ended with an error, or the site fell silent."""
    ABORTED = "aborted"
    """Somebody stopped the job."""


class RunKey(NamedTuple):
    """One run per site per job; the job is the group."""

    job: str
    site: str


class RunInfo(msgspec.Struct, frozen=True):
    """What a backend is told when a run is opened.

    Attributes:
        key: job and site. Show the site as the run's name and the job as its group.
        side: where the receiver is. When both sides may write to one store, they need different runs: use ``run_id``.
        created: unix seconds (UTC) of the run's first record.
        resume_from: position of the first record that will be handed over. 0 for a new run; more when a receiver was
            restarted or a replay goes on, and then the run may hold records at and after it that were written before
            the crash, but not confirmed.
        blob_dir: where the bytes of images and artifacts lie, one file per blob name.
    """

    key: RunKey
    side: Side
    created: float
    resume_from: int
    blob_dir: Path

    @property
    def run_id(self) -> str:
        """32 hex digits that are the same whenever this run is opened, and differ for every other run."""
        return hashlib.sha256("\0".join((*self.key, self.side)).encode()).hexdigest()[:32]

    def blob_path(self, blob: Blob) -> Path:
        """Return the file that holds this blob's bytes. It is complete, and must not be changed."""
        return self.blob_dir / blob.name


def path_component(name: str) -> str:
    """Return a name, such as a site's, as one part of a path: another one for every name, and plain names unchanged.

    Letters A to Z, digits and ``-._~`` stay, other characters become ``%XX`` as in URLs, so the result has no
    separator. A leading dot is escaped, too: no name means the folder above or a hidden file. A name that would be
    longer than 150 characters is shortened and ends in a hash of the whole. File systems that fold upper and lower
    case may still take two names for one.
    """
    component = quote(name, safe="") or "%"
    if component.startswith("."):
        component = "%2E" + component[1:]
    if len(component) > _MAX_COMPONENT:
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        component = component[: _MAX_COMPONENT - len(digest) - 2] + "%~" + digest
    return component
