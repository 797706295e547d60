# SPDX-License-Identifier: Apache-2.0
"""The contract kit: the checks that every backend has to pass.

The author of a backend derives one class::

    class TestAcme(BackendContract):
        backend = AcmeBackend

        def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack: ...

pytest runs the class, and so does ``trackhub check``. The kit needs the extra ``testing``.
``docs/writing-a-backend.md`` is the guide.
"""

from __future__ import annotations

import pytest

# This must run before these modules are imported. A failing `assert` in the kit then shows its values.
pytest.register_assert_rewrite(
    "trackhub.testing.checks",
    "trackhub.testing.contract",
    "trackhub.testing.receiver_rig",
    "trackhub.testing.scenario_delivery",
)

from trackhub.job_and_run_info import RunInfo, RunStatus  # noqa: E402
from trackhub.spi import Kind  # noqa: E402
from trackhub.testing.contract import BackendContract  # noqa: E402
from trackhub.testing.contract_hooks import ContractHooks, StoreContext  # noqa: E402
from trackhub.testing.readback import (  # noqa: E402
    ArtifactItem,
    HistogramItem,
    ImageItem,
    Point,
    ReadBack,
    TableItem,
    TextItem,
)
from trackhub.testing.store_outage import FolderOutage, Outage  # noqa: E402
from trackhub.testing.version import KIT_VERSION  # noqa: E402

__all__ = [
    "KIT_VERSION",
    "ArtifactItem",
    "BackendContract",
    "ContractHooks",
    "FolderOutage",
    "HistogramItem",
    "ImageItem",
    "Kind",
    "Outage",
    "Point",
    "ReadBack",
    "RunInfo",
    "RunStatus",
    "StoreContext",
    "TableItem",
    "TextItem",
]
