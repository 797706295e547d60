# SPDX-License-Identifier: Apache-2.0
"""The contract: all groups in one class."""

from __future__ import annotations

from trackhub.spi import Backend, BackendRun
from trackhub.testing.checks.base import ContractBase, Kit
from trackhub.testing.checks.completeness import contract_problems, misspelt_methods
from trackhub.testing.checks.delivery import Confirmation, Errors, Outages
from trackhub.testing.checks.hygiene import Hygiene, Volume
from trackhub.testing.checks.lifecycle import Identity, LifeCycle
from trackhub.testing.checks.stored_records import Kinds, Names, Numbers, Steps
from trackhub.testing.log_calls import series

__all__ = ["BackendContract"]


class Guard(ContractBase):
    """The contract class itself."""

    def test_contract_is_whole(self) -> None:
        """No test of the kit is removed or replaced, except by one that is xfail for a reason; no hook is misspelt."""
        problems = list(contract_problems(type(self), BackendContract))
        assert not problems, "\n".join(problems)

    def test_no_method_is_misspelt(self, kit: Kit) -> None:
        """No method of the backend or its run is almost one of the SPI's."""
        rig = kit.rig().start()
        rig.log("site-1", series("loss", range(2)))
        rig.finish()
        problems = [
            *misspelt_methods([self.backend], Backend),
            *misspelt_methods({type(run) for run in rig.watch.runs}, BackendRun),
        ]
        assert not problems, "\n".join(problems)


class BackendContract(
    Guard, LifeCycle, Kinds, Names, Steps, Numbers, Identity, Confirmation, Errors, Outages, Hygiene, Volume
):
    """What every backend must do. Derive a class named ``Test…`` and give it what `ContractHooks` asks for.

    No test can be skipped. One that the backend cannot pass is overridden with a reason::

        @pytest.mark.xfail(reason="the store keeps 32-bit steps")
        def test_largest_step(self, gallery):
            super().test_largest_step(gallery)
    """
