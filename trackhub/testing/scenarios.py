# SPDX-License-Identifier: Apache-2.0
"""One job with many sites, each of which logs what one test looks at: a receiver is started once for all of them.

Tests that only ask whether what was logged is in the store add a *scenario*; the gallery delivers all of them through
one receiver, reads each run back, and a test then judges its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from trackhub.run import RunStatus
from trackhub.spi import Capabilities
from trackhub.testing.author import ContractHooks
from trackhub.testing.comparison import check_held
from trackhub.testing.expectation import Expected, expect
from trackhub.testing.log_calls import Call
from trackhub.testing.readback import ReadBack
from trackhub.testing.receiver_rig import KitRig

__all__ = ["Gallery", "Shown", "check_run", "scenario"]

Scenario = Callable[[], Sequence[Call]]
_SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str) -> Callable[[Scenario], Scenario]:
    """Add a function that gives the calls of one site; ``name`` says what they show, and is the site's name."""

    def add(function: Scenario) -> Scenario:
        _SCENARIOS[name] = function
        return function

    return add


class Shown:
    """What became of one scenario.

    Attributes:
        name: of the scenario.
        calls: what was logged, times filled in.
        expected: what must have become of it.
    """

    def __init__(self, name: str, rig: KitRig, hooks: ContractHooks) -> None:
        """Read the run back; an error in that is kept for the test that asks."""
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
        """What the store holds. Raises what reading it raised."""
        if isinstance(self._found, AssertionError):
            raise self._found
        return self._found

    def check(self) -> ReadBack:
        """Check that the store holds exactly what it must, and that the report says so; return what it holds."""
        run = self._rig.run(self.name)
        what = f"the calls of scenario {self.name!r}"
        rejected = dict(self.expected.rejected)
        error = f" The last error was: {run.last_error}" if run.last_error else ""
        assert run.pending == 0, f"after {what}, {run.pending} records are still pending.{error}"
        assert run.rejected == rejected, f"after {what}, the report has rejected {run.rejected}, not {rejected}.{error}"
        assert run.confirmed == self.expected.confirmed, f"after {what}, {run.confirmed} are confirmed.{error}"
        check_held(self.expected.held, self.found, self._hooks, self.can, what)
        return self.found


class Gallery:
    """All scenarios, delivered.

    Attributes:
        can: what the backend claims.
    """

    def __init__(self, hooks: ContractHooks, root: Path, store: Path) -> None:
        """Deliver them, and read all of them back."""
        rig = KitRig(hooks, root, hooks.options(store), job="gallery").start()
        try:
            for name, calls in _SCENARIOS.items():
                rig.log(name, calls())
            rig.finish(RunStatus.FINISHED)
        finally:
            rig.close()
        self.can = rig.can
        self._shown = {name: Shown(name, rig, hooks) for name in _SCENARIOS}

    def __getitem__(self, name: str) -> Shown:
        return self._shown[name]


def check_run(rig: KitRig, hooks: ContractHooks, sites: Iterable[str], what: str) -> None:
    """Check that all that these sites logged is confirmed and in the store, once.

    Raises:
        AssertionError: it is not; the message says what is wrong.
    """
    for site in sites:
        expected = expect(rig.logged[site], rig.can, hooks)
        run = rig.run(site)
        counts = {"confirmed": run.confirmed, "rejected": run.rejected, "pending": run.pending}
        wanted = {"confirmed": expected.confirmed, "rejected": dict(expected.rejected), "pending": 0}
        error = f"; the last error was: {run.last_error}" if run.last_error else ""
        assert counts == wanted, f"after {what}, the report of {site} says {counts}, not {wanted}{error}"
        check_held(expected.held, rig.read(site), hooks, rig.can, what)
