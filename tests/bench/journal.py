# SPDX-License-Identifier: Apache-2.0
"""The journal's size, and what ``trackhub status`` takes on a large one, against the same points as JSON lines."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from tests.bench.child import ROOT, kept_folder
from tests.bench.figures import Arm, Experiment, Figure, Run
from tests.bench.load import feed, open_receiver, requests
from trackhub.delivery.journal.store import JOURNAL_NAME, Journal
from trackhub.delivery.wire import Batch, decode_request
from trackhub.framing import decode_body, scan_frames
from trackhub.run import RunStatus

__all__ = ["experiments"]

_MILLION = 1_000_000


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    sized = 100_000
    size = Experiment(
        "journal size",
        {"trackhub": lambda folder: _journal_bytes(folder, sized), "JSON lines": lambda folder: _json_bytes(sized)},
        [Figure("journal bytes per record", "the same points as JSON lines", "bytes", "trackhub", "JSON lines",
                "bytes", "times less", 2)],
        repeat=1,
    )  # fmt: skip
    millions = 10
    against = f"reading the same points as JSON lines (one million of them, times {millions})"
    build = functools.cache(lambda: _build(millions))
    status = Experiment(
        "status",
        {
            "trackhub status": _status(build, millions * _MILLION),
            "JSON lines": lambda folder: _read_lines(build()[1], millions),
        },
        [Figure(f"trackhub status on {millions} million records", against, "seconds", "trackhub status", "JSON lines",
                "s", "times less", 20,
                "it reads counters, no row: all of it is the start of Python and of the command's libraries")],
        repeat=2 if quick else 5,
    )  # fmt: skip
    return [size, status]


def _journal_bytes(folder: Path, records: int) -> Run:
    receiver = open_receiver(folder, {})
    feed(receiver, {"site-1": list(requests(records))})
    stored = receiver.finish(RunStatus.FINISHED, deadline_s=0).sites["site-1"].journaled
    return Run({"bytes": (folder / "trackhub" / JOURNAL_NAME).stat().st_size / records}, records, stored)


def _json_bytes(records: int) -> Run:
    return Run({"bytes": sum(map(len, _lines(records))) / records})


def _lines(records: int) -> list[bytes]:
    """Return the records of ``load.requests`` as the backend ``jsonl`` and other tools write them: field by name."""
    encode, lines = msgspec.json.Encoder().encode, []
    for request in requests(records):
        message = decode_request(request)
        if isinstance(message, Batch):
            for frame in scan_frames(message.frames):
                record = decode_body(message.frames[frame.body : frame.end])
                line = {"time": record.time, "step": record.step, "round": record.round, "seq": record.seq}
                lines.append(encode({**line, "values": record.payload.values}) + b"\n")  # type: ignore[union-attr]
    return lines


def _build(millions: int) -> tuple[Path, Path]:
    """Make a journal of a million records, repeated, and a file of as many JSON lines; kept until this process ends."""
    folder = kept_folder("journal")
    messages = map(decode_request, requests(_MILLION))
    batches = [message for message in messages if isinstance(message, Batch)]
    journal = Journal.open(folder / JOURNAL_NAME, job="job", side="server")
    for number in range(millions):
        site = journal.add_site(f"site-{number % 2 + 1}", time.time())
        for batch in batches:
            journal.append(site, msgspec.structs.replace(batch, stream=f"{number:032x}"), {})
    journal.close()
    lines = folder / "points.jsonl"
    lines.write_bytes(b"".join(_lines(_MILLION)))
    return folder / JOURNAL_NAME, lines


def _status(build: functools._lru_cache_wrapper[tuple[Path, Path]], records: int) -> Arm:
    def run(folder: Path) -> Run:
        path, _ = build()
        begin = time.perf_counter()
        command = [sys.executable, "-m", "trackhub.cli", "status", "--json", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - begin
        sites = json.loads(done.stdout)["journals"][0]["sites"].values()
        return Run({"seconds": seconds}, records, sum(site["journaled"] for site in sites))

    return run


def _read_lines(path: Path, times: int) -> Run:
    """Count a million points as a script would, with the quickest JSON reader at hand; scaled to ``times`` as many."""
    begin, count, decode = time.perf_counter(), 0, msgspec.json.Decoder().decode
    with path.open("rb") as file:
        for line in file:
            count += len(decode(line)["values"])
    return Run({"seconds": (time.perf_counter() - begin) * times}, _MILLION, count)
