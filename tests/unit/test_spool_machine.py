# SPDX-License-Identifier: Apache-2.0
"""Writers, readers, crashes of both and lost cursors, in any order: nothing lost, doubled or out of order."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.unit.readers_and_bad_backends import ModelReceiver, assert_accounted, drain, new_spool
from trackhub.framing import encode_frame
from trackhub.records import Record, Text
from trackhub.spool import reading
from trackhub.spool.counts import add_up
from trackhub.spool.reading import RETIRED, SpoolReader
from trackhub.spool.retire_streams import Retirement
from trackhub.spool.writing import SpoolWriter


class SpoolMachine(RuleBasedStateMachine):
    """Writers, readers, crashes of both and lost cursors, in any order, against lists in memory."""

    spools = Bundle("spools")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.logged: dict[str, list[Any]] = {}
        self.receivers = {"server": ModelReceiver(), "client": ModelReceiver()}
        self.lost_cursor = False

    @initialize()
    def start(self) -> None:
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="spool-machine-"))
        new_spool(self.folder, *self.receivers, max_bytes=16_000)  # segments of 2000 bytes
        self.readers = {name: SpoolReader(self.folder, name) for name in self.receivers}

    def teardown(self) -> None:
        import shutil

        if not hasattr(self, "folder"):
            return
        for name in self.readers:
            self.restart(name)
            drain(self.readers[name], self.receivers[name])
            counts = self.readers[name].counts()
            retired = self.readers[name].retired_streams()
            logged = sum(map(len, self.logged.values()))
            assert_accounted(add_up(counts.values()), logged)
            assert retired + len(counts.keys() - {RETIRED}) >= sum(map(bool, self.logged.values()))
            for stream, items in self.logged.items():
                kept = [i for i in items if i != "dropped"]
                found = [
                    r.payload.text for r in self.receivers[name].records.get(stream, []) if isinstance(r.payload, Text)
                ]
                assert found == kept, f"{name}: lost, doubled or out of order"
                if stream in counts:
                    assert_accounted(counts[stream], len(items))
                    if not self.lost_cursor:
                        assert counts[stream].acked == len(kept)
                        assert sum(counts[stream].dropped.values()) == len(items) - len(kept)
        shutil.rmtree(self.folder)

    @rule(target=spools)
    def open_writer(self) -> SpoolWriter:
        spool = SpoolWriter(self.folder, clock=lambda: self.now)
        self.logged[spool.stream] = []
        return spool

    @rule(spool=spools, n=st.integers(1, 30), size=st.integers(0, 300))
    def log(self, spool: SpoolWriter, n: int, size: int) -> None:
        self.now += 1
        for _ in range(n):
            items = self.logged[spool.stream]
            text = f"{len(items)}".ljust(size, ".")
            before = spool._stream.drops.total
            spool.append(Text("k", text), None, 1.0)
            items.append("dropped" if spool._stream.drops.total > before else text)

    @rule(spool=spools)
    def drop(self, spool: SpoolWriter) -> None:
        spool.drop("unconvertible", "by the test")
        self.logged[spool.stream].append("dropped")

    @rule(spool=consumes(spools), torn=st.integers(0, 40))
    def kill_writer(self, spool: SpoolWriter, torn: int) -> None:
        """It dies within a write: a part of a frame is left."""
        spool.close()
        segments = sorted(self.folder.glob(f"{spool.stream}-*.spool"))
        if segments and torn:
            with segments[-1].open("ab") as file:
                file.write(encode_frame(Record(spool.next_seq, 1.0, None, None, Text("k", "x" * 60)))[:torn])

    @rule(name=st.sampled_from(["server", "client"]), n=st.integers(1, 40), size=st.integers(1, 3000))
    def deliver(self, name: str, n: int, size: int) -> None:
        batch = self.readers[name].next_batch(n, size)
        if batch is not None:
            self.receivers[name].accept(batch)
            self.readers[name].settle(batch)

    @rule(name=st.sampled_from(["server", "client"]), n=st.integers(1, 40))
    def deliver_but_lose_the_reply(self, name: str, n: int) -> None:
        batch = self.readers[name].next_batch(n, 1 << 20)
        if batch is not None:
            self.receivers[name].accept(batch)

    @rule(name=st.sampled_from(["server", "client"]))
    def restart(self, name: str) -> None:
        self.readers[name] = SpoolReader(self.folder, name)

    @precondition(lambda self: bool(self.logged))
    @rule(name=st.sampled_from(["server", "client"]), which=st.integers(0, 7))
    def lose_the_cursor(self, name: str, which: int) -> None:
        # An index, not one drawn of these: which streams were read first depends on their random names, and Hypothesis
        # takes it for a flaky test when what it may draw differs from one run to the next.
        acks = sorted(self.folder.glob(f"*.{name}.ack"))
        if acks:
            acks[which % len(acks)].unlink()
            self.lost_cursor = True
            self.restart(name)

    @rule()
    def count(self) -> None:
        for reader in self.readers.values():
            counts = reader.counts()
            assert_accounted(add_up(counts.values()), sum(map(len, self.logged.values())))
            for stream in counts.keys() & self.logged.keys():
                assert_accounted(counts[stream], len(self.logged[stream]))

    @rule(name=st.sampled_from(["server", "client"]), how_far=st.sampled_from(["all", "free", "retire"]))
    def tidy_up(self, name: str, how_far: str) -> None:
        """Delete what is not needed any more. The reader may be killed in the middle of that."""
        reader = self.readers[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reading, "_KEPT_STREAMS", 0)
            if how_far != "all":
                method = "retire" if how_far == "free" else "clean_up"
                patch.setattr(Retirement, method, Mock(side_effect=OSError(5, "killed here")))
            reader._ask_at = 0.0  # it asks once a second which writers have ended
            reader.begin_pass()
            while batch := reader.next_batch(100, 1 << 20):
                self.receivers[name].accept(batch)
                reader.settle(batch)
            reader.tidy_up()
        if how_far != "all":
            self.restart(name)

    @invariant()
    def stays_within_its_limit(self) -> None:
        if hasattr(self, "folder"):
            used = sum(f.stat().st_size for f in self.folder.glob("*.spool"))
            assert used <= 16_000 + 2_000 * len(self.logged)


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.long
def test_the_machine_for_long() -> None:
    run_state_machine_as_test(SpoolMachine, settings=settings(max_examples=1000, stateful_step_count=60, deadline=None))
