# SPDX-License-Identifier: Apache-2.0
"""A backend that keeps the order of its records, and one record with which it fails each time, as a user sees it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

import trackhub
from tests.unit.readers_and_bad_backends import MemoryBackend, json_lines
from tests.unit.rigs import Bench, poisoned
from trackhub.builtin.jsonl import JsonlBackend, JsonlRun
from trackhub.cli.replay import replay
from trackhub.cli.status import status
from trackhub.delivery.report_text import format_report
from trackhub.errors import PermanentError, TransientError
from trackhub.limits import Limits
from trackhub.spi import Redelivery

pytestmark = pytest.mark.usefixtures("quick_retries")

FAST = Limits(poll_s=0.005, linger_s=0, flush_s=0.01, deadline_s=2)


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the file backend fail with each record of one key, as with a defect of its own."""
    line = JsonlRun._line

    def bad_line(self: JsonlRun, entry: Any) -> dict[str, Any]:
        if "bad" in getattr(entry.payload, "values", {}):
            raise TransientError("HTTP 500")
        return line(self, entry)

    monkeypatch.setattr(JsonlRun, "_line", bad_line)


def log(folder: Path) -> trackhub.local_tracking.LocalWriter:
    with trackhub.local(["jsonl"], folder=folder, job="job-1", limits=FAST) as writer:
        for step in range(40):
            writer.log({"bad" if step == 20 else "loss": 0.5}, step)
    return writer


@pytest.mark.usefixtures("refusing")
def test_the_record_that_is_always_refused_is_rejected_and_all_others_stored(tmp_path: Path) -> None:
    """The file backend keeps the order, and has a test of its file."""
    writer = log(tmp_path)

    assert writer.report is not None
    run = writer.report.lanes["jsonl"]["local"]
    assert (run.rejected, run.confirmed, run.pending, run.blocked_by) == ({"backend_error": 1}, 39, 0, "")
    lines = json_lines(writer.folder / "jsonl" / writer.folder.name / "local.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "metrics"] == [s for s in range(40) if s != 20]


@pytest.mark.usefixtures("refusing")
def test_a_run_that_waits_for_one_record_says_so_everywhere_and_another_backend_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a test of the store, nothing shows that the store is well."""
    monkeypatch.setattr(JsonlBackend, "capabilities", msgspec.structs.replace(JsonlBackend.capabilities, probe=False))

    with caplog.at_level(logging.WARNING):
        writer = log(tmp_path)
    shown = CliRunner().invoke(status, [str(writer.folder)])
    document = json.loads(CliRunner().invoke(status, ["--json", str(writer.folder)]).stdout)
    replayed = CliRunner().invoke(replay, [str(writer.folder), "--backend", "tensorboard"])

    name = "metrics 'bad' (step 20, record 20)"
    assert writer.report is not None
    run = writer.report.lanes["jsonl"]["local"]
    assert (run.confirmed, run.pending, run.state, run.blocked_by) == (0, 40, "unfinished", name)
    assert f"all records after {name} wait for it: TransientError: HTTP 500" in format_report(writer.report)
    assert f"all records after {name} wait for it" in " ".join(shown.stdout.split())
    assert document["journals"][0]["lanes"]["jsonl"]["local"]["blocked_by"] == name
    assert sum(f"{name} fails each time" in record.getMessage() for record in caplog.records) == 1
    assert re.search(r"tensorboard +40 +40 +40 +0 +0 ", replayed.output), replayed.output


def test_a_record_that_is_rejected_before_a_crash_is_not_counted_as_stored(bench: Bench) -> None:
    """A resumable run only says how far it stands. The rejected record lies before that."""
    killed = MemoryBackend(poisoned({1}, lambda: PermanentError("no")), redelivery=Redelivery.RESUMABLE, max_batch=1)
    bench.log(4)
    with pytest.MonkeyPatch.context() as patched:  # its process dies before it stores its cursor
        patched.setattr("trackhub.delivery.lane.cursor.Cursor.confirm", lambda *a, **k: None)
        lane = bench.lane(killed)
        assert killed.wait_for("site-1", 3)
        lane.begin_finish({}, trackhub.spi.RunStatus.FINISHED, 1.0)
        lane.join(1.0)

    again = MemoryBackend(redelivery=Redelivery.RESUMABLE, stored=killed.stored)
    bench.lane(again)
    run = bench.finish().lanes["memory"]["site-1"]

    assert again.positions() == [0, 2, 3]
    assert (run.confirmed, run.rejected, run.pending) == (3, {"permanent_error": 1}, 0)
