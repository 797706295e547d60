# SPDX-License-Identifier: Apache-2.0
"""Python runs this file when a process of a test's FLARE job starts. It mends two races of FLARE's simulator.

`tests.integration.harness.flare_environment` puts this folder into ``PYTHONPATH``. In both races a job of FLARE 2.9
waits for a site for ever, about one job in a hundred on a busy machine:

- The simulator tells its client processes their names in one dict that all its threads share
  (``SimulatorClientRunner.do_one_task``). If two clients start in the same moment, both get one name. With the mend
  each thread has a copy of its own.
- The simulator asks the system for a free port, and a client's process opens it seconds later. Meanwhile the system
  may give it to another process. With the mend the port is one that the system gives to nobody.

Where a job replaces this file by one of its own, the races stay.
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


def _open_ports(number: int) -> list[int]:
    """Replaces ``get_open_ports``: return free ports below those that systems give by themselves."""
    import random
    import socket

    ports: set[int] = set()
    while len(ports) < number:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as trial:
            try:
                trial.bind(("", port))
            except OSError:  # in use
                continue
        ports.add(port)
    return list(ports)


def mend(module: ModuleType) -> None:
    """Change FLARE's module once it is loaded."""
    module.SimulatorClientRunner.build_ctx = _PerThread()
    module.__dict__["get_open_ports"] = _open_ports


def _watch() -> None:
    """Wait for FLARE's module, which takes seconds to import, in whichever process imports it."""
    names: dict[str, Any] = {}
    root = os.path.abspath(__file__)
    for _ in range(4):
        root = os.path.dirname(root)
    with open(os.path.join(root, "trackhub", "flare", "trainer", "import_hook.py")) as file:
        exec(compile(file.read(), file.name, "exec"), names)
    modules = ("nvflare.private.fed.app.simulator.simulator_runner",)
    sys.meta_path.insert(0, names["ImportHook"](modules, mend, sys.meta_path))


if __name__ == "sitecustomize":
    _watch()
