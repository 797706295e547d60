# SPDX-License-Identifier: Apache-2.0
"""The contract's groups on delivery: what is confirmed stays, what comes again is handled as declared, errors count."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from trackhub.delivery.report import RunReport
from trackhub.errors import TransientError
from trackhub.spi import Redelivery
from trackhub.testing.checks.base import ContractBase, Kit
from trackhub.testing.comparison import counted
from trackhub.testing.expectation import expect
from trackhub.testing.fault_proxy import KillPoint, Watch
from trackhub.testing.log_calls import series
from trackhub.testing.receiver_rig import KitRig
from trackhub.testing.scenarios import check_run

__all__ = ["Confirmation", "Errors", "Outages"]

_BATCH = 10
_TOTAL = 50
_SITE = "site-1"


class Confirmation(ContractBase):
    """What is confirmed survives, and what is handed over again is handled as declared."""

    def test_confirmed_records_survive_sigkill(self, kit: Kit, tmp_path: Path) -> None:
        """The receiver's process is killed the moment the backend has confirmed; all that it confirmed is in the store."""
        rig = _journal(kit)
        kill = KillPoint("confirmed", 3 * _BATCH - 1, str(tmp_path / "confirmed"))
        confirmed = rig.run_child(kill, max_batch=_BATCH)
        can = kit.capabilities()
        if can.redelivery is Redelivery.REBUILD:
            # Such a run counts as delivered when it is finished, and not before.
            again = kit.keep(rig.again()).start()
            again.finish()
            check_run(again, self, [_SITE], "the receiver was killed and a run was rebuilt")
            return
        wanted = expect(rig.logged[_SITE][:confirmed], can, self).held
        lost = counted(wanted.points, self._hidden()) - counted(rig.read(_SITE).points, self._hidden())
        assert not lost, f"{lost.total()} of {confirmed} confirmed points are not in the store: {list(lost)[:3]}"

    @pytest.mark.parametrize("when", ["written", "confirmed"])
    def test_redelivery_after_sigkill_as_declared(self, kit: Kit, tmp_path: Path, when: str) -> None:
        """The receiver is killed in the middle, and another goes on: nothing is lost, and nothing twice unless declared."""
        rig = _journal(kit)
        rig.run_child(KillPoint(when, _BATCH - 1, str(tmp_path / "killed")), max_batch=_BATCH)
        again = kit.keep(rig.again()).start()
        again.finish()
        if again.can.redelivery is Redelivery.AT_LEAST_ONCE:
            self._check_repeated(again, again.run(_SITE))
        else:
            check_run(again, self, [_SITE], f"the receiver was killed when a batch was {when}, and started again")

    def test_run_resumes_in_a_new_process(self, kit: Kit) -> None:
        """A receiver is killed between two batches; a later one goes on in the same run, with more records."""
        rig = _journal(kit)
        rig.run_child(None, max_batch=_BATCH)
        again = kit.keep(rig.again()).start()
        again.log(_SITE, series("loss", range(_TOTAL, _TOTAL + 10), scale=2.0))
        again.finish()
        check_run(again, self, [_SITE], "the receiver was killed and went on")

    def test_redelivery_after_an_error_as_declared(self, kit: Kit) -> None:
        """``write`` stores a batch and then fails, twice; the same batch is handed over again each time."""
        errors = [TransientError("the reply was lost"), TransientError("the reply was lost again")]
        rig = kit.rig(watch=Watch(after=errors)).start()
        rig.log(_SITE, series("loss", range(_BATCH)))
        rig.finish()
        run = rig.run(_SITE)
        if rig.can.redelivery is not Redelivery.AT_LEAST_ONCE:
            check_run(rig, self, [_SITE], "a batch was handed over three times")
            assert run.possible_duplicates == 0
            return
        self._check_repeated(rig, run)
        stored = len(rig.read(_SITE).points)
        assert stored > _BATCH, "it says at_least_once, but a batch handed over again is stored once: claim idempotent"

    def _hidden(self) -> list[str]:
        return [name.removeprefix("points.") for name in self.cannot_tell if name.startswith("points.")]

    def _check_repeated(self, rig: KitRig, run: RunReport) -> None:
        wanted = counted(expect(rig.logged[_SITE], rig.can, self).held.points, self._hidden())
        found = counted(rig.read(_SITE).points, self._hidden())
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
        rig = kit.rig(watch=watch).start()
        rig.log(_SITE, series("loss", range(25)))
        rig.finish()
        check_run(rig, self, [_SITE], "two transient errors")
        assert watch.attempts == len(watch.batches) + 2, "the backend itself failed, with nothing wrong"

    def test_permanent_error_takes_only_its_records(self, kit: Kit) -> None:
        """Records that can never be stored are rejected by name; their neighbours in the same batch are stored."""
        poison = [3, 4, 17]
        rig = kit.rig(watch=Watch(poison=poison)).start()
        rig.log(_SITE, series("loss", range(25)))
        rig.finish()
        self._check_without(rig, poison, {"permanent_error": len(poison)})

    def test_reported_rejections_are_counted(self, kit: Kit) -> None:
        """Records that ``write`` reports as rejected are counted under the reason that it gave."""
        report = [0, 9, 24]
        rig = kit.rig(watch=Watch(report=report)).start()
        rig.log(_SITE, series("loss", range(25)))
        rig.finish()
        self._check_without(rig, report, {"reported": len(report)})

    def test_unknown_errors_lose_nothing(self, kit: Kit) -> None:
        """An error of no kind that the SPI knows is tried again like a transient one."""
        watch = Watch(before=[RuntimeError("a defect"), OSError("no route to host")])
        rig = kit.rig(watch=watch).start()
        rig.log(_SITE, series("loss", range(25)))
        rig.finish()
        check_run(rig, self, [_SITE], "two unknown errors")
        assert watch.attempts == len(watch.batches) + 2, "the backend itself failed, with nothing wrong"

    def test_batches_are_as_large_as_declared(self, kit: Kit) -> None:
        """No batch is larger than ``max_batch``, and one that is as large is stored."""
        watch = Watch()
        rig = kit.rig(watch=watch).start()
        size = min(rig.can.max_batch, 250 if kit.quick else 1000)
        rig.log(_SITE, series("loss", range(size)))
        rig.log(_SITE, series("loss", range(size, size + 7), scale=2.0))
        rig.finish()
        assert max(watch.batches) <= rig.can.max_batch
        check_run(rig, self, [_SITE], f"a batch of {size} records")

    def _check_without(self, rig: KitRig, positions: list[int], rejected: dict[str, int]) -> None:
        run = rig.run(_SITE)
        assert (run.rejected, run.pending) == (rejected, 0), f"the report says {run}"
        kept = [call for position, call in enumerate(rig.logged[_SITE]) if position not in positions]
        wanted, found = expect(kept, rig.can, self).held, rig.read(_SITE)
        hidden = [name.removeprefix("points.") for name in self.cannot_tell if name.startswith("points.")]
        assert counted(found.points, hidden) == counted(wanted.points, hidden), (
            "the neighbours of rejected records are not stored as they should be"
        )


class Outages(ContractBase):
    """What the backend writes to is away."""

    def test_outage_loses_nothing(self, kit: Kit) -> None:
        """The peer is away in the middle of the job and comes back: what counts as delivered is there, once."""
        rig = kit.rig().start()
        rig.log(_SITE, series("loss", range(10)))
        rig.settle(_SITE)
        peer = self.peer(rig.context)
        peer.fail()
        try:
            for number in range(4):
                rig.log(_SITE, series("loss", range(10 * number, 10 * number + 10), scale=2.0 + number))
            rig.wait_for(_SITE, lambda run: bool(rig.watch.failures) or run.pending == 0, timeout_s=5.0)
        finally:
            peer.heal()
        rig.log(_SITE, series("loss", range(100, 110), scale=9.0))
        rig.finish()
        self._check(rig, "an outage in the middle of the job")

    def test_finish_is_bounded_with_a_dead_peer(self, kit: Kit) -> None:
        """The peer dies and stays away: the job ends at its deadline, every call returns, a later replay delivers."""
        rig = kit.rig().start()
        rig.log(_SITE, series("loss", range(10)))
        rig.settle(_SITE)
        peer = self.peer(rig.context)
        peer.fail()
        try:
            rig.log(_SITE, series("loss", range(10, 40), scale=2.0))
            started = time.monotonic()
            deadline_s = 1.0
            rig.finish(deadline_s=deadline_s)
            took_s = time.monotonic() - started
            hung = rig.is_hung()
        finally:
            peer.heal()
        assert took_s < deadline_s + self.patience_s, f"the end took {took_s:.0f} s, its deadline was {deadline_s:g} s"
        assert not hung, f"a call of the backend did not return within {self.patience_s:g} s after the deadline"
        again = kit.keep(rig.again()).start()
        again.finish()
        self._check(again, "an outage that lasted beyond the end of the job, and a replay")

    def test_finish_returns(self, kit: Kit) -> None:
        """``finish`` and ``close`` return, with runs that are as usual."""
        rig = kit.rig().start()
        for site in (_SITE, "site-2"):
            rig.log(site, series("loss", range(5)))
        rig.finish(deadline_s=self.patience_s)
        assert not rig.is_hung(), f"a call of the backend did not return within {self.patience_s:g} s"
        assert rig.run(_SITE).state == "finished", f"the run was not finished: {rig.run(_SITE)}"

    def _check(self, rig: KitRig, what: str) -> None:
        if rig.can.redelivery is not Redelivery.AT_LEAST_ONCE:
            check_run(rig, self, [_SITE], what)
            return
        hidden = [name.removeprefix("points.") for name in self.cannot_tell if name.startswith("points.")]
        wanted = counted(expect(rig.logged[_SITE], rig.can, self).held.points, hidden)
        lost = wanted - counted(rig.read(_SITE).points, hidden)
        assert not lost, f"after {what}, points are missing: {list(lost)[:3]}"


def _journal(kit: Kit) -> KitRig:
    """Return a finished receiver that only filled its journal."""
    rig = kit.rig(deliver=False).start()
    rig.log(_SITE, series("loss", range(_TOTAL)))
    rig.finish()
    return rig
