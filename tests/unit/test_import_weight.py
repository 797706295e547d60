# SPDX-License-Identifier: Apache-2.0
"""Training code that imports trackhub pays for msgspec and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import trackhub
from trackhub import writer

IMPORTS = """
import json, sys
import msgspec
before = set(sys.modules)
import trackhub
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([sorted(new - set(sys.stdlib_module_names)), sorted({"sqlite3", "asyncio", "multiprocessing"} & new)]))
"""


def test_importing_trackhub_loads_msgspec_and_nothing_heavier() -> None:
    root = str(Path(trackhub.__file__).parents[1])
    code = f"import sys; sys.path[:] = {[root, *sys.path]!r}\n{IMPORTS}"

    # -I and -S: neither PYTHONPATH nor the environment's .pth files, which import what they like.
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert json.loads(done.stdout) == [["trackhub"], []]


@pytest.mark.parametrize("module", [trackhub, writer], ids=lambda module: module.__name__)
def test_public_names_are_those_in_all_and_sorted(module: ModuleType) -> None:
    names = [name for name in module.__all__ if name != "__version__"]

    assert names == sorted(names)
    assert all(hasattr(module, name) for name in module.__all__)
    assert set(names) <= set(dir(module))
