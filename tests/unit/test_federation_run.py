# SPDX-License-Identifier: Apache-2.0
"""The federation run goes through the journal: it is counted, replayed, and goes on after a kill without a double."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.readers_and_bad_backends import WAIT_S, json_lines
from trackhub.delivery import wire
from trackhub.delivery.federation.federation_run import FederationOptions
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.replay_journal_or_spool import replay_journal
from trackhub.delivery.report import DeliveryReport
from trackhub.framing import encode_frame
from trackhub.job_and_run_info import RunStatus, Side
from trackhub.records import Metrics, Record

SITES = ("site-1", "site-2", "site-3")
ROUNDS = 6
STATISTICS = ("mean", "min", "max", "std", "count")

CHILD = """
import json, sys, time
from pathlib import Path
from tests.unit.test_federation_run import batch, make_receiver
from trackhub.delivery.federation.federation_run import FederationOptions
from trackhub.job_and_run_info import RunStatus

receiver = make_receiver(Path(sys.argv[1]), FederationOptions(*json.loads(sys.argv[2])))
receiver.start()
for line in sys.stdin:
    call = json.loads(line)
    if call[0] == "batch":
        receiver.handle(call[1], batch(call[1], call[2]))
    elif call[0] == "facts":
        receiver.federation.log(call[1], call[2])
        while receiver.federation._waiting.records():
            time.sleep(0.001)
    else:
        receiver.finish(RunStatus.FINISHED)
    print("done", flush=True)
"""


def value(site: str, round_: int) -> float:
    return float(np.random.default_rng([SITES.index(site), round_]).normal())


def batch(site: str, round_: int) -> bytes:
    """What a site logs in a round: two steps, and a validation."""
    first = 3 * round_
    logged = [Metrics({"loss": 1.0}), Metrics({"loss": 2.0}), Metrics({"val/loss": value(site, round_)})]
    steps = (2 * round_, 2 * round_ + 1, round_)
    records = [Record(first + i, 1000.0 + first + i, steps[i], round_, logged[i]) for i in range(3)]
    stream = f"{SITES.index(site):032x}"
    return wire.encode(wire.Batch(stream, first, first + 3, 3, b"".join(map(encode_frame, records))))


def make_receiver(folder: Path, federation: FederationOptions | None = FederationOptions()) -> Receiver:  # noqa: B008
    return Receiver(folder, job="job-1", side=Side.SERVER, backends={"jsonl": {}}, federation=federation)


def calls() -> list[list[Any]]:
    """What a receiver is told in a job, in order."""
    found: list[list[Any]] = []
    for round_ in range(ROUNDS):
        found.append(["facts", {f"fl/sampled/{site}": 1.0 for site in SITES}, round_])
        for site in SITES:
            found.append(["batch", site, round_])
            found.append(["facts", {f"fl/seconds/train/{site}": 1.0}, round_])
        found.append(["facts", {"fl/round_seconds": 1.0, "fl/sites_missing": 0.0}, round_])
    return found


def run_calls(receiver: Receiver) -> None:
    assert receiver.federation is not None
    for call in calls():
        if call[0] == "batch":
            assert wire.decode_reply(receiver.handle(call[1], batch(call[1], call[2]))) == wire.Accepted()
        else:
            receiver.federation.log(call[1], call[2])


def stored(folder: Path) -> list[dict[str, Any]]:
    return json_lines(folder / "jsonl" / "job-1" / "federation.jsonl")


def statistics(folder: Path) -> list[tuple[int, str, float]]:
    """Round, key and value of each statistic that the backend holds."""
    points = [
        (line["step"], key, value)
        for line in stored(folder)
        if line["kind"] == "metrics"
        for key, value in line["values"].items()
        if not key.startswith("fl/")
    ]
    return sorted(points)


def expected_statistics() -> list[tuple[int, str, Any]]:
    found: list[tuple[int, str, Any]] = []
    for round_ in range(ROUNDS):
        values = np.array([value(site, round_) for site in SITES])
        for name, expected in zip(
            STATISTICS, (values.mean(), values.min(), values.max(), values.std(), 3), strict=True
        ):
            found.append((round_, f"val/loss/{name}", pytest.approx(float(expected), rel=1e-12)))
    return sorted(found, key=lambda point: point[:2])


def assert_counted(report: DeliveryReport, folder: Path) -> None:
    """Check that the federation run is one of the runs that the report counts."""
    site, run = report.sites["federation"], report.lanes["jsonl"]["federation"]
    assert site.at_site is not None
    assert site.is_balanced()
    assert site.final
    assert site.at_site.logged == site.journaled == run.confirmed == len(stored(folder))


def test_the_federation_run_is_counted_and_equals_numpy(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    receiver.start()
    run_calls(receiver)

    report = receiver.finish(RunStatus.FINISHED)

    assert statistics(tmp_path) == expected_statistics()
    assert_counted(report, tmp_path)
    assert report.adds_up
    last = json.loads((tmp_path / "jsonl" / "job-1" / "federation.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["status"]) == ("end", "finished")


def test_a_receiver_without_options_has_no_federation_run(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path, None)
    receiver.start()
    receiver.handle("site-1", batch("site-1", 0))

    assert receiver.federation is None
    assert "federation" not in receiver.finish(RunStatus.FINISHED).sites


def test_no_site_can_write_the_federation_run(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    receiver.start()

    reply = wire.decode_reply(receiver.handle("federation", batch("site-1", 0)))

    assert isinstance(reply, wire.Refused)
    assert reply.reason == "bad_site"
    assert receiver.finish(RunStatus.FINISHED).sites == {}


def test_keys_that_cannot_be_ones_cost_no_other_fact(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    receiver.start()
    assert receiver.federation is not None

    receiver.federation.log({"fl/a\nb": 1.0, "fl/seconds": 2.0}, 0)
    receiver.federation.log_text("fl/text", "x" * 1_000_000, 0)
    report = receiver.finish(RunStatus.FINISHED)

    metrics = [line["values"] for line in stored(tmp_path) if line["kind"] == "metrics"]
    assert {"fl/seconds": 2.0} in metrics
    assert report.lanes["jsonl"]["federation"].rejected == {}


class Child:
    """A receiver in a process of its own."""

    def __init__(self, folder: Path, options: FederationOptions = FederationOptions()) -> None:  # noqa: B008
        arguments = json.dumps([options.aggregate, options.aggregate_weight])
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def call(self, call: list[Any]) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(call), file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.mark.parametrize(
    "options",
    [
        FederationOptions(),
        pytest.param(FederationOptions(("*",), "loss"), marks=pytest.mark.long),  # rows that are not read again
        pytest.param(FederationOptions(None, "loss"), marks=pytest.mark.long),
    ],
)
def test_a_killed_receiver_goes_on_without_a_double_or_a_gap(tmp_path: Path, options: FederationOptions) -> None:
    whole = make_receiver(tmp_path / "whole", options)
    whole.start()
    run_calls(whole)
    whole.finish(RunStatus.FINISHED)
    randomly = random.Random(17)
    kills = sorted(randomly.sample(range(6, len(calls()) - 1), 3))
    child = Child(tmp_path, options)
    for number, call in enumerate(calls()):
        child.call(call)
        if number in kills:
            time.sleep(randomly.uniform(0, 0.2))  # any moment of its work
            child.kill()
            child = Child(tmp_path, options)
            child.call(call)  # as a site does whose reply was lost
    child.call(["finish"])
    child.process.communicate(timeout=WAIT_S)

    assert statistics(tmp_path) == statistics(tmp_path / "whole")
    if options == FederationOptions():
        assert statistics(tmp_path) == expected_statistics()


def test_a_replay_completes_what_a_killed_receiver_did_not_write(tmp_path: Path) -> None:
    child = Child(tmp_path)
    for call in calls()[:-1]:
        child.call(call)
    child.kill()

    report = replay_journal(tmp_path / "trackhub" / "trackhub.db", timeout_s=WAIT_S)
    again = replay_journal(tmp_path / "trackhub" / "trackhub.db", timeout_s=WAIT_S)

    assert statistics(tmp_path) == expected_statistics()
    all_reported = [line["values"].get("fl/all_reported") for line in stored(tmp_path) if line["kind"] == "metrics"]
    assert Counter(all_reported) == Counter({None: len(all_reported) - ROUNDS, 1.0: ROUNDS - 1, 0.0: 1})
    assert_counted(report, tmp_path)
    assert again.sites["federation"].journaled == report.sites["federation"].journaled


def health(folder: Path, what: str) -> dict[str, float]:
    """The last value of each key below ``fl/delivery/`` that begins so."""
    prefix = f"fl/delivery/{what}/"
    return {
        key.removeprefix(prefix): value
        for line in stored(folder)
        if line["kind"] == "metrics"
        for key, value in line["values"].items()
        if key.startswith(prefix)
    }


def test_the_run_says_how_many_records_wait_at_each_site_and_how_often_it_asked_again(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    receiver.start()
    for number, retries in enumerate((5, 3)):  # a sender that was started again begins at 0
        counts = wire.SiteCounts(logged=9, acked=2, spooled=7, retries=retries)
        receiver.handle("site-2", wire.encode(wire.KeepAlive(counts, f"session {number}", 1)))
    run_calls(receiver)
    receiver.finish(RunStatus.FINISHED)

    assert health(tmp_path, "spooled") == {"site-2": 7}  # the others have not said it
    assert health(tmp_path, "retries") == {"site-2": 5}


def test_the_lag_of_each_backend_is_there_from_the_first_round_on(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    began = time.monotonic()
    receiver.start()
    run_calls(receiver)
    receiver.finish(RunStatus.FINISHED)

    lines = [line["values"] for line in stored(tmp_path) if line["kind"] == "metrics"]
    lags = [line["fl/delivery/lag_seconds/jsonl"] for line in lines if "fl/delivery/lag_seconds/jsonl" in line]
    assert lags
    assert all(0 <= lag <= time.monotonic() - began for lag in lags)


def test_the_federation_run_weighs_by_a_named_metric(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path, FederationOptions(aggregate_weight="loss"))
    receiver.start()
    run_calls(receiver)
    receiver.finish(RunStatus.FINISHED)

    means = {r: v for r, key, v in statistics(tmp_path) if key == "val/loss/weighted_mean"}
    assert means == {r: pytest.approx(np.mean([value(site, r) for site in SITES])) for r in range(ROUNDS)}
