# SPDX-License-Identifier: Apache-2.0
"""Deliver what a job left behind: continue a sink's lanes from its journal, after the job has ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from trackhub.config import Limits
from trackhub.delivery.journal_report import read_journal_meta
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport
from trackhub.errors import ConfigError
from trackhub.run import RunStatus, Side

__all__ = ["replay_journal"]


def replay_journal(
    journal: Path,
    *,
    backends: Mapping[str, Mapping[str, Any]] | None = None,
    timeout_s: float = 3600.0,
    limits: Limits | None = None,
) -> DeliveryReport:
    """Deliver what is pending in a journal, and return the new report. Blocks until all is delivered or time is up.

    Each lane goes on from its confirmed cursor. A backend that the job did not use gets the whole job. It may be
    interrupted, and called again.

    Args:
        journal: the sink's ``trackhub.db``. The job must have ended.
        backends: name to options; by default the ones of the job, with the options that the job gave.
        timeout_s: the longest time to try.
        limits: how much and how often.

    Raises:
        JournalError: it is no journal, or in use by a running job or another replay.
        ConfigError: a backend or an option is wrong, or a backend cannot be used as configured.
        PluginError: a backend's plugin cannot be used.
    """
    meta = read_journal_meta(journal)
    if backends is None:
        backends = msgspec.json.decode(meta.get("backends", "{}"), type=dict[str, dict[str, Any]])
    if not backends:
        raise ConfigError(f"{journal}: the job names no backend, so say which one to deliver to")
    folder = journal.parent
    receiver = Receiver(
        folder,
        folder.parent,
        job=meta["job"],
        side=Side(meta["side"]),
        backends=backends,
        limits=limits,
    )
    receiver.start()
    return receiver.finish(RunStatus(meta.get("status", RunStatus.FAILED)), deadline_s=timeout_s)
