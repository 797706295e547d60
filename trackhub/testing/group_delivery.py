# SPDX-License-Identifier: Apache-2.0
"""The contract's groups on delivery: what is confirmed stays, what comes again is handled as declared, errors count."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from trackhub.delivery.report import RunReport
from trackhub.errors import TransientError
from trackhub.spi import Redelivery
from trackhub.testing.base import ContractBase, Kit
from trackhub.testing.calls import series
from trackhub.testing.compare import counted
from trackhub.testing.expect import expect
from trackhub.testing.gallery import check_run
from trackhub.testing.sink import KitSink
from trackhub.testing.watch import KillPoint, Watch

__all__ = ["Confirmation", "Errors", "Outages"]

_BATCH = 10
_TOTAL = 50
_SITE = "site-1"


class Confirmation(ContractBase):
    """What is confirmed survives, and what is handed over again is handled as declared."""

    def test_confirmed_records_survive_sigkill(self, kit: Kit, tmp_path: Path) -> None:
        """The sink's process is killed the moment the backend has confirmed; all that it confirmed is in the store."""
        sink = _journal(kit)
        kill = KillPoint("confirmed", 3 * _BATCH - 1, str(tmp_path / "confirmed"))
        confirmed = sink.run_child(kill, max_batch=_BATCH)
        can = kit.capabilities()
        if can.redelivery is Redelivery.REBUILD:
            # Such a run counts as delivered when it is finished, and not before.
            again = kit.keep(sink.again()).start()
            again.finish()
            check_run(again, self, [_SITE], "the sink was killed and a run was rebuilt")
            return
        wanted = expect(sink.logged[_SITE][:confirmed], can, self).held
        lost = counted(wanted.points, self._hidden()) - counted(sink.read(_SITE).points, self._hidden())
        assert not lost, f"{lost.total()} of {confirmed} confirmed points are not in the store: {list(lost)[:3]}"

    @pytest.mark.parametrize("when", ["written", "confirmed"])
    def test_redelivery_after_sigkill_as_declared(self, kit: Kit, tmp_path: Path, when: str) -> None:
        """The sink is killed in the middle, and another goes on: nothing is lost, and nothing twice unless declared."""
        sink = _journal(kit)
        sink.run_child(KillPoint(when, _BATCH - 1, str(tmp_path / "killed")), max_batch=_BATCH)
        again = kit.keep(sink.again()).start()
        again.finish()
        if again.can.redelivery is Redelivery.AT_LEAST_ONCE:
            self._check_repeated(again, again.run(_SITE))
        else:
            check_run(again, self, [_SITE], f"the sink was killed when a batch was {when}, and started again")

    def test_run_resumes_in_a_new_process(self, kit: Kit) -> None:
        """A sink is killed between two batches; a later one goes on in the same run, with more records."""
        sink = _journal(kit)
        sink.run_child(None, max_batch=_BATCH)
        again = kit.keep(sink.again()).start()
        again.log(_SITE, series("loss", range(_TOTAL, _TOTAL + 10), scale=2.0))
        again.finish()
        check_run(again, self, [_SITE], "the sink was killed and went on")

    def test_redelivery_after_an_error_as_declared(self, kit: Kit) -> None:
        """``write`` stores a batch and then fails, twice; the same batch is handed over again each time."""
        errors = [TransientError("the reply was lost"), TransientError("the reply was lost again")]
        sink = kit.sink(watch=Watch(after=errors)).start()
        sink.log(_SITE, series("loss", range(_BATCH)))
        sink.finish()
        run = sink.run(_SITE)
        if sink.can.redelivery is not Redelivery.AT_LEAST_ONCE:
            check_run(sink, self, [_SITE], "a batch was handed over three times")
            assert run.possible_duplicates == 0
            return
        self._check_repeated(sink, run)
        stored = len(sink.read(_SITE).points)
        assert stored > _BATCH, "it says at_least_once, but a batch handed over again is stored once: claim idempotent"

    def _hidden(self) -> list[str]:
        return [name.removeprefix("points.") for name in self.cannot_tell if name.startswith("points.")]

    def _check_repeated(self, sink: KitSink, run: RunReport) -> None:
        wanted = counted(expect(sink.logged[_SITE], sink.can, self).held.points, self._hidden())
        found = counted(sink.read(_SITE).points, self._hidden())
        assert not wanted - found, f"points are missing: {list(wanted - found)[:3]}"
        assert set(found) == set(wanted), (
            f"there are points that were never logged: {list(set(found) - set(wanted))[:3]}"
        )
        repeated = len(found - wanted)
        assert repeated <= run.possible_duplicates, (
            f"{repeated} points are there twice, and the report counts {run.possible_duplicates} possible duplicates"
        )


class Errors(ContractBase):
    """What fails is tried again or rejected, and every record has one outcome."""

    def test_transient_errors_lose_nothing(self, kit: Kit) -> None:
        """``write`` fails twice before it stores anything: nothing is lost, and it is called exactly twice more."""
        watch = Watch(before=[TransientError("not now"), TransientError("still not", retry_after_s=0.01)])
        sink = kit.sink(watch=watch).start()
        sink.log(_SITE, series("loss", range(25)))
        sink.finish()
        check_run(sink, self, [_SITE], "two transient errors")
        assert watch.attempts == len(watch.batches) + 2, "the backend itself failed, with nothing wrong"

    def test_permanent_error_takes_only_its_records(self, kit: Kit) -> None:
        """Records that can never be stored are rejected by name; their neighbours in the same batch are stored."""
        poison = [3, 4, 17]
        sink = kit.sink(watch=Watch(poison=poison)).start()
        sink.log(_SITE, series("loss", range(25)))
        sink.finish()
        self._check_without(sink, poison, {"permanent_error": len(poison)})

    def test_reported_rejections_are_counted(self, kit: Kit) -> None:
        """Records that ``write`` reports as rejected are counted under the reason that it gave."""
        report = [0, 9, 24]
        sink = kit.sink(watch=Watch(report=report)).start()
        sink.log(_SITE, series("loss", range(25)))
        sink.finish()
        self._check_without(sink, report, {"reported": len(report)})

    def test_unknown_errors_lose_nothing(self, kit: Kit) -> None:
        """An error of no kind that the SPI knows is tried again like a transient one."""
        watch = Watch(before=[RuntimeError("a defect"), OSError("no route to host")])
        sink = kit.sink(watch=watch).start()
        sink.log(_SITE, series("loss", range(25)))
        sink.finish()
        check_run(sink, self, [_SITE], "two unknown errors")
        assert watch.attempts == len(watch.batches) + 2, "the backend itself failed, with nothing wrong"

    def test_batches_are_as_large_as_declared(self, kit: Kit) -> None:
        """No batch is larger than ``max_batch``, and one that is as large is stored."""
        watch = Watch()
        sink = kit.sink(watch=watch).start()
        size = min(sink.can.max_batch, 250 if kit.quick else 1000)
        sink.log(_SITE, series("loss", range(size)))
        sink.log(_SITE, series("loss", range(size, size + 7), scale=2.0))
        sink.finish()
        assert max(watch.batches) <= sink.can.max_batch
        check_run(sink, self, [_SITE], f"a batch of {size} records")

    def _check_without(self, sink: KitSink, positions: list[int], rejected: dict[str, int]) -> None:
        run = sink.run(_SITE)
        assert (run.rejected, run.pending) == (rejected, 0), f"the report says {run}"
        kept = [call for position, call in enumerate(sink.logged[_SITE]) if position not in positions]
        wanted, found = expect(kept, sink.can, self).held, sink.read(_SITE)
        hidden = [name.removeprefix("points.") for name in self.cannot_tell if name.startswith("points.")]
        assert counted(found.points, hidden) == counted(wanted.points, hidden), (
            "the neighbours of rejected records are not stored as they should be"
        )


class Outages(ContractBase):
    """What the backend writes to is away."""

    def test_outage_loses_nothing(self, kit: Kit) -> None:
        """The peer is away in the middle of the job and comes back: what counts as delivered is there, once."""
        sink = kit.sink().start()
        sink.log(_SITE, series("loss", range(10)))
        sink.settle(_SITE)
        peer = self.peer(sink.context)
        peer.fail()
        try:
            for number in range(4):
                sink.log(_SITE, series("loss", range(10 * number, 10 * number + 10), scale=2.0 + number))
            sink.wait_for(_SITE, lambda run: bool(sink.watch.failures) or run.pending == 0, timeout_s=5.0)
        finally:
            peer.heal()
        sink.log(_SITE, series("loss", range(100, 110), scale=9.0))
        sink.finish()
        self._check(sink, "an outage in the middle of the job")

    def test_finish_is_bounded_with_a_dead_peer(self, kit: Kit) -> None:
        """The peer dies and stays away: the job ends at its deadline, every call returns, a later replay delivers."""
        sink = kit.sink().start()
        sink.log(_SITE, series("loss", range(10)))
        sink.settle(_SITE)
        peer = self.peer(sink.context)
        peer.fail()
        try:
            sink.log(_SITE, series("loss", range(10, 40), scale=2.0))
            started = time.monotonic()
            deadline_s = 1.0
            sink.finish(deadline_s=deadline_s)
            took_s = time.monotonic() - started
            hung = sink.is_hung()
        finally:
            peer.heal()
        assert took_s < deadline_s + self.patience_s, f"the end took {took_s:.0f} s, its deadline was {deadline_s:g} s"
        assert not hung, f"a call of the backend did not return within {self.patience_s:g} s after the deadline"
        again = kit.keep(sink.again()).start()
        again.finish()
        self._check(again, "an outage that lasted beyond the end of the job, and a replay")

    def test_finish_returns(self, kit: Kit) -> None:
        """``finish`` and ``close`` return, with runs that are as usual."""
        sink = kit.sink().start()
        for site in (_SITE, "site-2"):
            sink.log(site, series("loss", range(5)))
        sink.finish(deadline_s=self.patience_s)
        assert not sink.is_hung(), f"a call of the backend did not return within {self.patience_s:g} s"
        assert sink.run(_SITE).state == "finished", f"the run was not finished: {sink.run(_SITE)}"

    def _check(self, sink: KitSink, what: str) -> None:
        if sink.can.redelivery is not Redelivery.AT_LEAST_ONCE:
            check_run(sink, self, [_SITE], what)
            return
        hidden = [name.removeprefix("points.") for name in self.cannot_tell if name.startswith("points.")]
        wanted = counted(expect(sink.logged[_SITE], sink.can, self).held.points, hidden)
        lost = wanted - counted(sink.read(_SITE).points, hidden)
        assert not lost, f"after {what}, points are missing: {list(lost)[:3]}"


def _journal(kit: Kit) -> KitSink:
    """Return a finished sink that only filled its journal."""
    sink = kit.sink(deliver=False).start()
    sink.log(_SITE, series("loss", range(_TOTAL)))
    sink.finish()
    return sink
