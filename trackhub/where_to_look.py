# SPDX-License-Identifier: Apache-2.0
"""Says how a person looks at a run: its page, its files, and the commands that open it.

A backend returns it, the delivery report stores it, and the command line shows it. `trackhub.spi` exports it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import msgspec

from trackhub.runnable_commands import runnable

__all__ = ["Results"]


class Results(msgspec.Struct, frozen=True):
    """How a person looks at a run. Paths are relative to the job's run folder, so that the folder may be moved.

    Attributes:
        url: the page that shows it. If there is a command as well, the page exists while the command runs.
        path: the file or folder that holds it, relative to the run folder; absolute where it lies outside.
        command: the shell command that opens it, to be run in the run folder. If there are several, each is a line.
    """

    url: str | None = None
    path: str | None = None
    command: str | None = None

    def resolved(self, run_folder: Path) -> Results:
        """Return a copy for this place of the run folder. Its command works in any folder and shell of this user."""
        path = None if self.path is None else str(run_folder.absolute() / self.path)
        go_there = f"cd {shlex.quote(str(run_folder.absolute()))} && "
        lines = None if self.command is None else [go_there + runnable(line) for line in self.command.split("\n")]
        return Results(self.url, path, None if lines is None else "\n".join(lines))

    def openings(self) -> list[str]:
        """Return what to show a person: the commands, then the page. Without both, return the path, if there is one."""
        commands = self.command.split("\n") if self.command else []
        shown = self.url or (None if commands else self.path)
        return [*commands, shown] if shown else commands
