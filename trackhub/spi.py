# SPDX-License-Identifier: Apache-2.0
"""All that a backend plugin imports: the classes to subclass, what they receive, and what they return or raise.

A backend is a class that an entry point in the group ``trackhub.backends`` names::

    class Acme(Backend[AcmeOptions]):                      # AcmeOptions: a Struct with forbid_unknown_fields
        spi = 1                                            # the version of this interface
        capabilities = Capabilities(kinds=frozenset({Kind.METRICS}))

        def open_run(self, info: RunInfo) -> BackendRun: ...

The core does the rest, the same for every backend. It decodes and orders the records, and keeps on disk what is not
yet delivered. It retries with backoff, rejects what ``capabilities`` do not claim, and counts every outcome.

A *lane* hands records from the receiver's journal to one backend. Its thread calls all methods of the backend and its
runs, except the constructor. A second thread of the lane calls ``write`` with files, if ``capabilities.files_beside``
allows it. No training thread ever calls them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

import msgspec

from trackhub.conceal import remember_secret
from trackhub.errors import BackendError, ConfigError, InvalidOptionError, PermanentError, TransientError
from trackhub.image_header import BadImageError, ImageHeader, read_image_header
from trackhub.job_and_run_info import FEDERATION, SERVER, JobInfo, RunInfo, RunKey, RunStatus, Side, path_component
from trackhub.open_without_links import make_folder, open_file
from trackhub.records import (
    Artifact,
    Blob,
    Histogram,
    Image,
    Kind,
    Metrics,
    Params,
    Payload,
    Summary,
    Table,
    Tags,
    Text,
)
from trackhub.where_to_look import Results

__all__ = [
    "ANY_KEY",
    "FEDERATION",
    "SERVER",
    "SPI_VERSION",
    "Artifact",
    "Backend",
    "BackendContext",
    "BackendError",
    "BackendRun",
    "BadImageError",
    "Blob",
    "Capabilities",
    "ConfigError",
    "Confirmation",
    "ConfirmedBy",
    "Credentials",
    "Entry",
    "Histogram",
    "Image",
    "ImageHeader",
    "InvalidOptionError",
    "JobInfo",
    "KeyRule",
    "Kind",
    "Metrics",
    "NoOptions",
    "OptionMark",
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
    "Summary",
    "Table",
    "Tags",
    "Text",
    "TransientError",
    "WriteReport",
    "make_folder",
    "open_file",
    "path_component",
    "read_image_header",
    "remember_secret",
]

SPI_VERSION = 1
"""Version of this interface. A plugin written for another version is refused when it is loaded."""

OptionsT_co = TypeVar("OptionsT_co", bound=msgspec.Struct, covariant=True)


class Redelivery(StrEnum):
    """What happens when the lane hands over records a second time after a crash."""

    IDEMPOTENT = "idempotent"
    """The store recognises them: writing a record again changes nothing."""
    RESUMABLE = "resumable"
    """The opened run says where it stands (``BackendRun.next_position``). The lane goes on from there."""
    REBUILD = "rebuild"
    """A later lane writes the run anew from its first record, unless the run was finished and no record follows. Then
    ``RunInfo.resume_from`` is 0, and ``open_run`` deletes what the store has of the run. It is above 0 only if another
    journal delivered the beginning: ``open_run`` then continues the run."""
    AT_LEAST_ONCE = "at_least_once"
    """They are stored twice. The core counts them as possible duplicates."""

    @property
    def needs_order(self) -> bool:
        """True if a position alone says which records a run holds. Then no record may be stored after later ones."""
        return self in (Redelivery.RESUMABLE, Redelivery.REBUILD)


class ConfirmedBy(StrEnum):
    """Which call of a run confirms records, so that they count as delivered."""

    WRITE = "write"
    """``write``: when it returns, the batch is durable. The lane never calls ``flush``."""
    FLUSH = "flush"
    """``flush``: when it returns, everything written before it is durable, except what ``left_out`` returns."""


class Confirmation(StrEnum):
    """Who confirmed the records: the store itself, or only the SDK."""

    STORE = "store"
    """The store said that it has the records."""
    CLIENT = "client"
    """Only the SDK said that it sent them; the store could not be asked. The core counts such records separately."""


class KeyRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    r"""Which keys a store can hold. The core escapes every other key, so that different keys stay different.

    Escaping is reversible. Only a key that is too long is cut, and ends in a hash. A character that is not allowed
    becomes ``_xHHHH_``, its code point in hex (the convention of ECMA-376 for names). So ``_``, ``x`` and hex digits
    must be allowed. The defaults claim little: set what the store can hold.

    Attributes:
        max_chars: longest key; None for no limit. The core shortens a longer key and ends it in a hash of the whole.
        chars: the characters of a key, as the inside of a regular-expression class, such as ``A-Za-z0-9_./ -``. Empty
            for all.
        edge_chars: the characters that may come first and last, written in the same way; empty for all that ``chars``
            allows. ``^\-`` is right for an SDK that strips ``-`` at both ends.
        reserved_keys: keys that the store or the SDK uses itself.
        reserved_prefixes: beginnings of such keys.
        reserved_as: the prefix that a reserved key gets, such as ``user/``. If empty, the key's first character is
            escaped instead.
        is_path: True if the store reads a key as a relative path. The core then escapes the parts that would lead to
            another path or upwards: a slash at an end, ``//``, and parts that are ``.`` or ``..``.
    """

    max_chars: int | None = 250
    chars: str = "A-Za-z0-9_"
    edge_chars: str = ""
    reserved_keys: frozenset[str] = frozenset()
    reserved_prefixes: tuple[str, ...] = ()
    reserved_as: str = ""
    is_path: bool = False


ANY_KEY = KeyRule(max_chars=None, chars="")
"""The rule of a store that can hold every key as it is."""


class Capabilities(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a backend can store, and how. The defaults claim little: set what the store can do.

    The core acts on every field at run time. The contract kit tests every field, whatever its value.

    Attributes:
        kinds: the payload kinds that ``write`` accepts. The core rejects records of other kinds as
            ``unsupported_kind``; they never reach the backend.
        redelivery: what happens when a record is written a second time.
        confirmed_by: which call confirms records, ``write`` or ``flush``.
        nonfinite: whether metric values can be NaN or infinite. If not, the core removes such values from the record.
            It rejects a record without any other value as ``nonfinite``.
        late_steps: whether a step lower than an earlier one of the same key can be stored. If not, the core rejects
            such records as ``late_step``.
        optional_step: whether ``Entry.step`` may be None. If not, the core numbers records without a step 0, 1, 2, ...
            for each stream and key. Params, tags and summaries never have a step.
        changing_params: whether a param may get another value later. If not, the core hands over the first value, and
            rejects later values that differ as ``param_changed``.
        any_order: whether an entry may be stored after later ones of its run. If one entry keeps failing, the core then
            writes other entries, to test whether the store is down. With ``idempotent``, these may be entries that are
            stored already. So ``write`` must reach the store even for metrics that it has written before, and must fail
            while the store takes no writes.
        probe: whether the runs implement ``probe``. It is the same test, for a store that must keep the order.
        files_beside: the kinds, images or artifacts, whose files a second thread may hand to ``write``, one at a time.
            The lane's thread meanwhile calls the run's methods with everything else. Then a large or refused file holds
            up no metrics, but may be stored after later entries. This field and ``any_order`` have no effect if
            ``redelivery.needs_order``.
        key_rule: which keys can be stored.
        key_rules: the rules of the kinds for which ``key_rule`` does not hold.
        max_batch: most records in one ``write``. The core hands over fewer if they have thousands of values together.
    """

    kinds: frozenset[Kind] = frozenset({Kind.METRICS})
    redelivery: Redelivery = Redelivery.AT_LEAST_ONCE
    confirmed_by: ConfirmedBy = ConfirmedBy.FLUSH
    nonfinite: bool = False
    late_steps: bool = False
    optional_step: bool = False
    changing_params: bool = False
    any_order: bool = False
    probe: bool = False
    files_beside: frozenset[Kind] = frozenset()
    key_rule: KeyRule = KeyRule()
    key_rules: dict[Kind, KeyRule] = {}
    max_batch: int = 1000


class OptionMark(StrEnum):
    """What the core must know about an option, since it knows no backend by name.

    Put marks into the option's type: ``api_key: Annotated[str | None, OptionMark.SECRET] = None``.
    """

    SECRET = "secret"
    """It holds a secret. The core accepts only a reference such as ``${secret:NAME}``, never a literal."""
    HOST = "host"
    """It names a host, or a URL with a host, to which the backend connects, perhaps with credentials."""
    PATH = "path"
    """It names a file or folder that the backend reads or writes."""
    SHARED = "shared"
    """It names something in the store that others may also use, such as an MLflow experiment."""


class Credentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The login that a backend takes from the environment of its process, and the hosts that may get it.

    In a provisioned federation the environment is the operator's. A job may send these credentials only to a host that
    is named here, or in the operator's file.

    Attributes:
        variables: environment variables that hold a secret. The core removes their values from logs and reports.
        host_variables: environment variables by which the operator names a host for these credentials.
        default_host: the host that the backend uses if neither an option nor a variable names one; empty for none.
    """

    variables: tuple[str, ...] = ()
    host_variables: tuple[str, ...] = ()
    default_host: str = ""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One record as a backend receives it.

    Attributes:
        position: its place in its run, counted from 0. It is the same each time that the entry is handed over.
            Positions rise within a run. They have gaps where the core rejected records.
        time: unix seconds (UTC) of the log call. Store this time, not the time of arrival.
        step: >= 0. None only for params, tags and summaries, or with ``capabilities.optional_step``.
        round: the federated round, where known.
        payload: one of the kinds in ``capabilities.kinds``. Its keys follow the key rules.
        stream: the id of the stream. A process that logs has one for images and artifacts, and one for other records.
        seq: the record's number in its stream. Stream and seq together are a globally unique identity.
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
    """The entries of a batch that will never be stored. All other entries of the batch were stored."""

    rejected: Sequence[Rejection] = ()


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a backend that has none."""


class BackendContext(msgspec.Struct, frozen=True):
    """Where a backend works.

    Attributes:
        workdir: folder for this backend's files: the folder of its name in the job's run folder. It exists, unless
            the disk was full at the start. Then the lane tries to make it before it opens a run.
        job: the job that all runs of this backend belong to.
        side: where the receiver is.
    """

    workdir: Path
    job: JobInfo
    side: Side

    @property
    def run_folder(self) -> Path:
        """The job's run folder, which may be moved or archived after the job."""
        return self.workdir.parent

    def folder(self, option: str | None) -> Path:
        """Return the absolute folder that an option names, or ``workdir`` if it names none.

        The option may be absolute, with ``~``, or relative to the run folder. None and empty mean none.
        """
        return Path(os.path.abspath(self.run_folder / Path(option).expanduser() if option else self.workdir))

    def run_path(self, folder: Path, info: RunInfo) -> Path:
        """Return where a run's files belong in a folder that may hold many jobs: ``<folder>/<job>/<site>``.

        The job's part is its unique name. If ``folder`` is outside the run folder, the server may use it, too. A client
        then writes to ``<job>@client``.
        """
        inside = folder.is_relative_to(os.path.abspath(self.run_folder))
        suffix = "@client" if self.side is Side.CLIENT and not inside else ""
        return folder / (path_component(info.job.unique_name) + suffix) / path_component(info.site)

    def shown(self, path: Path) -> str:
        """Return a path as `Results` wants it: relative to the run folder, absolute where it lies outside."""
        base = os.path.abspath(self.run_folder)
        absolute = os.path.abspath(path)
        return os.path.relpath(absolute, base) if Path(absolute).is_relative_to(base) else absolute


class BackendRun:
    """One run being written. Subclass it. The lane gets it from ``Backend.open_run`` and calls it from one thread.

    With ``capabilities.files_beside``, a second thread calls ``write`` with files, also while ``flush`` or ``finish``
    runs.
    """

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        """Store these 1 to ``capabilities.max_batch`` entries, in this order. Their positions rise.

        With ``ConfirmedBy.WRITE``, returning confirms the batch. With ``ConfirmedBy.FLUSH``, the next ``flush`` that
        returns confirms it. After an error the lane hands over the entries again, perhaps in smaller batches. If an
        entry raises `PermanentError` when it is handed over alone, the lane rejects it.

        Returns:
            None if everything was stored. Otherwise the entries that can never be stored.

        Raises:
            TransientError: try the same entries again later.
            PermanentError: something in the batch can never be stored.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement write(batch)")

    def flush(self) -> Confirmation:
        """Block until everything that was written survives a crash of this process, except what ``left_out`` returns.

        These records then count as delivered. Called only with ``ConfirmedBy.FLUSH``.

        Returns:
            Who confirmed the records: the store itself, or only the SDK.

        Raises:
            TransientError: the lane calls it again later.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement flush(), or its backend must declare confirmed_by=ConfirmedBy.WRITE "
            "if write() makes records durable"
        )

    def left_out(self) -> Sequence[Entry]:
        """Return written entries that the last ``flush`` did not confirm, such as rows whose files are on their way.

        Only these entries stay pending. Return each of them after every ``flush`` until it is stored, and 64 entries at
        most: with more, the lane calls ``flush`` again later. Not called if ``redelivery.needs_order``.
        """
        return ()

    def finish(self, status: RunStatus) -> None:
        """End the run: mark how it ended and release its resources. The lane calls it after the last ``flush``.

        Raises:
            TransientError: the lane calls it again, until the deadline at the end of the job.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement finish(status)")

    def probe(self, entry: Entry) -> None:
        """Test whether the store takes writes for this run now. Remove whatever the test stores.

        Called only with ``capabilities.probe``, while ``write`` fails with ``entry`` alone. If the test keeps
        succeeding while ``write`` keeps failing, the entry is rejected. So test the same place, in the same way, with
        about as many bytes.

        Raises:
            TransientError: the store takes no writes now.
        """
        raise NotImplementedError(f"{type(self).__name__} claims probe and must implement probe(entry)")

    def next_position(self) -> int:
        """Return the position after the last entry that the run already holds.

        Called once after ``open_run``, and only with ``Redelivery.RESUMABLE``. The lane skips entries before it.
        """
        raise NotImplementedError(f"{type(self).__name__} claims to be resumable and must implement next_position()")


class Backend(Generic[OptionsT_co]):
    """A tracking backend. Subclass it with the type of its options; one instance serves all runs of a receiver.

    Attributes:
        spi: version of the SPI that the plugin was written for. Every plugin must write it out.
        Options: the msgspec Struct of its options, with ``forbid_unknown_fields``. It comes from the type in brackets:
            ``class Acme(Backend[AcmeOptions])``. A plain ``Backend`` has no options.
        capabilities: what it can store. An instance may have its own. The lane reads them after ``preflight``.
        credentials: what it takes from the environment to log in.
        contract: version of the contract kit that the plugin passed, 0 for none.
        moved_options: option -> a sentence that says what to use instead. It is for options that people know from
            elsewhere, such as from FLARE's own receiver. The error about such an option ends with the sentence.
    """

    spi: ClassVar[int]
    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    capabilities: Capabilities = Capabilities()
    credentials: ClassVar[Credentials] = Credentials()
    contract: ClassVar[int] = 0
    moved_options: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Look only at the class's own brackets. A base class's brackets must not replace the `Options` that a subclass
        # sets.
        for base in cls.__dict__.get("__orig_bases__", ()):
            if isinstance(origin := get_origin(base), type) and issubclass(origin, Backend):
                options = get_args(base)[0]
                if options is not Any and isinstance(options, type):
                    cls.Options = options

    def __init__(self, options: OptionsT_co, context: BackendContext) -> None:
        """Keep the options; do no work that can fail or wait.

        Raises:
            InvalidOptionError: the options contradict each other.
        """
        self.options = options
        self.context = context

    def preflight(self) -> None:
        """Check before training starts that the backend can be used here: a login, a reachable server.

        Raises:
            ConfigError: the backend cannot be used, and somebody must change the configuration. This stops the job.
                After the limit ``preflight_s`` it stops only the backend's lane, and the records wait for a replay.
            TransientError: it cannot be used now, but perhaps later. The job goes on, and the records wait.
        """

    def open_run(self, info: RunInfo) -> BackendRun:
        """Open this run, new or existing: the same ``info.run_id`` always means the same run.

        Raises:
            TransientError: try again later.
            PermanentError: this run cannot be opened; its records stay pending.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement open_run(info)")

    def results(self, info: RunInfo) -> Results | None:
        """Return where to look at this run now. Every command must be safe to run at once.

        Called once the run is open, and again before ``BackendRun.finish``. If ``finish`` returned, and all records
        are stored, it is called a last time. Until that last call, more may be written to the run, perhaps by a replay.
        So name a command that uploads the run, or closes it, only when ``finish`` has returned.
        """
        return None

    def close(self) -> None:
        """Release what all runs share: end the job's parent run, stop the SDK's service.

        Called once, after the lane's thread has made its last call to any run, also if runs could not be finished. With
        ``files_beside``, the second thread may still be in ``write``. An error is only logged.
        """
