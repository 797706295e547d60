# SPDX-License-Identifier: Apache-2.0
"""Checks of delivery: confirmed records stay, and redelivered records are handled as the backend declares.

Errors and outages lose nothing. Large batches and many records arrive.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import pytest

from trackhub.delivery.report import RunReport
from trackhub.errors import TransientError
from trackhub.records import Text
from trackhub.spi import Kind, Redelivery
from trackhub.testing.checks.fixtures import ContractFixtures, Kit
from trackhub.testing.comparison import counted
from trackhub.testing.contract_hooks import ContractHooks
from trackhub.testing.expectation import expect
from trackhub.testing.faulty_backend import FaultyBackend, KillPoint
from trackhub.testing.killed_receiver import deliver_until_killed
from trackhub.testing.readback import Point
from trackhub.testing.receiver_rig import ReceiverRig
from trackhub.testing.sample_calls_and_requests import Call, FuturePayload, artifact, image, metric, series
from trackhub.testing.scenario_delivery import check_run

__all__ = ["ConfirmationChecks", "ErrorChecks", "OutageChecks", "VolumeChecks"]

_BATCH = 10
_TOTAL = 50
_SITE = "site-1"
_ATTEMPTS = 7  # a batch of 40 records is halved at most six times until one is left


class ConfirmationChecks(ContractFixtures):
    """Confirmed records stay in the store. Redelivered records are handled as the backend declares."""

    def test_confirmed_records_survive_sigkill(self, kit: Kit, tmp_path: Path) -> None:
        """The receiver's process is killed when the backend has confirmed. All that it confirmed is in the store."""
        rig = _journal(kit)
        kill = KillPoint("confirmed", 3 * _BATCH - 1, str(tmp_path / "confirmed"))
        confirmed = deliver_until_killed(rig, kill, max_batch=_BATCH)
        can = kit.capabilities()
        if can.redelivery is Redelivery.REBUILD:
            # Such a run counts as delivered only when it is finished.
            again = kit.again(rig)
            again.finish()
            check_run(again, [_SITE], "the receiver was killed and a run was rebuilt")
            return
        wanted = expect(rig.logged[_SITE][:confirmed], can, self).held
        lost = _points(self, wanted.points) - _points(self, rig.read(_SITE).points)
        assert not lost, (
            f"{lost.total()} of {confirmed} confirmed points are not in the store: {list(lost)[:3]}. If write() only "
            "hands records over, declare confirmed_by=ConfirmedBy.FLUSH and implement flush()"
        )

    @pytest.mark.parametrize("when", ["written", "confirmed"])
    def test_redelivery_after_sigkill_as_declared(
        self, kit: Kit, tmp_path: Path, when: Literal["written", "confirmed"]
    ) -> None:
        """The receiver is killed while it delivers, and another receiver goes on.

        No record is lost. A record is there twice only if the backend declares that.
        """
        rig = _journal(kit)
        deliver_until_killed(rig, KillPoint(when, _BATCH - 1, str(tmp_path / "killed")), max_batch=_BATCH)
        again = kit.again(rig)
        again.finish()
        if again.can.redelivery is Redelivery.AT_LEAST_ONCE:
            self._check_repeated(again, again.run(_SITE))
        else:
            check_run(again, [_SITE], f"the receiver was killed when a batch was {when}, and started again")

    def test_run_resumes_in_a_new_process(self, kit: Kit) -> None:
        """A receiver is killed when all is delivered, before it finishes the run.

        A later one goes on in the same run, with more records.
        """
        rig = _journal(kit)
        deliver_until_killed(rig, None, max_batch=_BATCH)
        again = kit.again(rig)
        again.log(_SITE, series("loss", range(_TOTAL, _TOTAL + 10), scale=2.0))
        again.finish()
        check_run(again, [_SITE], "the receiver was killed and went on")

    def test_redelivery_after_an_error_as_declared(self, kit: Kit) -> None:
        """``write`` stores a batch and then fails, twice. The same batch is handed over again each time."""
        errors = [TransientError("the reply was lost"), TransientError("the reply was lost again")]
        rig = kit.rig(proxy=FaultyBackend(after=errors)).start()
        rig.log(_SITE, series("loss", range(_BATCH)))
        rig.finish()
        run = rig.run(_SITE)
        if rig.can.redelivery is not Redelivery.AT_LEAST_ONCE:
            check_run(rig, [_SITE], "a batch was handed over three times")
            assert run.possible_duplicates == 0
            return
        self._check_repeated(rig, run)
        stored = len(rig.read(_SITE).points)
        assert stored > _BATCH, (
            "the backend declares Redelivery.AT_LEAST_ONCE, but a batch that was handed over again is stored once. "
            "Declare Redelivery.IDEMPOTENT"
        )

    def _check_repeated(self, rig: ReceiverRig, run: RunReport) -> None:
        wanted = _points(self, expect(rig.logged[_SITE], rig.can, self).held.points)
        found = _points(self, rig.read(_SITE).points)
        assert not wanted - found, f"points are missing: {list(wanted - found)[:3]}"
        assert set(found) == set(wanted), f"there are points that nobody logged: {list(set(found) - set(wanted))[:3]}"
        repeated = len(found - wanted)
        assert repeated <= run.possible_duplicates, (
            f"{repeated} points are there twice, and the report counts {run.possible_duplicates} possible duplicates"
        )


class ErrorChecks(ContractFixtures):
    """What fails is tried again or rejected, and every record has one outcome."""

    def test_transient_errors_lose_nothing(self, kit: Kit) -> None:
        """``write`` fails twice before it stores anything.

        Nothing is lost, and the lane calls ``write`` exactly two extra times.
        """
        errors = [TransientError("not now"), TransientError("still not", retry_after_s=0.01)]
        self._check_errors(kit, errors, "two transient errors")

    def test_unknown_errors_lose_nothing(self, kit: Kit) -> None:
        """An error of another type than the SPI's is tried again like a transient one."""
        self._check_errors(kit, [RuntimeError("a defect"), OSError("no route to host")], "two unknown errors")

    def _check_errors(self, kit: Kit, errors: Sequence[Exception], what: str) -> None:
        rig = kit.rig(proxy=FaultyBackend(before=errors)).start()
        rig.log(_SITE, series("loss", range(25)))
        rig.finish()
        check_run(rig, [_SITE], what)
        assert rig.proxy.attempts == len(rig.proxy.batches) + len(errors), (
            f"write() failed although the kit injected no fault: {rig.proxy.failures[:1]}"
        )

    def test_permanent_error_takes_only_its_records(self, kit: Kit) -> None:
        """Records that can never be stored are rejected one by one. Their neighbours in the same batch are stored."""
        poison = [3, 4, 17]
        rig = kit.rig(proxy=FaultyBackend(poison=poison)).start()
        rig.log(_SITE, series("loss", range(25)))
        rig.finish()
        self._check_without(rig, poison, {"permanent_error": len(poison)})

    def test_reported_rejections_are_counted(self, kit: Kit) -> None:
        """Records that ``write`` reports as rejected are counted under the reason that it gave."""
        rejected = [0, 9, 24]
        rig = kit.rig(proxy=FaultyBackend(rejected=rejected)).start()
        rig.log(_SITE, series("loss", range(25)))
        rig.finish()
        self._check_without(rig, rejected, {"reported": len(rejected)})

    def test_records_of_a_newer_trackhub_are_rejected(self, kit: Kit) -> None:
        """Records of kinds that this trackhub does not know, or that the backend does not claim, are rejected.

        They are counted. Their neighbours are stored, and nothing fails.
        """
        newer = Call(FuturePayload("clip", "of a newer trackhub"))
        rig = kit.rig().start()
        rig.log(_SITE, [*series("loss", range(5)), newer, Call(Text("log", "words"), 5), *series("more", range(5))])
        rig.finish()
        check_run(rig, [_SITE], "records of kinds that nobody here knows, or that are not claimed")
        assert not rig.proxy.failures, f"the backend failed: {rig.proxy.failures[0]!r}"

    def test_payloads_that_write_does_not_know_are_rejected(self, kit: Kit) -> None:
        """``write`` rejects a payload of a class that it does not know, and its neighbours are stored.

        ``write`` gets such a payload if the backend claims too many kinds, such as all kinds of a newer trackhub.
        """
        unknown = [4, 11]
        rig = kit.rig(proxy=FaultyBackend(future=unknown)).start()
        rig.log(_SITE, series("loss", range(25)))
        rig.finish()
        run = rig.run(_SITE)
        hint = (
            "write() must reject a payload of a class that it does not know: raise PermanentError, or return "
            "WriteReport([Rejection(entry.position, 'unsupported_kind')])"
        )
        assert "backend_error" not in run.rejected, f"{hint}. It raised {run.last_error}"
        assert (sum(run.rejected.values()), run.pending) == (len(unknown), 0), f"{hint}. The report says {run}"
        self._check_stored_without(rig, unknown)

    def test_any_order_as_declared(self, kit: Kit) -> None:
        """If the backend claims ``any_order``, records that come after later ones are stored like all others."""
        can = kit.capabilities()
        if not can.any_order:
            return
        assert not can.redelivery.needs_order, (
            f"any_order has no effect with redelivery={can.redelivery.value!r}; leave it out"
        )
        rig = kit.rig(proxy=FaultyBackend(late=[3, 4, 17])).start()
        rig.log(_SITE, series("loss", range(25)))
        rig.finish()
        check_run(rig, [_SITE], "records 3, 4 and 17 came after record 24; leave any_order out if that is a problem")

    def test_files_beside_as_declared(self, kit: Kit) -> None:
        """If the backend claims ``files_beside``, a second thread writes the files that it names, and all is stored."""
        can = kit.capabilities()
        if not can.files_beside:
            return
        assert not can.redelivery.needs_order, (
            f"files_beside has no effect with redelivery={can.redelivery.value!r}; leave it out"
        )
        files = {Kind.IMAGE, Kind.ARTIFACT}
        assert can.files_beside <= can.kinds & files, (
            "files_beside may name only images and artifacts, and only if they are in capabilities.kinds"
        )
        rig = kit.rig().start()
        for number in range(10):
            logged = [artifact(f"file-{number}", bytes([number]) * 1000)] if Kind.ARTIFACT in can.kinds else []
            logged += [image(f"image-{number}", number, shade=number)] if Kind.IMAGE in can.kinds else []
            rig.log(_SITE, [*series(f"loss-{number}", range(20)), *logged])
        rig.finish()
        check_run(rig, [_SITE], "a second thread wrote the files; leave files_beside out if that is a problem")

    def test_batches_are_as_large_as_declared(self, kit: Kit) -> None:
        """No batch is larger than ``max_batch``. A batch of that size, or of 1,000 records if that is less, is stored.

        The quick kit stores at most 250 records in place of 1,000.
        """
        rig = kit.rig().start()
        size = min(rig.can.max_batch, 250 if kit.is_quick else 1000)
        rig.log(_SITE, series("loss", range(size)))
        rig.log(_SITE, series("loss", range(size, size + 7), scale=2.0))
        rig.finish()
        assert max(rig.proxy.batches) <= rig.can.max_batch
        check_run(rig, [_SITE], f"a batch of {size} records")

    def _check_without(self, rig: ReceiverRig, positions: list[int], rejected: dict[str, int]) -> None:
        run = rig.run(_SITE)
        assert (run.rejected, run.pending) == (rejected, 0), f"the report says {run}"
        self._check_stored_without(rig, positions)

    def _check_stored_without(self, rig: ReceiverRig, positions: list[int]) -> None:
        kept = [call for position, call in enumerate(rig.logged[_SITE]) if position not in positions]
        wanted, found = expect(kept, rig.can, self).held, rig.read(_SITE)
        assert _points(self, found.points) == _points(self, wanted.points), (
            "the neighbours of rejected records are not stored as they must be"
        )


class OutageChecks(ContractFixtures):
    """An outage of the store loses nothing. With and without an outage, every call returns in time."""

    def test_outage_loses_nothing(self, kit: Kit) -> None:
        """The store is unavailable for a part of the job. What counts as delivered is there.

        It is there only once, unless the backend declares ``at_least_once``.
        """
        rig = kit.rig().start()
        rig.log(_SITE, series("loss", range(10)))
        rig.settle(_SITE)
        outage = self.outage(rig.context)
        outage.begin()
        try:
            for number in range(4):
                rig.log(_SITE, series("loss", range(10 * number, 10 * number + 10), scale=2.0 + number))
            rig.wait_for(_SITE, lambda run: bool(rig.proxy.failures) or run.pending == 0, timeout_s=5.0)
            # A backend may raise PermanentError. The lane then halves the batch until one record is left.
            rig.wait_for(_SITE, lambda run: len(rig.proxy.failures) > _ATTEMPTS or run.pending == 0, timeout_s=1.0)
        finally:
            outage.end()
        rig.log(_SITE, series("loss", range(100, 110), scale=9.0))
        rig.finish()
        self._check(rig, "an outage in the middle of the job")

    def test_probe_as_declared(self, kit: Kit) -> None:
        """If the backend claims ``probe``, ``probe`` stores nothing, and fails in an outage if ``write`` does."""
        can = kit.capabilities()
        if not can.probe:
            return
        rig = kit.rig(proxy=FaultyBackend(probing=True)).start()
        rig.log(_SITE, series("loss", range(10)))
        rig.settle(_SITE)
        while_well = list(rig.proxy.probes)
        outage = self.outage(rig.context)
        outage.begin()
        try:
            rig.log(_SITE, series("loss", range(10), scale=2.0))
            rig.wait_for(_SITE, lambda run: bool(rig.proxy.failures) or run.pending == 0, timeout_s=5.0)
            rig.wait_for(_SITE, lambda run: len(rig.proxy.failures) > 1 or run.pending == 0, timeout_s=1.0)
        finally:
            outage.end()
        rig.finish()
        assert all(succeeded for _, succeeded in while_well), "probe() failed although the store was well"
        after_failures = [succeeded for is_stored, succeeded in rig.proxy.probes if not is_stored]
        assert not any(after_failures[:1]), (
            "the store was unavailable and write() failed, but probe() succeeded. With such a probe, the lane would "
            "reject good records. Let probe() test the same place in the same way as write(), or leave it out"
        )
        self._check(rig, "tests of the store between its records")

    def test_end_is_bounded_in_an_outage(self, kit: Kit) -> None:
        """The store stays away. The job ends at its deadline, every call returns, and a later replay delivers."""
        rig = kit.rig().start()
        rig.log(_SITE, series("loss", range(10)))
        rig.settle(_SITE)
        outage = self.outage(rig.context)
        outage.begin()
        try:
            rig.log(_SITE, series("loss", range(10, 40), scale=2.0))
            started = time.monotonic()
            deadline_s = 1.0
            rig.finish(deadline_s=deadline_s)
            took_s = time.monotonic() - started
            hung = rig.is_hung()
        finally:
            outage.end()
        assert took_s < deadline_s + self.patience_s, f"the end took {took_s:.0f} s, its deadline was {deadline_s:g} s"
        assert not hung, f"a call of the backend did not return within {self.patience_s:g} s after the deadline"
        again = kit.again(rig)
        again.finish()
        self._check(again, "an outage that lasted beyond the end of the job, and a replay")

    def test_finish_returns(self, kit: Kit) -> None:
        """``finish`` and ``close`` return when nothing is wrong."""
        rig = kit.rig().start()
        for site in (_SITE, "site-2"):
            rig.log(site, series("loss", range(5)))
        rig.finish(deadline_s=self.patience_s)
        assert not rig.is_hung(), f"a call of the backend did not return within {self.patience_s:g} s"
        assert rig.run(_SITE).state == "finished", f"the run was not finished: {rig.run(_SITE)}"

    def _check(self, rig: ReceiverRig, what: str) -> None:
        if rig.can.redelivery is not Redelivery.AT_LEAST_ONCE:
            check_run(rig, [_SITE], what)
            return
        wanted = _points(self, expect(rig.logged[_SITE], rig.can, self).held.points)
        lost = wanted - _points(self, rig.read(_SITE).points)
        assert not lost, f"after {what}, points are missing: {list(lost)[:3]}"


class VolumeChecks(ContractFixtures):
    """Many records."""

    def test_volume(self, kit: Kit) -> None:
        """Ten thousand points of several metrics arrive, each once. The quick kit sends a thousand."""
        total = 1000 if kit.is_quick else 10_000
        rig = kit.rig().start()
        keys = [f"metric-{number}" for number in range(5)]
        for start in range(0, total, 500):
            rig.log(_SITE, [metric(keys[n % 5], n / 8, n // 5) for n in range(start, start + 500)])
        rig.finish(deadline_s=4 * self.deadline_s)
        check_run(rig, [_SITE], f"{total} points")


def _journal(kit: Kit) -> ReceiverRig:
    """Return a finished receiver that only filled its journal."""
    rig = kit.rig(deliver=False).start()
    rig.log(_SITE, series("loss", range(_TOTAL)))
    rig.finish()
    return rig


def _points(hooks: ContractHooks, points: Iterable[Point]) -> Counter[str]:
    """Count each point. Ignore the fields that the store does not return."""
    hidden = [name.removeprefix("points.") for name in hooks.cannot_tell if name.startswith("points.")]
    return counted(points, hidden)
