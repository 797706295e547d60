# SPDX-License-Identifier: Apache-2.0
"""Python runs this file when a process of a test's FLARE job starts. It mends one race of FLARE's simulator.

`tests.integration.harness.flare_environment` puts this folder into ``PYTHONPATH``. FLARE 2.9's simulator tells its
client processes their names in one dict that all its threads share (``SimulatorClientRunner.do_one_task``). If two
clients start in the same moment, both get one name, and the job waits for the other site for ever. That is about one
job in a hundred on a busy machine. With the mend each thread has a copy of its own. Where a job replaces this file by
one of its own, the race stays.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any


class _PerThread:
    """Replaces ``SimulatorClientRunner.build_ctx``: each thread reads a copy of its own."""

    def __set__(self, runner: Any, value: dict[str, Any]) -> None:
        import threading

        runner.__dict__["build_ctx"] = value
        runner.__dict__["build_ctx_of_thread"] = threading.local()

    def __get__(self, runner: Any, owner: type | None = None) -> Any:
        own = runner.__dict__["build_ctx_of_thread"]
        if not hasattr(own, "build_ctx"):
            own.build_ctx = dict(runner.__dict__["build_ctx"])
        return own.build_ctx


def mend(module: ModuleType) -> None:
    """Change FLARE's module once it is loaded."""
    module.SimulatorClientRunner.build_ctx = _PerThread()


def _watch() -> None:
    """Wait for FLARE's module, which takes seconds to import, in whichever process imports it."""
    names: dict[str, Any] = {}
    root = os.path.abspath(__file__)
    for _ in range(4):
        root = os.path.dirname(root)
    with open(os.path.join(root, "trackhub", "flare", "trainer", "import_watch.py")) as file:
        exec(compile(file.read(), file.name, "exec"), names)
    modules = ("nvflare.private.fed.app.simulator.simulator_runner",)
    sys.meta_path.insert(0, names["ImportWatch"](modules, mend, sys.meta_path))


if __name__ == "sitecustomize":
    _watch()
