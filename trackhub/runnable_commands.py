# SPDX-License-Identifier: Apache-2.0
"""Makes a printed shell command run even if nobody has activated the environment of this Python.

Whatever prints a command for a person to run calls it: results, reports, messages, commands, and scripts of jobs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["command_for", "runnable"]


def runnable(command: str) -> str:
    """Return the command with the full path of its program, if PATH does not lead to that of this Python's environment.

    A ``cd FOLDER && `` may come before the program. Without the path, the shell of a person who never activated the
    environment, as after ``make demo``, would say "command not found", or run the program of another environment.
    """
    before, then, last = command.rpartition(" && ")
    program, space, arguments = last.partition(" ")
    beside = Path(sys.executable).with_name(program)
    found = shutil.which(program)
    if not os.access(beside, os.X_OK) or (found is not None and os.path.samefile(found, beside)):
        return command
    return before + then + shlex.quote(str(beside)) + space + arguments


def command_for(command: str, argument: Path | str) -> str:
    """Return a `runnable` command with one more argument, quoted if need be, such as ``trackhub replay 'my runs'``."""
    return f"{runnable(command)} {shlex.quote(str(argument))}"
