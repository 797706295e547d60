# SPDX-License-Identifier: Apache-2.0
"""The options of the W&B backend. The core builds them from a job's flags, TOML or Python."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from trackhub.spi import InvalidOptionError, OptionMark
from trackhub_wandb.naming import RESERVED_AS

__all__ = ["WandBOptions"]

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class WandBOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how the backend writes runs. Values that are left out come from the receiver's ``WANDB_*`` variables.

    Attributes:
        mode: ``online`` needs a login on the receiver's machine. ``offline`` writes files for ``wandb sync``. Left out:
            ``WANDB_MODE``. Without that variable: online if there is a login, otherwise offline with a warning.
        project: the W&B project. Left out: ``WANDB_PROJECT``, else ``trackhub``.
        entity: the user or team that owns the project. Left out: ``WANDB_ENTITY``, else the login's default.
        group: the W&B group of all sites' runs. Left out: ``WANDB_RUN_GROUP``, else the job's unique name.
        job_type: the W&B job type of the runs. Left out: ``WANDB_JOB_TYPE``, else none.
        notes: a description in Markdown, shown on each run's page. Left out: the job's notes, else ``WANDB_NOTES``.
        tags: tags that every run gets beside the job's and those that are logged. Left out: ``WANDB_TAGS``.
        base_url: the W&B server. Left out: ``WANDB_BASE_URL``, else https://api.wandb.ai.
        api_key: a reference such as ``${secret:WANDB_KEY_HOSPITAL}``. Left out: ``WANDB_API_KEY``, else the netrc file.
        step_metric: the column that holds the step of a log call. It is the default x axis of all charts.
        round_metric: the column that holds the federated round. It is another x axis to choose.
        upload_interval_s: seconds between uploads of a run's rows, at least 1. The SDK ignores a lower value and uses
            its default of 15 s (wandb 0.31). That is half of the time that a job waits at its end.
        init_timeout_s: longest wait for the server when a run is opened.
        flush_timeout_s: longest wait for the server in one confirmation. The lane tries again later.
        finish_timeout_s: longest wait for the server when a run is ended.
        settings: further fields of ``wandb.Settings`` for special set-ups, such as proxies and certificates.
    """

    mode: Literal["online", "offline"] | None = None
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: list[str] = []
    base_url: Annotated[str | None, OptionMark.HOST] = None
    api_key: Annotated[str | None, OptionMark.SECRET] = None
    step_metric: str = "step"
    round_metric: str = "round"
    upload_interval_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 2.0
    init_timeout_s: _Seconds = 10.0
    flush_timeout_s: _Seconds = 10.0
    finish_timeout_s: _Seconds = 5.0
    # A proxy is a host, and a certificate is a file.
    settings: Annotated[dict[str, Any], OptionMark.HOST, OptionMark.PATH] = {}

    def __post_init__(self) -> None:
        """Check the names of the columns.

        Raises:
            InvalidOptionError: W&B or this backend uses the name itself, or both columns have one name.
        """
        for name, column in (("step_metric", self.step_metric), ("round_metric", self.round_metric)):
            if not column or column.startswith(("_", RESERVED_AS)) or "*" in column:
                raise InvalidOptionError(
                    f"{name} {column!r} cannot be a column; choose a name that is not empty, has no * and does "
                    f"not begin with _ or {RESERVED_AS}"
                )
        if self.step_metric == self.round_metric:
            raise InvalidOptionError(
                f"round_metric {self.round_metric!r} is the name of step_metric too; choose another one"
            )

    def __repr__(self) -> str:
        """Show what is set, except the key, which no traceback or log line may hold."""
        fields = ((name, getattr(self, name)) for name in self.__struct_fields__)
        shown = (f"{name}={'***' if name == 'api_key' else repr(value)}" for name, value in fields if value)
        return f"{type(self).__name__}({', '.join(shown)})"
