# SPDX-License-Identifier: Apache-2.0
"""Experiment tracking for federated learning: log once, at the site; read it in any backend.

In the training script of a FLARE job to which ``trackhub.flare.recipe.add_tracking`` was applied::

    with trackhub.Writer() as writer:
        writer.log({"train/loss": loss}, step)

The same script runs without tracking, too: there, ``Writer()`` records nothing. To track a script outside FLARE::

    with trackhub.local(backends=["tensorboard"]) as writer:
        writer.log({"train/loss": loss}, step)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trackhub.errors import ConfigError, RecordError, TrackhubError
from trackhub.writer.writer import Writer

if TYPE_CHECKING:
    from trackhub.limits import Limits
    from trackhub.local_tracking import LocalWriter

__all__ = ["ConfigError", "RecordError", "TrackhubError", "Writer", "load", "local"]

__version__ = "0.1.0"


def local(
    backends: Mapping[str, Mapping[str, Any]] | Iterable[str],
    *,
    folder: str | Path = "runs",
    job: str | None = None,
    resume: bool = False,
    name: str = "",
    notes: str = "",
    tags: Iterable[str] = (),
    site: str = "local",
    limits: Limits | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> LocalWriter:
    """Return a writer that delivers to backends from this process, for scripts that run outside FLARE.

    Once the run is open at a backend, stderr says how to look at it. Close the writer, or use it as a context manager.
    ``close`` delivers everything, and says on stderr what was delivered and how to look at it.

    A writer that is still open when the script ends is closed then. The run ends as failed after an exception,
    ``sys.exit`` with another status than 0, SIGTERM or SIGHUP. Two ends are not seen without ``with``:
    ``raise SystemExit(1)`` and the built-in ``exit(1)`` end the run as finished, and after a ``sys.exit(1)`` that the
    script catches, the run ends as failed. If the process is killed, its records stay in the run's folder, and
    ``trackhub replay`` delivers them. The next run in ``folder`` warns of it.

    With the environment variable ``TRACKHUB_MODE=disabled``, nothing is recorded and no folder is made.

    Args:
        backends: names of installed backends, or names with their options.
        folder: where the run's folder is made. The name of the run's folder is the job's name and id.
        job: the job's id; by default the time and a few random characters. Two jobs never share it.
        resume: go on in the earlier run of this ``job`` in this ``folder``, if there is one. Give ``job`` as well, and
            the ``name`` of that run. If False, an earlier run is an error.
        name: what to call the job in every backend, such as ``lr-0.1``; by default the id.
        notes: a description of the job, in Markdown.
        tags: labels of the job.
        site: the site's name, the second half of the run's name.
        limits: sizes, pauses and waits, as in `trackhub.limits.Limits`.
        strict: raise for what cannot be stored, as for `Writer`.
        quiet: do not say on stderr how to look at the run, nor what was delivered.

    Raises:
        ConfigError: a backend or an option is unknown, or a backend cannot be used as configured. Or ``site`` cannot be
            a site's name, or ``tags`` is a single text. Or the run is there already and ``resume`` is not set, or it
            has another ``name`` or ``site``. Or ``resume`` is set without ``job``. Or ``TRACKHUB_MODE`` has an unknown
            value.
        PluginError: a backend's plugin cannot be used.
        DeliveryError: the folder cannot be used.
    """
    from trackhub.local_tracking import open_local  # lazy: a trainer in a FLARE job needs none of the delivery

    return open_local(
        backends,
        folder=folder,
        job=job,
        resume=resume,
        name=name,
        notes=notes,
        tags=tags,
        site=site,
        limits=limits,
        strict=strict,
        quiet=quiet,
    )


def load(
    path: str | Path, table: Literal["metrics", "params", "tags", "summary"] = "metrics", *, arrow: bool = False
) -> Any:
    """Return the metrics, params, tags or final values of the jobs at or under a path, one value a row.

    Needs the extra ``tables`` (pandas and pyarrow). Nothing on the disk is changed.

    Args:
        path: a journal (``trackhub.db``), a run folder, a folder of jobs, or a job downloaded from FLARE.
        table: ``metrics``: every value that was logged, with the columns job, name, site, round, step, key, value and
            time. ``params``, ``tags`` or ``summary``: the last value of each key, as text, with job, name, site, key,
            value and time. ``summary`` has what `Writer.summarize` was given. ``job`` is the job's id, ``name`` what a
            person calls it. ``time`` is unix seconds (UTC) of the log call. ``round`` and ``step`` may be missing.
        arrow: return a ``pyarrow.Table``, not a ``pandas.DataFrame``.

    Returns:
        The table, sorted by job, by site, and in the order of logging. ``DataFrame.attrs["trackhub.problems"]`` is a
        list of sentences, which say why records may be missing. In Arrow, the list is JSON in ``schema.metadata``.

    Raises:
        ConfigError: there is no journal at or under the path, no such table, or the extra is not installed.
        JournalError: the journal cannot be read.
    """
    from trackhub.query.tidy import load as load_table  # lazy, as above

    return load_table(path, table, arrow=arrow)
