# SPDX-License-Identifier: Apache-2.0
"""Makes a printed shell command run even if nobody has activated the environment of this Python.

The results of a run and the delivery report call it for each command that they show.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["command_for", "runnable"]


def runnable(command: str) -> str:
    """Return the command with the full path of its program, if PATH lacks it and this Python's environment has it.

    A ``cd FOLDER && `` may come before the program. Without the path, the shell of a person who never activated the
    environment, as after ``make demo``, would say "command not found".
    """
    before, then, last = command.rpartition(" && ")
    program, space, arguments = last.partition(" ")
    beside = Path(sys.executable).with_name(program)
    if shutil.which(program) or not os.access(beside, os.X_OK):
        return command
    return before + then + shlex.quote(str(beside)) + space + arguments


def command_for(command: str, path: Path | str) -> str:
    """Return a command with a path after it, quoted where a shell needs it, such as ``trackhub replay 'my runs'``."""
    return f"{command} {shlex.quote(str(path))}"
