# SPDX-License-Identifier: Apache-2.0
"""``trackhub report``: one self-contained HTML page of a job or several.

`trackhub.page.render` makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from trackhub.cli.output import print_error, print_lines

__all__ = ["report"]


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The file to write. What is there is replaced.",
)
def report(paths: Sequence[Path], output: Path) -> None:
    """Make a page that shows what jobs logged, for a browser without a network.

    PATH is a journal, a job's run folder, a folder of jobs, or a job downloaded from FLARE.

    The page has the curves of the federation and of each metric with all sites, and final values and params by site.
    Images, tables, histograms and the delivery follow. Several jobs stand side by side, with the params that differ.

    \b
    Examples:
      trackhub report runs -o report.html
      trackhub report runs/lr-0.1 runs/lr-0.2     # these two side by side

    A running or damaged job gives what can be read. The page, and the lines on stderr, say what is missing. The page
    also says what `trackhub status` calls wrong. The exit status is 1 only if nothing can be read or written.
    """
    from trackhub.page.render import write_report  # here, since it loads numpy

    for problem in write_report(paths, output):
        print_error(problem)
    print_lines(f"Open {output.absolute()} in a browser")
