# SPDX-License-Identifier: Apache-2.0
"""All that a backend plugin imports: the classes to subclass, what they receive, and what they return or raise.

A backend is a class named by an entry point in the group ``trackhub.backends``::

    class Acme(Backend):
        spi = 1                                            # the version of this interface
        Options = AcmeOptions                              # a msgspec.Struct with forbid_unknown_fields
        capabilities = Capabilities(kinds=frozenset({Kind.METRICS}))

        def open_run(self, info: RunInfo) -> BackendRun: ...

The core does the rest, the same for every backend: it decodes and orders the records, keeps what is not yet delivered
on disk, retries with backoff, refuses what ``capabilities`` do not claim, and counts every outcome. All methods of a
backend and its runs are called from one thread, the backend's lane; none is ever called from a training thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

import msgspec

from trackhub.errors import BackendError, ConfigError, InvalidOptionError, PermanentError, TransientError
from trackhub.records import Artifact, Blob, Histogram, Image, Kind, Metrics, Params, Payload, Table, Tags, Text
from trackhub.run import FEDERATION, SERVER, RunInfo, RunKey, RunStatus, Side, path_component

__all__ = [
    "FEDERATION",
    "SERVER",
    "SPI_VERSION",
    "Artifact",
    "Backend",
    "BackendContext",
    "BackendError",
    "BackendRun",
    "Blob",
    "Capabilities",
    "ConfigError",
    "Entry",
    "Histogram",
    "Image",
    "InvalidOptionError",
    "Kind",
    "Metrics",
    "NoOptions",
    "Params",
    "Payload",
    "PermanentError",
    "Redelivery",
    "Rejection",
    "Results",
    "RunInfo",
    "RunKey",
    "RunStatus",
    "Side",
    "Table",
    "Tags",
    "Text",
    "TransientError",
    "WriteReport",
    "path_component",
]

SPI_VERSION = 1
"""Version of this interface. A plugin built for another one is refused when it is loaded."""


class Redelivery(StrEnum):
    """What happens when records are handed over a second time after a crash."""

    IDEMPOTENT = "idempotent"
    """The store recognises them: writing a record again changes nothing."""
    RESUMABLE = "resumable"
    """The opened run says where it stands (``BackendRun.next_position``); the lane goes on from there."""
    REBUILD = "rebuild"
    """A run that was not finished is written anew from its first record; ``open_run`` replaces what is there."""
    AT_LEAST_ONCE = "at_least_once"
    """They are stored twice. The core counts them as possible duplicates."""


class Capabilities(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a backend can store, and how. Every default is the weak answer: claim what you have.

    The core acts on every field at run time, and the contract kit tests every field, claimed or not.

    Attributes:
        kinds: the payload kinds that ``write`` accepts. Records of other kinds are rejected as ``unsupported_kind``
            and never reach the backend.
        redelivery: what writing a record a second time does.
        nonfinite: whether NaN and infinities can be stored as metric values. If not, the core takes such values out
            of the record; a record of which nothing is left is rejected as ``nonfinite``.
        late_steps: whether a step lower than an earlier one of the same key can be stored. If not, such records are
            rejected as ``late_step``.
        optional_step: whether ``Entry.step`` may be None. If not, the core gives the ordinal of the record among that
            key's records without a step in its stream (0, 1, 2, ...). Params and tags never have a step.
        changing_params: whether a param may get another value later. If not, the core hands over the first value and
            rejects later different ones as ``param_changed``.
        max_key_chars: longest key that can be stored; None for no limit. The core shortens longer ones, ending in a
            hash of the whole key, so that two keys never become one.
        key_chars: the characters that a key may consist of, as the inside of a regular-expression class such as
            ``A-Za-z0-9_./ -``; empty for all. Others are escaped reversibly as ``_xHHHH_`` (the convention of
            ECMA-376 for names), so ``_``, ``x`` and hex digits must be allowed.
        max_batch: most records in one ``write``.
    """

    kinds: frozenset[Kind] = frozenset({Kind.METRICS})
    redelivery: Redelivery = Redelivery.AT_LEAST_ONCE
    nonfinite: bool = False
    late_steps: bool = False
    optional_step: bool = False
    changing_params: bool = False
    max_key_chars: int | None = 250
    key_chars: str = "A-Za-z0-9_"
    max_batch: int = 1000


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One record as a backend receives it.

    Attributes:
        position: its place in its run, counted from 0, the same whenever it is handed over. Positions rise within a
            run; they skip where a record was rejected by the core.
        time: unix seconds (UTC) at the log call. Store this time, not the time of arrival.
        step: >= 0; None only for params and tags, or when ``capabilities.optional_step``.
        round: the federated round, where known.
        payload: one of the kinds in ``capabilities.kinds``, keys already made acceptable.
        stream, seq: the writing process and the record's number in it: a globally unique identity.
    """

    position: int
    time: float
    step: int | None
    round: int | None
    payload: Payload
    stream: str
    seq: int


class Rejection(msgspec.Struct, frozen=True):
    """A record that this backend will never store.

    Attributes:
        position: ``Entry.position`` of the record.
        reason: a short stable name, counted in the delivery report (``too_large``, ``invalid_value``, ...).
        detail: what exactly was wrong, for the log.
    """

    position: int
    reason: str
    detail: str = ""


class WriteReport(msgspec.Struct, frozen=True):
    """What became of a batch of which not everything was stored. All entries that it does not name were stored."""

    rejected: Sequence[Rejection] = ()


class Results(msgspec.Struct, frozen=True):
    """How to look at a run: any of a URL, a path, and the command that opens it."""

    url: str | None = None
    path: str | None = None
    command: str | None = None


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a backend that has none."""


class BackendContext(msgspec.Struct, frozen=True):
    """Where a backend works.

    Attributes:
        workdir: folder for this backend's files, in the receiver's workspace; exists. Relative paths in options are
            relative to its parent, the job's run folder.
        job: the job that all runs of this backend belong to.
        side: where the receiver is.
    """

    workdir: Path
    job: str
    side: Side


class BackendRun:
    """One run being written. Subclass it; the lane opens it by ``Backend.open_run`` and calls it from one thread."""

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        """Store these entries, in this order.

        Returning confirms the batch, unless ``flush`` is overridden: then the batch counts as delivered when a later
        ``flush`` has returned. After an error the same entries are handed over again.

        Args:
            batch: 1 to ``capabilities.max_batch`` entries, positions rising.

        Returns:
            None when everything was stored, else which entries never will be.

        Raises:
            TransientError: try the same entries again later.
            PermanentError: something in the batch can never be stored.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement write(batch)")

    def flush(self) -> None:
        """Return when everything that was written survives a crash of this process and counts as delivered.

        Override it only if ``write`` buffers. Raises as ``write`` does.
        """

    def finish(self, status: RunStatus) -> None:
        """End the run: mark how it ended and release its resources. Called once, after the last ``flush``.

        Raises:
            TransientError: the lane tries again, until the deadline at the end of the job.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement finish(status)")

    def next_position(self) -> int:
        """Return the position after the last entry that the run already holds.

        Called once after ``open_run``, and only under ``Redelivery.RESUMABLE``; entries before it are skipped.
        """
        raise NotImplementedError(f"{type(self).__name__} claims to be resumable and must implement next_position()")


class Backend:
    """A tracking backend. Subclass it; one instance serves all runs of a receiver.

    Attributes:
        spi: version of the SPI that the plugin was written for. Write it out: the default is the installed one, and
            then a plugin that is too old is not recognised.
        Options: the msgspec Struct of its options, with ``forbid_unknown_fields``.
        capabilities: what it can store. Belongs on the class; an instance may replace it, where options decide. The
            lane reads it from the instance, after ``preflight``.
        contract: version of the contract kit that the plugin passed, 0 for none.
    """

    spi: ClassVar[int] = SPI_VERSION
    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    capabilities: Capabilities = Capabilities()
    contract: ClassVar[int] = 0

    def __init__(self, options: msgspec.Struct, context: BackendContext) -> None:
        """Keep the options; do no work that can fail or wait.

        Raises:
            InvalidOptionError: the options contradict each other.
        """
        self.options = options
        self.context = context

    def preflight(self) -> None:
        """Check before training starts that the backend can be used here: a login, a reachable server.

        Raises:
            ConfigError: it cannot, and somebody must change the configuration. This stops the job.
            TransientError: it cannot now, but may later. The job goes on, and the records wait.
        """

    def open_run(self, info: RunInfo) -> BackendRun:
        """Open this run, new or existing: the same ``info.run_id`` always means the same run.

        Raises:
            TransientError: try again later.
            PermanentError: this run cannot be opened; its records stay pending.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement open_run(info)")

    def results(self, info: RunInfo) -> Results | None:
        """Return how to look at a finished run, for the report and the last screen; None if there is no way."""
        return None

    def close(self) -> None:
        """Release what all runs share: end the job's parent run, stop the SDK's service.

        Called once, after the last call to any run, also when runs could not be finished. An error is logged, no more.
        """
