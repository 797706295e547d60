# SPDX-License-Identifier: Apache-2.0
"""The commands, put together. Each is a function in a module of its own."""

from __future__ import annotations

import sys

import typer

from trackhub.cli.backends import backends
from trackhub.cli.check import check
from trackhub.cli.new_backend import new_backend
from trackhub.cli.output import print_error
from trackhub.cli.replay import replay
from trackhub.cli.status import status
from trackhub.errors import TrackhubError

__all__ = ["app", "run"]

app = typer.Typer(
    name="trackhub",
    help="Look at what trackhub has installed and at what it delivered.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show local variables, and those may hold secrets
)
app.command()(backends)
app.command()(check)
app.command()(new_backend)
app.command()(status)
app.command()(replay)


@app.callback()
def _commands() -> None:
    """Keep subcommands required, however many there are."""


def run() -> None:
    """Run the command in ``sys.argv`` and exit; an error of trackhub's own is one line and exit status 1."""
    try:
        app()
    except TrackhubError as error:
        print_error(str(error))
        sys.exit(1)
