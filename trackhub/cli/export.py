# SPDX-License-Identifier: Apache-2.0
"""``trackhub export``: write the metrics, params, tags and final values of jobs into CSV, JSON-lines or Parquet files.

`trackhub.query.export` does the work.
"""

from __future__ import annotations

from pathlib import Path

import click

from trackhub.cli.output import print_error, print_json, print_lines
from trackhub.query.export import export as export_jobs

__all__ = ["export"]

JSON_VERSION = 1
"""Version of the JSON document. New keys do not raise it. No key is removed, and none changes its meaning."""


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--to", required=True, type=click.Path(path_type=Path), help="FILE.csv, FILE.jsonl or FILE.parquet.")
@click.option("--json", "as_json", is_flag=True, help="Say in JSON what was written; its keys are stable.")
def export(path: Path, to: Path, as_json: bool) -> None:
    """Write what jobs logged into files, one value a row.

    PATH is a journal, a job's run folder, a folder of jobs, or a job downloaded from FLARE.

    The file has the metrics, with the columns job, name, site, round, step, key, value and time. Files beside it,
    FILE.params.csv, FILE.tags.csv and FILE.summary.csv, have the last value of each param, tag and final value. time
    is unix seconds (UTC). In a script, trackhub.load(PATH) gives the same as a pandas table.

    Example: trackhub export runs --to all.parquet

    The JSON document is {"version": 1, "files": [{"path", "rows"}, ...], "problems": [...]}.

    A running or damaged job gives what can be read, and the lines on stderr say what is missing. The exit status is 1
    only if nothing can be read or written.
    """
    found = export_jobs(path, to)
    for problem in found.problems:
        print_error(problem)
    if as_json:
        files = [{"path": str(file), "rows": rows} for file, rows in found.rows.items()]
        print_json({"version": JSON_VERSION, "files": files, "problems": found.problems})
    else:
        print_lines(*(f"{file}: {rows:,} rows" for file, rows in found.rows.items()))
