# SPDX-License-Identifier: Apache-2.0
"""Scenarios: what one site logs, so that a check can look at what became of it.

One receiver delivers all scenarios in one job, one site for each, since starting a receiver takes long. A module of
checks adds its scenarios with `scenario`. A check takes its own from the fixture ``scenarios``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from trackhub.job_and_run_info import RunStatus
from trackhub.spi import Capabilities
from trackhub.testing.comparison import check_held
from trackhub.testing.contract_hooks import ContractHooks
from trackhub.testing.expectation import Expected, expect
from trackhub.testing.readback import ReadBack
from trackhub.testing.receiver_rig import ReceiverRig
from trackhub.testing.sample_calls_and_requests import Call, new_job

__all__ = ["DeliveredScenario", "DeliveredScenarios", "check_run", "scenario"]

Scenario = Callable[[], Sequence[Call]]
_SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str) -> Callable[[Scenario], Scenario]:
    """Add a function that returns the calls of one site. The name says what they show; the site has the same name."""

    def add(function: Scenario) -> Scenario:
        _SCENARIOS[name] = function
        return function

    return add


class DeliveredScenario:
    """What became of one scenario.

    Attributes:
        name: the scenario's name.
        can: what the backend claims.
        calls: what was logged, times filled in.
        expected: what must have become of it.
    """

    def __init__(self, name: str, rig: ReceiverRig, hooks: ContractHooks) -> None:
        """Read the run back. If that fails, the error is kept, and raised when a check asks for the result.

        Args:
            name: the scenario's name.
            rig: the finished receiver that delivered it.
            hooks: the contract class.
        """
        self.name = name
        self.can: Capabilities = rig.can
        self.calls = [call for _, call in rig.logged[name]]
        self.expected: Expected = expect(rig.logged[name], rig.can, hooks)
        self._rig = rig
        self._hooks = hooks
        self._found: ReadBack | AssertionError
        try:
            self._found = rig.read(name)
        except AssertionError as error:
            self._found = error

    @property
    def found(self) -> ReadBack:
        """What the store holds.

        Raises:
            AssertionError: it could not be read.
        """
        if isinstance(self._found, AssertionError):
            raise self._found
        return self._found

    def check(self) -> ReadBack:
        """Check that the store holds exactly what it must, and that the report says so. Return what it holds.

        Raises:
            AssertionError: the store or the report is wrong. The message says what is wrong.
        """
        run = self._rig.run(self.name)
        what = f"the calls of scenario {self.name!r}"
        rejected = dict(self.expected.rejected)
        error = f" The last error was: {run.last_error}" if run.last_error else ""
        assert run.pending == 0, f"after {what}, {run.pending} records are still pending.{error}"
        assert run.rejected == rejected, f"after {what}, the report has rejected {run.rejected}, not {rejected}.{error}"
        assert run.confirmed == self.expected.confirmed, f"after {what}, {run.confirmed} are confirmed.{error}"
        check_held(self.expected.held, self.found, self._hooks, self.can, what)
        return self.found


class DeliveredScenarios:
    """All scenarios, delivered and read back."""

    def __init__(self, hooks: ContractHooks, root: Path, store: Path) -> None:
        """Deliver them. Blocks for the seconds that this takes.

        Args:
            hooks: the contract class.
            root: the job's run folder.
            store: the folder for ``options``.

        Raises:
            AssertionError: the backend broke a rule, so that no check can pass.
        """
        rig = ReceiverRig(hooks, root, hooks.options(store), job=new_job())
        try:
            rig.start()
            for name, calls in _SCENARIOS.items():
                rig.log(name, calls())
            rig.finish(RunStatus.FINISHED)
        finally:
            rig.close()
        self._delivered = {name: DeliveredScenario(name, rig, hooks) for name in _SCENARIOS}

    def __getitem__(self, name: str) -> DeliveredScenario:
        return self._delivered[name]


def check_run(rig: ReceiverRig, sites: Iterable[str], what: str) -> None:
    """Check that all that these sites logged is confirmed and in the store, once.

    Args:
        rig: the finished receiver.
        sites: whose runs to check.
        what: what happened, for the message.

    Raises:
        AssertionError: something is missing, or there twice. The message says what is wrong.
    """
    for site in sites:
        expected = expect(rig.logged[site], rig.can, rig.hooks)
        run = rig.run(site)
        counts = {"confirmed": run.confirmed, "rejected": run.rejected, "pending": run.pending}
        wanted = {"confirmed": expected.confirmed, "rejected": dict(expected.rejected), "pending": 0}
        error = f"; the last error was: {run.last_error}" if run.last_error else ""
        assert counts == wanted, f"after {what}, the report of {site} says {counts}, not {wanted}{error}"
        check_held(expected.held, rig.read(site), rig.hooks, rig.can, what)
