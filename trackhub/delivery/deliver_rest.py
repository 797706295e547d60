# SPDX-License-Identifier: Apache-2.0
"""Delivers what is left at the end of a job, within one deadline. Ctrl-C skips the waits.

`Receiver.finish` calls it when no more batches come. It calls the federation run and the lanes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from trackhub.delivery.federation.federation_run import FederationRun
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.lane.lanes_of_receiver import EXTRA_S, Lanes
from trackhub.job_and_run_info import RunStatus

__all__ = ["deliver_rest"]

_FEDERATION_SHARE = 0.25  # of the time at the end of the job, for the last records of the federation run


def deliver_rest(
    journal: Journal,
    lanes: Lanes,
    federation: FederationRun | None,
    by_site: Mapping[str, RunStatus],
    otherwise: RunStatus,
    deadline_s: float,
) -> None:
    """Deliver what the journal has, and end the runs. Blocks as `Receiver.finish` says.

    An exception of a signal handler, such as Ctrl-C, skips the waits: the runs end at once, and then it is raised.

    Args:
        journal: the receiver's journal.
        lanes: its lanes.
        federation: its federation run, if it has one.
        by_site: site -> the status of its run.
        otherwise: the status of the runs whose sites are not in ``by_site``.
        deadline_s: the longest time for all lanes together, in seconds.
    """

    def deliver(within_s: float) -> None:
        deadline = time.monotonic() + within_s
        # A lane must stop waiting for a locked journal before `join` gives up, or the lane would count as hanging.
        journal.limit_waits(deadline + EXTRA_S / 2)
        if federation is not None:  # before the lanes look for the last time
            federation.finish(max(EXTRA_S, within_s * _FEDERATION_SHARE))
        lanes.end(by_site, otherwise, deadline - time.monotonic())

    try:
        deliver(deadline_s)
    except BaseException:
        deliver(0.0)
        raise
