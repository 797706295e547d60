# SPDX-License-Identifier: Apache-2.0
"""What FLARE has said before a batch comes stands before it in the journal, however busy the federation run is."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.unit.test_federation_run import make_receiver, stored
from trackhub.delivery import wire
from trackhub.delivery.receiver import Receiver
from trackhub.framing import encode_frame
from trackhub.job_and_run_info import RunStatus
from trackhub.records import Metrics, Record

SITES = ("site-1", "site-2", "site-3")


def send(receiver: Receiver, site: str, number: int, round_: int, value: float) -> wire.Reply:
    """Send the site's record of this number."""
    record = Record(number, 1000.0 + number, round_, round_, Metrics({"val/loss": value}))
    batch = wire.Batch(f"{SITES.index(site):032x}", number, number + 1, 1, encode_frame(record))
    return wire.decode_reply(receiver.handle(site, wire.encode(batch)))


def values_of(folder: Path, key: str) -> list[tuple[int, float]]:
    lines = [line for line in stored(folder) if line["kind"] == "metrics"]
    return [(line["step"], line["values"][key]) for line in lines if key in line["values"]]


def test_a_second_workflow_with_the_same_round_numbers_loses_no_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sites may log some milliseconds after it has begun."""
    monkeypatch.setattr("trackhub.delivery.federation.federation_run._PAUSE_S", 2.0)  # its thread sleeps meanwhile
    receiver = make_receiver(tmp_path)
    receiver.start()
    assert receiver.federation is not None
    for number in range(4):  # rounds 0 and 1, twice
        receiver.federation.log({"fl/rounds_started": number + 1.0}, number % 2)
        for i, site in enumerate(SITES):
            assert send(receiver, site, number, number % 2, 10.0 * number + i) == wire.Accepted()
        receiver.federation.log({"fl/round_seconds": 1.0, "fl/sites_missing": 0.0}, number % 2)

    receiver.finish(RunStatus.FINISHED)

    assert values_of(tmp_path, "val/loss/mean") == [(0, 1.0), (1, 11.0), (0, 21.0), (1, 31.0)]
    assert values_of(tmp_path, "val/loss/count") == [(0, 3), (1, 3), (0, 3), (1, 3)]
    assert values_of(tmp_path, "fl/late_values") == []


def test_a_batch_waits_until_the_facts_before_it_can_be_stored(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    receiver.start()
    assert receiver.federation is not None
    send(receiver, "site-1", 0, 0, 1.0)
    other = sqlite3.connect(tmp_path / "trackhub" / "trackhub.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    receiver.federation.log({"fl/rounds_started": 1.0}, 1)

    assert isinstance(send(receiver, "site-1", 1, 1, 2.0), wire.Busy)
    other.execute("ROLLBACK")
    other.close()
    while isinstance(send(receiver, "site-1", 1, 1, 2.0), wire.Busy):
        pass
    report = receiver.finish(RunStatus.FINISHED)

    assert values_of(tmp_path, "fl/rounds_started") == [(1, 1.0)]
    assert report.adds_up
