# SPDX-License-Identifier: Apache-2.0
"""The commands, put together. Each is a function in a module of its own, which has the command's name."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from trackhub.cli.output import print_error
from trackhub.errors import TrackhubError

__all__ = ["run"]

_COMMANDS = ("backends", "check", "new-backend", "status", "replay")
_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it


class _Commands(click.Group):
    """Imports a command when it is called, or its help is asked for: the libraries of all of them take a while."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # click's own status for it is 1, with which `replay` says that records are left.
            print_error("interrupted")
            ctx.exit(_INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"trackhub.cli.{name}"), name)
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def _trackhub() -> None:
    """Look at what trackhub has installed and at what it delivered."""


def run() -> None:
    """Run the command in ``sys.argv`` and exit; an error of trackhub's own is one line and exit status 1."""
    try:
        _trackhub(prog_name="trackhub")
    except TrackhubError as error:
        print_error(str(error))
        sys.exit(1)
