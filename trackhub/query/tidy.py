# SPDX-License-Identifier: Apache-2.0
"""Jobs as tables with one value a row: metrics, params, tags and final values.

`trackhub.load` makes them into a pandas or Arrow table, `trackhub.query.export` into files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from trackhub.errors import ConfigError
from trackhub.query.jobs import StoredJob, read_jobs
from trackhub.records import Kind

__all__ = [
    "COLUMNS",
    "NONFINITE",
    "TableName",
    "arrow_batches",
    "flat",
    "last_values",
    "load",
    "rows_of",
    "schema_of",
    "text_of",
]

TableName = Literal["metrics", "params", "tags", "summary"]
"""The tables of a job. ``summary`` has the final values that a script gave to ``summarize``."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "metrics": ("job", "name", "site", "round", "step", "key", "value", "time"),
    "params": ("job", "name", "site", "key", "value", "time"),
    "tags": ("job", "name", "site", "key", "value", "time"),
    "summary": ("job", "name", "site", "key", "value", "time"),
}
"""The columns of each table. ``job`` is the id, ``name`` what a person calls the job, ``time`` unix seconds (UTC)."""

_BATCH_ROWS = 65_536
_KIND_OF = {"params": Kind.PARAMS, "tags": Kind.TAGS, "summary": Kind.SUMMARY}


def rows_of(table: TableName, jobs: Iterable[StoredJob]) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table, by job, site and stream. Takes little memory for metrics.

    For params, tags and final values, only the last value of each key is given. A param or final value is None, a bool,
    an int, a float, a string or a list of these. A dict becomes keys such as ``optimizer/lr``.

    Args:
        table: ``metrics``, ``params``, ``tags`` or ``summary``.
        jobs: the jobs.

    Raises:
        JournalError: a journal cannot be read any more.
    """
    for job in jobs:
        for site in job.sites:
            if table == "metrics":
                yield from _metrics(job, site)
            else:
                for key, (value, time) in last_values(job, site, _KIND_OF[table]).items():
                    yield job.id, job.name, site, key, value, time


def _metrics(job: StoredJob, site: str) -> Iterator[tuple[Any, ...]]:
    job_id, name = job.id, job.name
    for _, _, record in job.records(site, (Kind.METRICS,)):
        time, step, round_ = record.time, record.step, record.round
        for key, value in record.payload.values.items():  # type: ignore[union-attr]
            yield job_id, name, site, round_, step, key, value, time


def last_values(job: StoredJob, site: str, kind: Kind) -> dict[str, tuple[Any, float]]:
    """Return the last value of each key of a site's params, tags or final values, with the time of its log call.

    Args:
        job: the job.
        site: the site's name.
        kind: ``Kind.PARAMS``, ``Kind.TAGS`` or ``Kind.SUMMARY``.
    """
    found: dict[str, tuple[Any, float]] = {}
    for _, _, record in job.records(site, (kind,)):
        for key, value in flat(record.payload.values):  # type: ignore[union-attr]
            if key not in found or record.time >= found[key][1]:  # of several streams, the later value counts
                found[key] = value, record.time
    return found


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value with its key. A dict in a dict gives keys such as ``optimizer/lr``."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def load(path: str | Path, table: TableName = "metrics", *, arrow: bool = False) -> Any:
    """Return the metrics, params, tags or final values of the jobs at or under a path, one value a row.

    Args:
        path, table, arrow: as for `trackhub.load`.

    Returns:
        The table, as `trackhub.load` describes it.

    Raises:
        ConfigError: there is no journal at or under the path, no such table, or the extra is not installed.
        JournalError: the journal cannot be read.
    """
    if table not in get_args(TableName):
        raise ConfigError(f"table: {table!r} is not one of {', '.join(get_args(TableName))}")
    try:
        import pyarrow as pa
    except ModuleNotFoundError as e:
        raise ConfigError(
            "this needs pyarrow and pandas; install them: pip install 'flare-trackhub[tables]' "
            "(in a clone: pip install -e '.[tables]')"
        ) from e
    schema = schema_of(table)
    with read_jobs(path) as jobs:
        batches = list(arrow_batches(table, jobs))
        problems = jobs.problems()
    metadata = {"trackhub.problems": msgspec.json.encode(problems)}
    found = pa.Table.from_batches(batches, schema=schema).replace_schema_metadata(metadata)
    if arrow:
        return found
    frame = found.to_pandas()
    frame.attrs["trackhub.problems"] = problems
    return frame


def schema_of(table: TableName) -> Any:
    """Return the Arrow schema of a table."""
    import pyarrow as pa

    types = {"round": pa.int64(), "step": pa.int64(), "time": pa.float64()}
    if table == "metrics":
        types["value"] = pa.float64()
    return pa.schema([(column, types.get(column, pa.string())) for column in COLUMNS[table]])


def arrow_batches(table: TableName, jobs: Iterable[StoredJob]) -> Iterator[Any]:
    """Yield a table as Arrow record batches. Params and final values are text: numbers and lists as JSON.

    Args:
        table: its name.
        jobs: the jobs.

    Raises:
        JournalError: a journal cannot be read any more.
    """
    import pyarrow as pa

    schema, rows = schema_of(table), rows_of(table, jobs)
    value = COLUMNS[table].index("value")
    while part := list(islice(rows, _BATCH_ROWS)):
        columns: list[Any] = [list(column) for column in zip(*part, strict=True)]
        if table in ("params", "summary"):
            columns[value] = [text_of(found) for found in columns[value]]
        yield pa.record_batch(columns, schema=schema)


def text_of(value: Any) -> str:
    """Return a param or final value as text: a string as it is, NaN and infinities by name, everything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return NONFINITE.get(repr(value), repr(value))
    return msgspec.json.encode(value).decode()


NONFINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
"""Python's name -> the name in files, for numbers that JSON lacks. The backend ``jsonl`` uses the same names."""
