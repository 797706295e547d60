# SPDX-License-Identifier: Apache-2.0
"""The options of the W&B backend."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

__all__ = ["WandBOptions"]

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=3600)]


class WandBOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how runs are written. What is left out is read from the receiver's ``WANDB_*`` environment.

    Attributes:
        mode: ``online`` needs a login on the receiver's machine; ``offline`` writes files for ``wandb sync``. Left out:
            ``WANDB_MODE``, else online if a login is found there, else offline, which is logged before training.
        project: W&B project; left out: ``WANDB_PROJECT``, else ``trackhub``.
        entity: user or team that owns the project; left out: ``WANDB_ENTITY``, else the login's default.
        group: W&B group of all sites' runs; left out: ``WANDB_RUN_GROUP``, else the job's id.
        job_type: W&B job type of the runs; left out: ``WANDB_JOB_TYPE``, else none.
        notes: a description, in Markdown, shown on the run's page; left out: ``WANDB_NOTES``.
        tags: tags that every run gets, beside those that are logged; left out: ``WANDB_TAGS``.
        base_url: the W&B server; left out: ``WANDB_BASE_URL``, else https://api.wandb.ai.
        api_key: a reference such as ``${secret:WANDB_KEY_HOSPITAL}``; left out: the receiver's ``WANDB_API_KEY`` or netrc.
        step_metric: the key under which the step of a log call is stored, and the default x axis of all charts.
        round_metric: the key under which the federated round is stored, another x axis to choose.
        upload_interval_s: seconds between uploads of a run's rows, at least 1: the SDK takes less for a mistake, and
            then uses its default of 15 s (wandb 0.31), which is half of the time that a job waits at its end.
        init_timeout_s: longest time to wait for the server when a run is opened.
        flush_timeout_s: longest time that one confirmation waits for the server; then it is tried again later.
        finish_timeout_s: longest time to wait for the server when a run is ended.
        settings: further fields of ``wandb.Settings``, for special set-ups (proxies, certificates, ...).
    """

    mode: Literal["online", "offline"] | None = None
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    notes: str | None = None
    tags: list[str] = []
    base_url: str | None = None
    api_key: str | None = None
    step_metric: str = "step"
    round_metric: str = "round"
    upload_interval_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 2.0
    init_timeout_s: _Seconds = 10.0
    flush_timeout_s: _Seconds = 10.0
    finish_timeout_s: _Seconds = 5.0
    settings: dict[str, Any] = {}

    def __repr__(self) -> str:
        """Show what is set, except the key: a traceback or log line must not hold it."""
        fields = ((name, getattr(self, name)) for name in self.__struct_fields__)
        shown = (f"{name}={'***' if name == 'api_key' else repr(value)}" for name, value in fields if value)
        return f"{type(self).__name__}({', '.join(shown)})"
