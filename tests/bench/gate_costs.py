# SPDX-License-Identifier: Apache-2.0
"""What the gate costs: the receiver's CPU time a record, with the checks of what a site sends and without them.

The command calls `against_no_gate`. Each arm runs in a process of its own, and only there are the checks off:

- ``decoding alone`` walks over the frames, verifies the checksums and decodes the records, and checks nothing of them.
- ``checksums alone`` does not decode either, as a receiver that trusts its sites would do. Its lanes decode, and do not
  check again.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.bench.load import feed, open_receiver, requests
from tests.bench.measured_figures import Arm, Experiment, Figure, Run
from tests.bench.subprocesses import in_child, own_cpu_s
from trackhub.delivery.check_received_batch import Contents
from trackhub.delivery.wire import Batch
from trackhub.framing import decode_body, decode_metrics, metrics_bodies, pass_metrics
from trackhub.job_and_run_info import RunStatus
from trackhub.records import Record

__all__ = ["against_no_gate"]

_SITES = 2
_TARGET = 1.3
_AT_ONCE = 256  # records that the gate decodes together
_GATE, _DECODING, _CHECKSUMS = "the gate", "decoding alone", "checksums alone"
_EXPLAIN = "the gate decodes each record, and compares its number and its keys with what the site may send"


def against_no_gate(quick: bool) -> list[Experiment]:
    """Return the experiments that compare a receiver with one that does not check what its sites send."""
    records = 40_000 if quick else 200_000
    return [
        _experiment("Receiver.handle", "", _DECODING, records, 2 if quick else 5),
        _experiment("the receiver with jsonl", "jsonl", _CHECKSUMS, records, 2 if quick else 5),
    ]


def _experiment(what: str, backend: str, against: str, records: int, repeat: int) -> Experiment:
    arms = {arm: _arm(arm, backend, records) for arm in (_GATE, against)}
    figure = Figure(
        f"CPU of {what}", f"the same with {against}", "us", _GATE, against, "us/record", "times less", 1 / _TARGET,
        _EXPLAIN,
    )  # fmt: skip
    return Experiment(f"gate, {what}", arms, [figure], repeat)


def _arm(arm: str, backend: str, records: int) -> Arm:
    def run(folder: Path) -> Run:
        result = in_child("gate_costs:receive", folder=str(folder), arm=arm, backend=backend, records=records)
        return Run({"us": result["cpu_s"] / records * 1e6}, records, result["stored"])

    return run


def receive(folder: str, arm: str, backend: str, records: int) -> dict[str, Any]:
    """Have a receiver take the records of all sites, and deliver them if there is a backend.

    Args:
        folder: the job's run folder.
        arm: what is checked.
        backend: the backend's name; empty for none.
        records: how many records.
    """
    load = {f"site-{i + 1}": list(requests(records // _SITES)) for i in range(_SITES)}
    with ExitStack() as without_gate:
        if arm != _GATE:
            replaced = _decode if arm == _DECODING else _pass
            without_gate.enter_context(patch("trackhub.delivery.receiver.examine", replaced))
            without_gate.enter_context(patch("trackhub.delivery.lane.entry_reader.check_record", _decode_one))
        receiver = open_receiver(Path(folder), {backend: {}} if backend else {})
        begin = own_cpu_s()
        feed(receiver, load, threads=1)
        cpu_s = own_cpu_s() - begin
        report = receiver.finish(RunStatus.FINISHED)
        if backend:
            cpu_s = own_cpu_s() - begin
            return {"cpu_s": cpu_s, "stored": sum(lane.confirmed for lane in report.lanes[backend].values())}
    return {"cpu_s": cpu_s, "stored": sum(site.journaled for site in report.sites.values())}


def _decode(batch: Batch, *_: object) -> Contents:
    """Stand in for ``examine``: verify the checksums and decode the records, all of which are metrics."""
    offset, time = 0, None
    while offset < len(batch.frames):
        bodies, offset = metrics_bodies(batch.frames, offset, _AT_ONCE)
        records = decode_metrics(bodies)
        time = records[0].time if time is None else time
    return Contents(batch, time, Counter(), [], [], "")


def _pass(batch: Batch, *_: object) -> Contents:
    """Stand in for ``examine``: verify the checksums."""
    pass_metrics(batch.frames, 0)
    return Contents(batch, None, Counter(), [], [], "")


def _decode_one(stream: str, kind: int, body: bytes, *_: object) -> Record:
    """Stand in for ``check_record``, by which a lane checks each record again."""
    return decode_body(body)
