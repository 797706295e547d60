# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from backends.tensorboard.tests.conftest import JOB_FOLDER
from trackhub.spi import Entry, Image, Metrics, Params, RunStatus, Text

if TYPE_CHECKING:
    from backends.tensorboard.tests.conftest import Rig

Get = Callable[..., Any]


@contextmanager
def tensorboard(logdir: Path, *flags: str) -> Iterator[Get]:
    """Run the real server with these flags; yields a function that gets JSON from it."""
    options = [*flags, "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    command = [sys.executable, "-m", "tensorboard.main", *options, "--reload_interval", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            while not (found := re.search(r"http://127\.0\.0\.1:\d+/", said)):
                line = process.stderr.readline()
                assert line, f"the server ended: {said}"
                said += line

            def get(route: str, **query: str) -> Any:
                with urlopen(f"{found[0]}data/{route}?{urlencode(query)}", timeout=60) as reply:
                    return (
                        json.load(reply)
                        if reply.headers["Content-Type"].startswith("application/json")
                        else reply.read()
                    )

            yield get
        finally:
            process.terminate()


def test_the_real_server_shows_what_was_logged_across_a_crash(rig: Rig, entry: Callable[..., Entry]) -> None:
    image = b"\x89PNG\r\n\x1a\n" + bytes(100)
    for site in ("site-1", "site-2"):
        run = rig.open(site)
        run.write([entry(0, Params({"lr": 0.5})), entry(1, Text("note", "**hi**")), entry(2, Metrics({"loss": 2.0}))])
        with next(rig.folder(site=site).glob("*.trackhub")).open("ab") as file:
            file.write(b"torn")
        again = rig.open(site)
        blob = rig.blob(f"{site}-image", image)
        again.write([entry(3, Metrics({"loss": float("nan")})), entry(4, Image("i", blob, 2, 2))])
        again.finish(RunStatus.FINISHED)

    # The reload that precedes the first request is complete with this loader; the other one works in the background.
    with tensorboard(rig.workdir, "--load_fast=false") as get:
        runs = get("runs")
        scalars = get("plugin/scalars/scalars", run=f"{JOB_FOLDER}/site-2", tag="loss")
        texts = get("plugin/text/text", run=f"{JOB_FOLDER}/site-1", tag="note")
        ((shown,),) = [get("plugin/images/images", run=f"{JOB_FOLDER}/site-1", tag="i", sample="0")]
        content = get("plugin/images/individualImage?" + shown["query"])

    assert runs == [f"{JOB_FOLDER}/site-1", f"{JOB_FOLDER}/site-2"]
    assert scalars == [[1000.25, 2, 2.0], [1000.375, 3, "NaN"]]
    assert [(text["step"], text["text"]) for text in texts] == [(1, "<p><strong>hi</strong></p>")]
    assert (shown["step"], content) == (4, image)


@pytest.mark.long
@pytest.mark.parametrize("steps", [[0, 1, 2, 3], [0, 1, 2, 0, 1, 2], [0, 1, 1, 1], [5, 3, 4]], ids=str)
def test_the_printed_command_shows_every_point(rig: Rig, entry: Callable[..., Entry], steps: list[int]) -> None:
    """The fast loader works in the background, so this asks until all points are there."""
    rig.open("site-1").write([entry(i, Metrics({"loss": float(i)}), step) for i, step in enumerate(steps)])
    command = str(rig.backend.results(rig.info("site-1")).command).split()

    with tensorboard(rig.workdir, *command[1:-2]) as get:
        deadline = time.monotonic() + 30
        shown: list[Any] = []
        while len(shown) < len(steps) and time.monotonic() < deadline:
            with contextlib.suppress(HTTPError):  # the run is not loaded yet
                shown = get("plugin/scalars/scalars", run=f"{JOB_FOLDER}/site-1", tag="loss")

    assert [(step, value) for _, step, value in shown] == [(step, float(i)) for i, step in enumerate(steps)]
