# SPDX-License-Identifier: Apache-2.0
"""What people read of a FLARE job in every backend: its name, notes and tags.

Both widgets take them as arguments and make the same `JobInfo` of them, on the server and at every site. A name that
the job does not give comes from FLARE, through `trackhub.flare.flare_internals`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nvflare.apis.fl_context import FLContext

from trackhub.delivery import JobInfo, SpoolInfo
from trackhub.errors import ConfigError
from trackhub.flare import flare_internals
from trackhub.policy import SiteRules
from trackhub.records import key_problem

__all__ = ["JobLabels", "job_info", "spool_info"]


class JobLabels(NamedTuple):
    """What the author of a job says of it.

    Attributes:
        name: what a person calls the job; empty for the name that FLARE knows.
        notes: a description of the job, in Markdown.
        tags: labels for every run of the job.
    """

    name: str = ""
    notes: str = ""
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, labels: Mapping[str, Any] | None) -> JobLabels:
        """Check the labels as they are in a job's configuration, and return them.

        Args:
            labels: any of ``name``, ``notes`` and ``tags``. None gives none of them.

        Raises:
            ConfigError: one of them is not a usable text. The message says which, and why.
        """
        if labels is not None and not isinstance(labels, Mapping):
            raise ConfigError(f"tracking: job: expected {{'name': ..., 'notes': ..., 'tags': [...]}}, got {labels!r}")
        given = {label: value for label, value in (labels or {}).items() if value is not None}
        if unknown := given.keys() - set(cls._fields):
            raise ConfigError(f"tracking: job: {sorted(unknown)[0]!r} is not one of {', '.join(cls._fields)}")
        name, notes, tags = given.get("name", ""), given.get("notes", ""), given.get("tags", ())
        if name != "":
            _check_text("name", name)
        if not isinstance(notes, str):
            raise ConfigError(f"tracking: notes: expected a text, got {notes!r}")
        if isinstance(tags, str) or not isinstance(tags, Sequence):
            raise ConfigError(f"tracking: tags: expected a list of texts, got {tags!r}")
        for i, tag in enumerate(tags):
            _check_text(f"tags[{i}]", tag)
        return cls(name, notes, tuple(tags))


def job_info(fl_ctx: FLContext, labels: Mapping[str, Any] | None) -> JobInfo:
    """Return the job that this process belongs to.

    Args:
        fl_ctx: FLARE's context.
        labels: as `JobLabels.of` takes them.

    Raises:
        ConfigError: as `JobLabels.of` says.
    """
    name, notes, tags = JobLabels.of(labels)
    shown = name or flare_internals.job_name(fl_ctx)
    # FLARE takes any text as a job's name. One that cannot be stored must not stop the job.
    return JobInfo(flare_internals.job_id(fl_ctx), "" if key_problem(shown) else shown, notes, tags)


def spool_info(job: JobInfo, site: str, cursors: Sequence[str], max_bytes: int, rules: SiteRules) -> SpoolInfo:
    """Return the description that a spool of this job holds.

    Args:
        job: the job.
        site: the site that logs into the spool.
        cursors: the names of its readers.
        max_bytes: the most bytes of all its files together.
        rules: what may leave the site.
    """
    return SpoolInfo(
        site,
        job.id,
        tuple(cursors),
        max_bytes,
        name=job.name,
        notes=job.notes,
        tags=job.tags,
        policy=rules.plain(),
    )


def _check_text(where: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"tracking: {where}: expected a text that is not empty, got {value!r}")
    if problem := key_problem(value):
        raise ConfigError(f"tracking: {where}: {value!r} {problem}")
