# SPDX-License-Identifier: Apache-2.0
"""Makes a shell command run as it is printed, also where nobody has activated the environment of this Python.

What shows a person a command calls it: the results of a run, and the delivery report.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

__all__ = ["runnable"]


def runnable(command: str) -> str:
    """Return the command with the full path of its program, if PATH lacks it and this Python's environment has it.

    It may follow a ``cd FOLDER && ``. Whoever never activated the environment, as after ``make demo``, would read
    "command not found" otherwise.
    """
    before, then, last = command.rpartition(" && ")
    program, space, arguments = last.partition(" ")
    beside = Path(sys.executable).with_name(program)
    if shutil.which(program) or not os.access(beside, os.X_OK):
        return command
    return before + then + shlex.quote(str(beside)) + space + arguments
