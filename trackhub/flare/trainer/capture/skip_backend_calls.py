# SPDX-License-Identifier: Apache-2.0
"""Excludes the threads and programs that a backend starts from the capture. `Capture` calls it once.

What they log with an SDK comes from the spool. If it were captured, the same records would enter the spool over and
over.
"""

from __future__ import annotations

import functools
import os
import subprocess
import threading
from typing import Any

from trackhub.flare.trainer.capture.wrap_sdk_functions import Replacements
from trackhub.mark_own_threads import is_own_thread, mark_as_own

__all__ = ["keep_out_children"]


def keep_out_children(variable: str, replaced: Replacements) -> None:
    """Mark threads that trackhub's own threads start. Programs that such threads start do not get the variable.

    Args:
        variable: the environment variable that announces the capture.
        replaced: puts the wrappers into Python's modules.
    """
    start, run = threading.Thread.start, subprocess.Popen.__init__

    @functools.wraps(start)
    def start_thread(self: threading.Thread) -> None:
        if is_own_thread():
            mark_as_own(self)
        start(self)

    @functools.wraps(run)
    def run_program(self: Any, *args: Any, **kwargs: Any) -> None:
        # ``env`` is the eleventh argument, which nobody gives by position.
        if is_own_thread() and len(args) <= 10:
            env = os.environ if kwargs.get("env") is None else kwargs["env"]
            kwargs["env"] = {name: value for name, value in env.items() if name != variable}
        run(self, *args, **kwargs)

    replaced.replace(threading.Thread, "start", start_thread)
    replaced.replace(subprocess.Popen, "__init__", run_program)
