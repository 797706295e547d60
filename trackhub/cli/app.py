# SPDX-License-Identifier: Apache-2.0
"""Finds the command that was called, and runs it. Each command is a function in a module of the same name.

`trackhub.cli.main` calls it, once it knows that the libraries for commands are installed.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import Any

import click

from trackhub.cli.output import print_error
from trackhub.errors import TrackhubError
from trackhub.printable import printable

__all__ = ["run"]

_COMMANDS = ("backends", "attach", "check", "new-backend", "status", "watch", "report", "export", "replay", "prune")
_INTERRUPTED = 130  # 128 plus the number of SIGINT, as shells do it


class _Commands(click.Group):
    """Imports a command when it is called or its help is shown, since the libraries of all commands load slowly."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # click would exit with 1, which for `replay` means that records are left.
            print_error("interrupted")
            ctx.exit(_INTERRUPTED)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"There is no command {printable(args[0])!r}.{meant} There are: {', '.join(_COMMANDS)}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"trackhub.cli.{name}"), name)
        return command


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="The exit status is 0 if all is well, 1 if something is wrong or left over, 2 for a wrong command, and 130 "
    "if you interrupt it. A command says in its own help what else it means.",
)
@click.version_option(package_name="flare-trackhub", prog_name="trackhub", message="%(prog)s %(version)s")
def _trackhub() -> None:
    """See which backends are installed and what became of a job's records, and deliver what is left.

    \b
    Examples:
      trackhub backends                     # what is installed
      trackhub status runs/                 # what became of all jobs below this folder
      trackhub replay runs/my-job           # deliver what is left of one
    """


def run() -> None:
    """Run the command in ``sys.argv`` and exit. An error of trackhub's own is one line on stderr, with status 1."""
    try:
        _trackhub(prog_name="trackhub")
    except TrackhubError as error:
        print_error(str(error))
        sys.exit(1)
