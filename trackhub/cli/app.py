# SPDX-License-Identifier: Apache-2.0
"""The commands, put together. Each is a function in a module of its own, which has the command's name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import typer

from trackhub.cli.output import print_error
from trackhub.errors import TrackhubError

__all__ = ["COMMANDS", "make_app", "run"]

COMMANDS = ("backends", "check", "new-backend", "status", "replay")


def make_app(arguments: Sequence[str]) -> typer.Typer:
    """Return the command line's application.

    Where the first argument is a command, it has this one alone: the libraries of all of them take half a second.
    """
    app = typer.Typer(
        name="trackhub",
        help="Look at what trackhub has installed and at what it delivered.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # its tracebacks show local variables, and those may hold secrets
    )
    for command in [name for name in arguments[:1] if name in COMMANDS] or COMMANDS:
        name = command.replace("-", "_")
        app.command(command)(getattr(importlib.import_module(f"trackhub.cli.{name}"), name))
    app.callback()(_commands)
    return app


def _commands() -> None:
    """Keep subcommands required, however many there are."""


def run() -> None:
    """Run the command in ``sys.argv`` and exit; an error of trackhub's own is one line and exit status 1."""
    try:
        make_app(sys.argv[1:])()
    except TrackhubError as error:
        print_error(str(error))
        sys.exit(1)
