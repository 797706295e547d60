# SPDX-License-Identifier: Apache-2.0
"""``trackhub backends`` lists what is installed, whatever state it is in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trackhub.spi import SPI_VERSION

if TYPE_CHECKING:
    from tests.conftest import MakePlugin

GOOD = """
    from trackhub.spi import Backend, BackendRun, RunInfo
    print("a plugin that talks")

    class Acme(Backend):
        def open_run(self, info: RunInfo) -> BackendRun:
            raise NotImplementedError
"""


def trackhub(*args: str, path: list[Path] | None = None, prelude: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{prelude}\nimport sys; from trackhub.cli import main\nsys.argv = ['trackhub', *{list(args)!r}]\nmain()"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path or [])), "COLUMNS": "100"}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)


def listed(document: str) -> dict[str, dict[str, Any]]:
    return {backend["name"]: backend for backend in json.loads(document)["backends"]}


def test_a_working_backend_is_listed_with_its_capabilities() -> None:
    done = trackhub("backends", "--json")

    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert (document["version"], document["spi"]) == (1, SPI_VERSION)
    jsonl = listed(done.stdout)["jsonl"]
    assert (jsonl["distribution"], jsonl["state"], jsonl["problem"]) == ("flare-trackhub", "ok", "")
    assert "metrics" in jsonl["capabilities"]["kinds"]


def test_broken_and_conflicting_backends_are_listed_with_the_reason_and_fail_nothing(make_plugin: MakePlugin) -> None:
    path = [
        make_plugin("acme-good", {"good": "acme_good:Acme"}, {"acme_good": GOOD}),
        make_plugin("acme-broken", {"bad": "acme_bad:Acme"}, {"acme_bad": "import module_that_is_not_there"}),
        make_plugin("acme-one", {"twice": "acme_good:Acme"}),
        make_plugin("acme-two", {"twice": "acme_good:Acme"}),
    ]

    as_json = trackhub("backends", "--json", path=path)
    as_table = trackhub("backends", path=path)

    assert (as_json.returncode, as_table.returncode) == (0, 0)
    found = listed(as_json.stdout)
    assert (found["good"]["state"], found["bad"]["state"], found["twice"]["state"]) == ("ok", "broken", "conflict")
    assert "No module named 'module_that_is_not_there'" in found["bad"]["problem"]
    assert found["bad"]["capabilities"] is None
    for part in ("acme-broken", "broken", "module_that_is_not_there", "acme-one 1.0", "acme-two 1.0"):
        assert part in as_table.stdout


def test_listing_imports_no_tracking_sdk_and_no_flare() -> None:
    code = (
        "import contextlib, io, json, sys; from trackhub.cli import main\n"
        "sys.argv = ['trackhub', 'backends', '--json']\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n    main()\n"
        "heavy = ('tensorboard', 'wandb', 'mlflow', 'mlflow_skinny', 'nvflare', 'torch', 'numpy', 'sqlalchemy')\n"
        "names = [backend['name'] for backend in json.loads(out.getvalue())['backends']]\n"
        "print(json.dumps([names, [name for name in heavy if name in sys.modules]]))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    names, heavy = json.loads(done.stdout)
    assert "jsonl" in names
    assert heavy == []


@pytest.mark.parametrize("library", ["click", "rich"])
def test_without_the_cli_extra_the_command_says_what_to_install(library: str) -> None:
    done = trackhub("backends", prelude=f"import sys; sys.modules[{library!r}] = None")

    assert done.returncode == 2
    assert done.stdout == ""
    assert f"needs {library}" in done.stderr
    assert "pip install 'flare-trackhub[cli]'" in done.stderr
