# SPDX-License-Identifier: Apache-2.0
"""What trackhub logs itself, beside what the job's code logs: context, system metrics, and FLARE's global model.

Both widgets take an `OwnRecords` as one of their arguments. `SiteRecords` logs at a client, through the site's own
writer, so that the site's policy holds. `ServerRecords` logs on the server, into the federation run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext

from trackhub.delivery import FederationRun, has_streams
from trackhub.flare.find_global_model import find_model
from trackhub.flare.log_job_context import check_context, log_context, with_federation, with_machine
from trackhub.plain_values_to_structs import convert
from trackhub.system_metrics import SystemMetrics, check_interval
from trackhub.writer.writer import Writer

__all__ = ["OwnRecords", "ServerRecords", "SiteRecords"]


class OwnRecords(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What trackhub logs itself.

    Attributes:
        context: how the job was made, as plain values by name. None logs no context.
        system_metrics: seconds between two measurements of a site's process and host. None measures nothing.
        log_model: which of FLARE's global models the federation run gets. None logs no model.
    """

    context: dict[str, Any] | None = None
    system_metrics: float | None = None
    log_model: Literal["best", "last"] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Self:
        """Return what a component's argument says.

        Raises:
            ConfigError: it has another form.
        """
        values = values or {}
        if isinstance(values, Mapping):
            check_context(values.get("context"))
            check_interval(values.get("system_metrics"))
        return convert(values, cls, "tracking")

    def plain(self) -> dict[str, Any] | None:
        """Return it as plain JSON values; None if all values are the defaults."""
        return msgspec.to_builtins(self) or None


class _LogsOwnRecords:
    """What `SiteRecords` and `ServerRecords` have in common: what to log, and where to warn."""

    def __init__(self, own: OwnRecords, component: FLComponent) -> None:
        """Log nothing yet.

        Args:
            own: what to log.
            component: the component in whose log warnings appear.
        """
        self._own = own
        self._component = component


class SiteRecords(_LogsOwnRecords):
    """Logs at a client: its context once, and system metrics while the job runs."""

    _metrics: SystemMetrics | None = None

    def start(self, writer: Callable[[], Writer], spool: Path, fl_ctx: FLContext) -> None:
        """Log the context, and begin to measure. Never raises.

        Args:
            writer: gives the site's writer.
            spool: the site's spool.
            fl_ctx: FLARE's context.
        """
        try:
            # FLARE may start a client process again. If there are streams, an earlier process has logged the context.
            if self._own.context is not None and not has_streams(spool):
                context = with_machine(self._own.context)
                log_context(context, writer().log_params, writer().set_tags)
            if self._own.system_metrics is not None:
                self._metrics = SystemMetrics(writer().log, self._own.system_metrics, spool)
                self._metrics.start()
        except Exception as e:
            self._component.log_exception(
                fl_ctx, f"tracking: this site's context or system metrics are not recorded: {e}", fire_event=False
            )

    def stop(self) -> None:
        """Stop measuring. Call it when the trainer has ended, and before the spool is closed."""
        if self._metrics is not None:
            self._metrics.stop()


class ServerRecords(_LogsOwnRecords):
    """Logs on the server into the federation run: the job's context when it starts, the global model when it ends.

    Attributes:
        has_begun: whether `begin` was called.
    """

    has_begun = False

    def begin(self, federation: FederationRun, fl_ctx: FLContext) -> None:
        """Log the context. Never raises."""
        self.has_begun = True
        if self._own.context is None:
            return
        try:
            context = with_federation(with_machine(self._own.context), fl_ctx)
            log_context(context, federation.log_params, federation.set_tags)
        except Exception as e:
            self._component.log_exception(fl_ctx, f"tracking: the job's context is not recorded: {e}", fire_event=False)

    def end(self, federation: FederationRun, fl_ctx: FLContext) -> None:
        """Log the model that FLARE's persistor has saved, or warn if there is none. Never raises."""
        if self._own.log_model is None:
            return
        try:
            found = find_model(self._own.log_model, fl_ctx)
            for file in found.files:
                with file.open() as content:
                    federation.log_file(content, file.key, "model")
            problem = found.problem
        except Exception as e:
            problem = f"{type(e).__name__}: {e}"
        if problem:
            self._component.log_warning(
                fl_ctx, f"log_model={self._own.log_model!r}: the federation run has no model: {problem}",
                fire_event=False,
            )  # fmt: skip
