# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of `trackhub.local`: they open a run that delivers at once, and read its jsonl file."""

from __future__ import annotations

from pathlib import Path

import trackhub
from tests.unit.readers_and_bad_backends import json_lines
from trackhub.delivery.report import DeliveryReport
from trackhub.limits import Limits
from trackhub.local_tracking import LocalWriter

FAST = Limits(poll_s=0.005, linger_s=0, flush_s=0.01, deadline_s=5)


def open_local(
    tmp_path: Path, *backends: str, job: str | None = None, site: str = "local", resume: bool = False
) -> LocalWriter:
    return trackhub.local(backends or ["jsonl"], folder=tmp_path, job=job, site=site, resume=resume, limits=FAST)


def lines(writer: LocalWriter, site: str = "local") -> list[dict[str, object]]:
    return json_lines(writer.folder / "jsonl" / writer.folder.name / f"{site}.jsonl")


def report_of(writer: LocalWriter) -> DeliveryReport:
    assert writer.report is not None
    return writer.report
