# SPDX-License-Identifier: Apache-2.0
"""Writes the metrics of jobs into a CSV, JSON-lines or Parquet file, with params, tags and final values beside it.

``trackhub export`` calls it. `trackhub.query.tidy` gives the rows.
"""

from __future__ import annotations

import contextlib
import csv
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec

from trackhub.errors import ConfigError
from trackhub.query.jobs import StoredJob, read_jobs
from trackhub.query.tidy import COLUMNS, NONFINITE, TableName, arrow_batches, rows_of, schema_of, text_of

__all__ = ["Exported", "export"]


# How a formula begins in the spreadsheets that people use. The last four are = + - @ in their wide forms.
_FORMULA = re.compile("[=+@\t\r\n\uff1d\uff0b\uff0d\uff20-]")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|-Infinity", re.IGNORECASE)


class Exported(NamedTuple):
    """What an export wrote.

    Attributes:
        rows: how many rows each file has.
        problems: why records may be missing, as sentences.
    """

    rows: dict[Path, int]
    problems: list[str]


def export(path: str | Path, to: str | Path) -> Exported:
    """Write the jobs at or under a path into files. Each file is written completely or not at all.

    ``out.csv`` gets the metrics, ``out.params.csv`` the params, ``out.tags.csv`` the tags and ``out.summary.csv`` the
    final values. Existing files are replaced. Takes little memory. In CSV, an apostrophe stands before a text that a
    spreadsheet would take for a formula.

    Args:
        path: as for `trackhub.load`.
        to: the file for the metrics. Its ending, ``.csv``, ``.jsonl`` or ``.parquet``, says how to write it.

    Raises:
        ConfigError: there is no journal, the file's ending is another one, its folder cannot be written to, or pyarrow
            is not installed for Parquet.
        JournalError: the journal cannot be read.
    """
    target = Path(to)
    write = _WRITERS.get(target.suffix.lower())
    if write is None:
        raise ConfigError(f"--to: expected a file whose name ends in {', '.join(_WRITERS)}, got {target.name!r}")
    rows: dict[Path, int] = {}
    with read_jobs(path) as jobs:
        for table in get_args(TableName):
            file = target if table == "metrics" else target.with_suffix(f".{table}{target.suffix}")
            partial = file.with_name(f".{file.name}.part")
            try:
                rows[file] = write(partial, table, jobs)
                os.replace(partial, file)
            except OSError as e:
                raise ConfigError(
                    f"cannot write {file}: {e.strerror or e}; name a file in a folder that you can write to"
                ) from e
            finally:
                with contextlib.suppress(OSError):  # on a read-only disk it would hide the error that says so
                    partial.unlink(missing_ok=True)
        return Exported(rows, jobs.problems())


def _write_csv(file: Path, table: TableName, jobs: Iterable[StoredJob]) -> int:
    count = 0
    value = COLUMNS[table].index("value")
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS[table])
        for row in rows_of(table, jobs):
            writer.writerow(map(_inert, (*row[:value], text_of(row[value]), *row[value + 1 :])))
            count += 1
    return count


def _inert(cell: Any) -> Any:
    """Return a cell that no spreadsheet runs: an apostrophe is put before a text that could be a formula.

    Names of jobs and sites, keys and values come from sites. ``=HYPERLINK(...)`` could send the other cells away.
    """
    if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


def _write_jsonl(file: Path, table: TableName, jobs: Iterable[StoredJob]) -> int:
    count, names, encode = 0, COLUMNS[table], msgspec.json.encode
    with file.open("wb") as out:
        for row in rows_of(table, jobs):
            out.write(encode(_named(dict(zip(names, row, strict=True)))) + b"\n")
            count += 1
    return count


def _named(value: Any) -> Any:
    """Return the value with NaN and infinities as strings: in JSON they would be null."""
    if isinstance(value, float) and not math.isfinite(value):
        return NONFINITE[repr(value)]
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    return [_named(item) for item in value] if isinstance(value, list) else value


def _write_parquet(file: Path, table: TableName, jobs: Iterable[StoredJob]) -> int:
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as e:
        raise ConfigError(
            "Parquet needs pyarrow; install it: pip install 'flare-trackhub[tables]' "
            "(in a clone: pip install -e '.[tables]')"
        ) from e
    count = 0
    with pq.ParquetWriter(file, schema_of(table)) as writer:
        for batch in arrow_batches(table, jobs):
            writer.write_batch(batch)
            count += batch.num_rows
    return count


_WRITERS: dict[str, Callable[[Path, TableName, Iterable[StoredJob]], int]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
