# SPDX-License-Identifier: Apache-2.0
"""The contract: all checks in one class. The author of a backend derives a class from it, which pytest runs."""

from __future__ import annotations

from trackhub.spi import Backend, BackendRun
from trackhub.testing.checks.declarations import DeclarationChecks
from trackhub.testing.checks.delivery import ConfirmationChecks, ErrorChecks, OutageChecks, VolumeChecks
from trackhub.testing.checks.detect_disabled_checks import contract_problems, misspelt_methods
from trackhub.testing.checks.fixtures import Kit
from trackhub.testing.checks.keys_stay_apart import KeyChecks
from trackhub.testing.checks.leftovers import LeftoverChecks
from trackhub.testing.checks.run_endings import LifecycleChecks
from trackhub.testing.checks.runs_stay_apart import IdentityChecks
from trackhub.testing.checks.stored_records import KindChecks, NumberChecks, StepChecks
from trackhub.testing.sample_calls_and_requests import series

__all__ = ["BackendContract"]


class BackendContract(
    DeclarationChecks,
    LifecycleChecks,
    KindChecks,
    KeyChecks,
    StepChecks,
    NumberChecks,
    IdentityChecks,
    ConfirmationChecks,
    ErrorChecks,
    OutageChecks,
    LeftoverChecks,
    VolumeChecks,
):
    """What every backend must do. Derive a class named ``Test...``, and give it what `ContractHooks` asks for.

    No check can be skipped. Override one that the backend cannot pass, and say why::

        @pytest.mark.xfail(reason="the store keeps 32-bit steps")
        def test_largest_step(self, scenarios):
            super().test_largest_step(scenarios)
    """

    def test_contract_is_whole(self) -> None:
        """The contract class removes no check, replaces one only by an xfail with a reason, and misspells no hook."""
        problems = list(contract_problems(type(self), BackendContract))
        assert not problems, "\n".join(problems)

    def test_no_method_is_misspelt(self, kit: Kit) -> None:
        """The backend and its runs have no misspelt SPI method: no name that is almost an SPI name."""
        rig = kit.rig().start()
        rig.log("site-1", series("loss", range(2)))
        rig.finish()
        problems = [
            *misspelt_methods([self.backend], Backend),
            *misspelt_methods({type(run) for run in rig.proxy.runs}, BackendRun),
        ]
        assert not problems, "\n".join(problems)
