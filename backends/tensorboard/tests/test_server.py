# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from urllib.request import urlopen

from backends.tensorboard.tests.conftest import JOB_FOLDER
from trackhub.spi import Entry, Image, Metrics, Params, RunStatus, Text

if TYPE_CHECKING:
    from backends.tensorboard.tests.conftest import Rig

Get = Callable[..., Any]


@contextmanager
def tensorboard(logdir: Path) -> Iterator[Get]:
    """Run the real server; yields a function that gets JSON from it."""
    # The reload that precedes the first request is complete with this loader; the other one works in the background.
    options = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
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

    with tensorboard(rig.workdir) as get:
        runs = get("runs")
        scalars = get("plugin/scalars/scalars", run=f"{JOB_FOLDER}/site-2", tag="loss")
        texts = get("plugin/text/text", run=f"{JOB_FOLDER}/site-1", tag="note")
        ((shown,),) = [get("plugin/images/images", run=f"{JOB_FOLDER}/site-1", tag="i", sample="0")]
        content = get("plugin/images/individualImage?" + shown["query"])

    assert runs == [f"{JOB_FOLDER}/site-1", f"{JOB_FOLDER}/site-2"]
    assert scalars == [[1000.25, 2, 2.0], [1000.375, 3, "NaN"]]
    assert [(text["step"], text["text"]) for text in texts] == [(1, "<p><strong>hi</strong></p>")]
    assert (shown["step"], content) == (4, image)
