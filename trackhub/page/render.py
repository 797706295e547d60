# SPDX-License-Identifier: Apache-2.0
"""Makes the report page of jobs: one HTML file that needs no network and no other file.

``trackhub report`` calls `write_report`. Whatever a site logged is data on the page: jinja2 escapes it, and so does
`markdown_as_html` where it is Markdown. The page's policy (CSP) lets the browser run only the page's own two scripts.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import trackhub
from trackhub.errors import ConfigError
from trackhub.job_and_run_info import FEDERATION
from trackhub.page import table_and_media_values
from trackhub.page.chart_values import band_charts, groups, histogram_charts, metric_charts, own_metric_charts
from trackhub.page.collect import RunData, collect
from trackhub.page.downsample import keep_extremes
from trackhub.page.numbers import duration, moment, number, size
from trackhub.query import StoredJob, read_jobs

__all__ = ["MAX_JOBS", "write_report"]

MAX_JOBS = 12
"""Most jobs that one page draws: the newest."""

_MAX_POINTS = 2000
_ALL_POINTS = 240_000
_MIN_POINTS = 20
_KEY_PARTS = re.compile(r"(?<=[/_.:])(?=.)")
_HERE = Path(__file__).parent


def write_report(path: str | Path | Sequence[str | Path], to: str | Path) -> list[str]:
    """Write the report page of the jobs at or under one or more paths. An existing file is replaced.

    Args:
        path: as for `trackhub.load`; or a list of such paths.
        to: the HTML file.

    Returns:
        Why records may be missing on the page, as sentences. The page shows them, too.

    Raises:
        ConfigError: there is no journal, the file cannot be written, or the extra ``report`` is not installed.
        JournalError: the journal cannot be read.
    """
    try:
        import jinja2
        import markdown_it  # noqa: F401
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"the report needs {e.name}; install it: pip install 'flare-trackhub[report]' "
            "(in a clone: pip install -e '.[report]')"
        ) from e
    target = Path(to)
    partial = target.with_name(f".{target.name}.part")
    paths = [path] if isinstance(path, str | Path) else path
    with read_jobs(*paths) as found:
        numbered = dict(enumerate(found[-MAX_JOBS:]))
        runs = sorted(collect(numbered, _MAX_POINTS), key=lambda run: (run.job, _natural(run.site)))
        context = _context(numbered, runs)
        left_out = _left_out(len(found), runs, context["media"]["images_left_out"])
        context["problems"] = left_out + found.problems()  # in this order, since many sites may have many problems
    scripts = [get_plotlyjs(), (_HERE / "report.js").read_text(encoding="utf-8")]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(number=number, duration=duration, moment=moment, size=size)
    environment.filters["json"] = _script_json
    environment.filters["breakable"] = _breakable
    page = environment.get_template("report.html").stream(
        **context,
        css=(_HERE / "report.css").read_text(encoding="utf-8"),
        scripts=[script.replace("</script", "<\\/script") for script in scripts],
        policy=_policy(scripts),
        version=trackhub.__version__,
        now=time.time(),
    )
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(page)
        os.replace(partial, target)
    except OSError as e:
        raise ConfigError(
            f"cannot write {target}: {e.strerror or e}; name a file in a folder that you can write to"
        ) from e
    finally:
        with contextlib.suppress(OSError):  # on a read-only disk it would hide the error that says so
            partial.unlink(missing_ok=True)
    return list(context["problems"])


def _context(jobs: dict[int, StoredJob], runs: list[RunData]) -> dict[str, Any]:
    names = _names(list(jobs.values()))
    began = {job: min(run.began for run in runs if run.job == job) for job in {run.job for run in runs}}
    charts = {
        "bands": band_charts(runs, names),
        "federation": own_metric_charts(runs, began),
        "metrics": metric_charts(runs, began),
        "histograms": histogram_charts(runs),
    }
    _thin(charts["metrics"] + charts["federation"])
    every = [chart for found in charts.values() for chart in found]
    for place, chart in enumerate(every):
        chart["place"] = place
    sites = sorted({run.site for run in runs} - {FEDERATION}, key=_natural)
    return {
        "jobs": table_and_media_values.job_rows(list(jobs.values()), names, runs),
        "names": names,
        "sites": sites,
        "charts": charts,
        "groups": groups(charts["metrics"]),
        "data": {"jobs": names, "sites": sites, "charts": every},
        "rounds": [
            (names[job], found)
            for job in jobs
            if (found := table_and_media_values.rounds_of([r for r in runs if r.job == job]))
        ],
        "finals": table_and_media_values.final_values(runs),
        "labels": [table_and_media_values.label_of(run, names) for run in runs if run.site != FEDERATION],
        "params": table_and_media_values.settings(runs, names, "params", captured=False),
        "tags": table_and_media_values.settings(runs, names, "tags", captured=False),
        "captured": table_and_media_values.settings(runs, names, "params", captured=True),
        "summary": table_and_media_values.settings(runs, names, "summary"),
        "media": table_and_media_values.media(jobs, runs, names),
        "delivery": table_and_media_values.deliveries(list(jobs.values()), names),
    }


def _names(jobs: Sequence[StoredJob]) -> list[str]:
    """Return what the page calls each job: its name, and also its id if several jobs have that name."""
    names = [job.name for job in jobs]
    return [f"{job.name} ({job.id})" if names.count(job.name) > 1 else job.name for job in jobs]


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts site-10 after site-9."""
    parts, digits = [], ""
    for character in [*name, ""]:
        if character.isdecimal() and character.isascii():
            digits += character
            continue
        if digits:
            parts.append((int(digits[:18]), ""))
            digits = ""
        parts.append((-1, character))
    return parts


def _thin(charts: Sequence[dict[str, Any]]) -> None:
    """Give each line fewer points if the page has many lines, so that the page opens quickly."""
    lines = [line for chart in charts for line in chart["lines"]]
    most = max(_MIN_POINTS, min(_MAX_POINTS, _ALL_POINTS // max(1, len(lines))))
    for line in lines:
        for values, others in (("y", ("x", "t")), ("ry", ("r",))):
            if len(line[values]) > most:
                # None stands for a value that is not finite.
                kept = keep_extremes(np.array([0.0 if v is None else v for v in line[values]]), most)
                for name in (values, *others):
                    line[name] = [line[name][i] for i in kept]


def _left_out(jobs: int, runs: Sequence[RunData], images: int) -> list[str]:
    found = []
    if jobs > MAX_JOBS:
        found.append(f"{jobs} jobs were found. The page shows the newest {MAX_JOBS}; give the path of others.")
    if keys := sum(run.left_out for run in runs):
        found.append(f"{keys:,} values are not shown, since there are too many keys; `trackhub export` has them.")
    if images:
        found.append(
            f"{images:,} images are not shown: too many, too large, missing, unreadable, or neither PNG nor JPEG."
        )
    return found


def _breakable(key: str) -> Any:
    """Return a key, escaped, that a browser breaks into lines after a part of it and not within a word."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in _KEY_PARTS.split(key))


def _script_json(value: Any) -> Any:
    """Return JSON for a script element. No text in it can end the element."""
    from markupsafe import Markup

    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _policy(scripts: Sequence[str]) -> str:
    """Return the page's content security policy: these scripts run, no others, and nothing is loaded from anywhere."""
    texts = [script.replace("</script", "<\\/script") for script in scripts]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
