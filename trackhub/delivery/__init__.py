# SPDX-License-Identifier: Apache-2.0
"""Carries records from a site's spool to a receiver and on to the backends: the public interface for a transport.

A transport connects the two ends, the sender and the receiver, in a system such as FLARE, Flower, Ray, MPI or a web
service. Neither end knows which system that is. ``docs/receiver-api.md`` shows a whole transport over HTTP.

At a site::

    create_spool(folder, SpoolInfo(site="site-1", job="job-1", cursors=("server",)))
    sender = Sender(folder, channel)            # channel(request, timeout_s) -> reply, or raises ChannelError
    sender.start()
    ...                                         # training code logs with trackhub.Writer(folder)
    sender.close(timeout_s=30)

At the receiver::

    receiver = Receiver(run_dir, job="job-1", side=Side.SERVER, backends={"tensorboard": {}})
    receiver.start()
    reply = receiver.handle(site, request)      # for each request; the transport has verified the site
    receiver.wait_for_sites(["site-1", "site-2"])
    report = receiver.finish(RunStatus.FINISHED)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackhub.delivery.channel import Channel, ChannelError
    from trackhub.delivery.federation.federation_run import FederationOptions, FederationRun
    from trackhub.delivery.journal.find_journals_and_spools import find_interrupted
    from trackhub.delivery.journal.prune import prune_older
    from trackhub.delivery.receiver import Receiver
    from trackhub.delivery.report import DeliveryReport, RunReport, SiteReport, read_report
    from trackhub.delivery.report_text import format_report, format_results
    from trackhub.delivery.sender import Sender
    from trackhub.delivery.wire import MAX_REQUEST_BYTES, SiteCounts, refusal
    from trackhub.job_and_run_info import SERVER, JobInfo, RunStatus, Side
    from trackhub.limits import Limits
    from trackhub.spool.announce_spool import (
        SPOOL_ENV,
        announce_to_children,
        set_process_spool,
        spool_env,
        withdraw_process_spool,
    )
    from trackhub.spool.layout import (
        SpoolInfo,
        close_spool,
        create_spool,
        create_spool_anywhere,
        has_streams,
        read_spool_info,
    )

__all__ = [
    "MAX_REQUEST_BYTES",
    "SERVER",
    "SPOOL_ENV",
    "Channel",
    "ChannelError",
    "DeliveryReport",
    "FederationOptions",
    "FederationRun",
    "JobInfo",
    "Limits",
    "Receiver",
    "RunReport",
    "RunStatus",
    "Sender",
    "Side",
    "SiteCounts",
    "SiteReport",
    "SpoolInfo",
    "announce_to_children",
    "close_spool",
    "create_spool",
    "create_spool_anywhere",
    "find_interrupted",
    "format_report",
    "format_results",
    "has_streams",
    "prune_older",
    "read_report",
    "read_spool_info",
    "refusal",
    "set_process_spool",
    "spool_env",
    "withdraw_process_spool",
]

_MODULES = {
    "trackhub.delivery.channel": ("Channel", "ChannelError"),
    "trackhub.delivery.federation.federation_run": ("FederationOptions", "FederationRun"),
    "trackhub.delivery.journal.find_journals_and_spools": ("find_interrupted",),
    "trackhub.delivery.journal.prune": ("prune_older",),
    "trackhub.delivery.receiver": ("Receiver",),
    "trackhub.delivery.report": ("DeliveryReport", "RunReport", "SiteReport", "read_report"),
    "trackhub.delivery.report_text": ("format_report", "format_results"),
    "trackhub.delivery.sender": ("Sender",),
    "trackhub.delivery.wire": ("MAX_REQUEST_BYTES", "SiteCounts", "refusal"),
    "trackhub.limits": ("Limits",),
    "trackhub.job_and_run_info": ("SERVER", "JobInfo", "RunStatus", "Side"),
    "trackhub.spool.layout": (
        "SpoolInfo",
        "close_spool",
        "create_spool",
        "create_spool_anywhere",
        "has_streams",
        "read_spool_info",
    ),
    "trackhub.spool.announce_spool": (
        "SPOOL_ENV",
        "announce_to_children",
        "set_process_spool",
        "spool_env",
        "withdraw_process_spool",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    So a site does not load SQLite, and ``trackhub status`` does not load the lanes.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
