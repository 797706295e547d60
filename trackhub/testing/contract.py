# SPDX-License-Identifier: Apache-2.0
"""The contract: all groups in one class."""

from __future__ import annotations

from trackhub.spi import Backend, BackendRun
from trackhub.testing.base import ContractBase, Kit
from trackhub.testing.calls import series
from trackhub.testing.group_delivery import Confirmation, Errors, Outages
from trackhub.testing.group_hygiene import Hygiene, Volume
from trackhub.testing.group_life import Identity, LifeCycle
from trackhub.testing.group_shape import Kinds, Names, Numbers, Steps
from trackhub.testing.guard import contract_problems, misspelt_methods

__all__ = ["BackendContract"]


class Guard(ContractBase):
    """The contract class itself."""

    def test_contract_is_whole(self) -> None:
        """No test of the kit is removed or replaced, except by one that is xfail for a reason; no hook is misspelt."""
        problems = list(contract_problems(type(self), BackendContract))
        assert not problems, "\n".join(problems)

    def test_no_method_is_misspelt(self, kit: Kit) -> None:
        """No method of the backend or its run is almost one of the SPI's."""
        sink = kit.sink().start()
        sink.log("site-1", series("loss", range(2)))
        sink.finish()
        problems = [
            *misspelt_methods([self.backend], Backend),
            *misspelt_methods({type(run) for run in sink.watch.runs}, BackendRun),
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
