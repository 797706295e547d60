# SPDX-License-Identifier: Apache-2.0
"""A writer with a receiver of its own in the same process, so that a training script runs outside FLARE as well.

`trackhub.local` calls `open_local`. The sender and the receiver are the same as in FLARE, but requests travel by a
plain function call. `trackhub.end_runs_at_script_end` ends a run that the script does not close.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trackhub.delivery import (
    DeliveryReport,
    JobInfo,
    Limits,
    Receiver,
    RunStatus,
    Sender,
    Side,
    SpoolInfo,
    announce_to_children,
    close_spool,
    create_spool,
    find_interrupted,
    format_results,
    has_streams,
    read_spool_info,
    withdraw_process_spool,
)
from trackhub.end_runs_at_script_end import is_failure, register, unregister
from trackhub.environment_trouble import is_environment_trouble
from trackhub.errors import ConfigError, SpoolError
from trackhub.job_and_run_info import path_component, site_problem
from trackhub.runnable_commands import command_for
from trackhub.writer.spool_choice import is_disabled, is_strict
from trackhub.writer.writer import Writer, plain_writer

__all__ = ["LocalWriter", "open_local"]

_CURSOR = "local"
_MAX_NAMED = 3
_log = logging.getLogger(__name__)


class _Delivery:
    """The receiver and the sender of one run: they deliver what the run logs. `open_local` makes it.

    Attributes:
        spool: the spool's folder.
        sender: the started sender, which sends the spool to the receiver.
        report: the delivery report, also if the wait for the sender was interrupted. None before the end, and if the
            wait for the backends was interrupted.
    """

    def __init__(self, spool: Path, receiver: Receiver, sender: Sender, close_s: float) -> None:
        """Take over a started receiver and a started sender.

        Args:
            spool: the spool's folder.
            receiver: the started receiver.
            sender: the started sender, which sends the spool to the receiver.
            close_s: how long ``end`` lets the sender send what is left in the spool, in seconds.
        """
        self.spool = spool
        self.sender = sender
        self.report: DeliveryReport | None = None
        self._receiver = receiver
        self._close_s = close_s

    def end(self, status: RunStatus) -> DeliveryReport:
        """Deliver what is left, end the run and close everything. Ctrl-C skips the waits.

        Raises:
            JournalError: the journal cannot be read, or the receiver could not start.
        """
        withdraw_process_spool(self.spool)
        # Note the status first, since the process may be killed at any time from here on.
        self._receiver.note_status(status)
        if os.path.exists(self.spool / "spool.json"):  # `close_spool` forgets a spool that waits for room on its disk
            with contextlib.suppress(SpoolError):  # the sender tries it again
                close_spool(self.spool)
        try:
            self.sender.close(self._close_s, failed=status is RunStatus.FAILED)
        except BaseException:
            with contextlib.suppress(Exception):  # such as a JournalError, which must not take the place of Ctrl-C
                self.report = self._receiver.finish(status, deadline_s=0.0)
            raise
        self.report = self._receiver.finish(status)
        return self.report


class LocalWriter(Writer):
    """A `trackhub.Writer` that delivers by itself. Close it, or use it as a context manager, to deliver everything.

    A writer that is still open when the script ends is closed then, and says on stderr what it delivered. This also
    holds for an end by an exception, or by a SIGTERM or SIGHUP that the script does not handle.

    Attributes:
        folder: the run's folder. Each backend's files are in the subfolder of its name.
        report: the delivery report. None until ``close``, and afterwards if tracking is disabled, the journal could not
            be made or read, or ``close`` was interrupted.
    """

    report: DeliveryReport | None

    def __init__(self, folder: Path, delivery: _Delivery | None, *, strict: bool = False, quiet: bool = False) -> None:
        """Use `trackhub.local`, which calls this.

        Args:
            folder: the run's folder.
            delivery: what delivers the run; None records nothing.
            strict: as for `Writer`.
            quiet: as for `trackhub.local`.
        """
        super().__init__(None if delivery is None else delivery.spool, strict=strict)
        self.folder = folder
        self.report = None
        self._delivery = delivery
        self._quiet = quiet
        self._pid = os.getpid()
        self._has_ended = delivery is None
        self._ends_with_script = False

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy logs into the same run, as a forked child does. It has no sender or receiver, so it cannot end the run.
        return plain_writer, (self._spool, self._strict)

    def __copy__(self) -> Writer:  # type: ignore[override]
        return copy.deepcopy(self)

    def set_round(self, value: int | None) -> None:
        """Set the round that is put on the records logged from now on; None for no round."""
        if self._delivery is not None:
            self._delivery.sender.set_round(value)

    def close(self, *, failed: bool = False) -> None:
        """Deliver what was logged, end the run, and make the report. Idempotent.

        Blocks up to ``deadline_s`` of the limits until the receiver has everything, and up to ``files_s`` while files
        still arrive. Then it blocks up to ``deadline_s`` until the backends have everything.

        Never raises, except when it is interrupted, for example by Ctrl-C. If the journal is damaged, or its disk is
        full, it logs a warning, and there may be no report.

        In a forked child, this only ends the logging of the child. The parent delivers what the child logged.

        Args:
            failed: end the run as failed.
        """
        super().close()
        if self._delivery is None or self._has_ended or os.getpid() != self._pid:
            return  # in a forked child, the sender and the receiver live in the parent
        self._has_ended = True
        try:
            self.report = self._delivery.end(RunStatus.FAILED if failed else RunStatus.FINISHED)
        except Exception as e:  # noqa: BLE001  # a damaged journal or a full disk; training has ended well
            self._warn_of_end(f"{type(e).__name__}: {e}")
        except BaseException:  # Ctrl-C, or the script's own signal handler: what is left stays on the disk
            report = self._delivery.report  # a site that never reached the receiver is not in it
            if report is None or not report.sites or not report.is_complete():
                _say(f"interrupted before all was delivered; `{self._replay()}` delivers what is left")
            raise
        else:
            if self.report.error:
                self._warn_of_end(self.report.error)
            elif left := self.report.undelivered():
                _log.warning(
                    "%d records of the run in %s are not delivered yet; `%s` goes on with them",
                    left, self.folder, self._replay(),
                )  # fmt: skip
        finally:
            unregister(self)
        if self.report is not None and not self._quiet:
            end = "was still open when the script ended, and is closed now" if self._ends_with_script else "has ended"
            results = format_results({self.report.side: self.report})
            _say(f"the run {end} as {'failed' if failed else 'finished'}\n{results}")

    def _warn_of_end(self, reason: str) -> None:
        _log.warning(
            "tracking could not end normally: %s. What was logged is in %s; deliver it with `%s`",
            reason, self.folder, self._replay(),
        )  # fmt: skip

    def _replay(self) -> str:
        """Return the command that delivers what is left."""
        return command_for("trackhub replay", self.folder)

    def end_with_script(self, *, failed: bool) -> None:
        """Close, because the script ends. Never raises.

        Args:
            failed: end the run as failed.
        """
        self._ends_with_script = True
        with contextlib.suppress(KeyboardInterrupt):
            self.close(failed=failed)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=is_failure(exc))


def _say(message: str) -> None:
    with contextlib.suppress(Exception):  # stderr may be closed, or in use by the code that a signal interrupted
        sys.stderr.write(f"trackhub: {message}\n")
        sys.stderr.flush()


def open_local(
    backends: Mapping[str, Mapping[str, Any]] | Iterable[str],
    *,
    folder: str | Path = "runs",
    job: str | None = None,
    resume: bool = False,
    name: str = "",
    notes: str = "",
    tags: Iterable[str] = (),
    site: str = "local",
    limits: Limits | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> LocalWriter:
    """Start a receiver in this process, and return a writer that delivers to it.

    Args:
        backends, folder, job, resume, name, notes, tags, site, strict, quiet: as for `trackhub.local`.
        limits: sizes, pauses and waits; by default as the environment says (``TRACKHUB_DEADLINE_S``, ...).

    Raises:
        ConfigError: a backend, an option, a limit, ``site`` or ``tags`` is wrong, or a backend cannot be used. Also if
            the run exists and ``resume`` is not set, if it exists under another ``name`` or ``site``, or if ``resume``
            is set without ``job``.
        PluginError: the plugin of a backend cannot be used.
        DeliveryError: the folder cannot be used. A full disk does not raise: tracking begins once there is room.
    """
    _check_labels(site, tags)
    options = _options(backends)
    if limits is not None and not isinstance(limits, Limits):
        raise ConfigError(f"trackhub.local: limits: expected trackhub.delivery.Limits(...), got {limits!r}")
    if resume and not job:
        raise ConfigError(
            "trackhub.local: resume=True needs job=, the job whose run to go on in. Give the job= of the earlier "
            "call, or leave resume out"
        )
    job_info = JobInfo(job or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}", name, notes, tuple(tags))
    runs_dir = Path(folder).absolute()
    run_dir = runs_dir / path_component(job_info.unique_name)
    is_strict()  # a wrong value is an error before anything is made
    if is_disabled():
        return LocalWriter(run_dir, None)
    limits = limits or Limits.from_mapping({}, environ=os.environ)
    _check_folder(run_dir)
    spool = run_dir / "trackhub" / "spool"
    is_new = not has_streams(spool)
    if not resume and not is_new:
        raise ConfigError(
            f"{run_dir}: this run was logged to before. To go on in it, pass resume=True. Otherwise give another job=, "
            "or leave job= out: then each run gets a folder of its own"
        )
    _check_site(spool, site)
    if job and is_new:
        _check_name(runs_dir, job_info)
    _warn_of_interrupted(runs_dir, but=run_dir)
    delivery = _start(run_dir, spool, job_info, site, options, limits, quiet=quiet)
    writer = LocalWriter(run_dir, delivery, strict=strict, quiet=quiet)
    register(writer)
    return writer


def _check_labels(site: Any, tags: Any) -> None:
    """Raise ConfigError if the receiver would refuse the site, or if the tags are a single text."""
    if not isinstance(site, str):
        raise ConfigError(f"trackhub.local: site: expected a str, got {site!r}")
    if problem := site_problem(site):
        raise ConfigError(f"trackhub.local: site: {site!r} {problem}")
    if isinstance(tags, str):  # otherwise each letter would become a tag
        raise ConfigError(f"trackhub.local: tags: expected a list of texts, got the string {tags!r}")


def _check_folder(run_dir: Path) -> None:
    """Raise SpoolError if no such folder can exist. A missing folder, or trouble of the environment, is no error."""
    try:
        run_dir.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        if not is_environment_trouble(error):
            raise SpoolError(f"the run's folder {run_dir} cannot be used: {error}; give another folder") from error


def _check_site(spool: Path, site: str) -> None:
    """Raise ConfigError if the run is another site's. A spool holds the records of one site."""
    with contextlib.suppress(SpoolError):  # there is no spool yet, or it cannot be read
        known = read_spool_info(spool).site
        if known != site:
            raise ConfigError(
                f"{spool.parent.parent}: this run is of the site {known!r}, and not of {site!r}. To go on in it, pass "
                f"site={known!r}. Otherwise give another job="
            )


def _check_name(runs_dir: Path, job: JobInfo) -> None:
    """Raise ConfigError if this job was logged to under another name. It would be two runs in every backend.

    If the names are equal, the folder is a copy of this run, such as a backup. That is no error.
    """
    for found in glob.glob("*/trackhub/spool", root_dir=runs_dir, include_hidden=True):
        spool = runs_dir / found
        with contextlib.suppress(SpoolError):  # another program's folder, or one that cannot be read
            info = read_spool_info(spool)
            name = info.name or info.job
            if info.job == job.id and name != job.name and has_streams(spool):
                raise ConfigError(
                    f"{spool.parent.parent}: the job {job.id!r} was logged to before, and was called {name!r} then. To "
                    f"go on in that run, pass name={name!r} and resume=True. Otherwise give another job="
                )


def _options(backends: object) -> dict[str, Mapping[str, Any]]:
    """Return the options of each backend.

    Raises:
        ConfigError: it is neither names nor a mapping of names to options.
    """
    if isinstance(backends, str):
        return {backends: {}}
    if isinstance(backends, Mapping):
        plain = {name: {} if options is None else options for name, options in backends.items()}
    elif isinstance(backends, Iterable):
        plain = {name: {} for name in backends}
    else:
        plain = {None: {}}
    if not all(isinstance(name, str) and isinstance(options, Mapping) for name, options in plain.items()):
        raise ConfigError(
            f"trackhub.local: backends: expected names, or a mapping of names to options, such as "
            f"{{'jsonl': {{}}}}; got {backends!r}"
        )
    return plain


def _start(
    run_dir: Path,
    spool: Path,
    job: JobInfo,
    site: str,
    backends: Mapping[str, Mapping[str, Any]],
    limits: Limits,
    *,
    quiet: bool,
) -> _Delivery:
    """Start the receiver, make the spool, and start the sender.

    If one of them fails, leave no thread and no lock, and an earlier run as it was.
    """
    receiver = Receiver(
        run_dir, job=job, side=Side.LOCAL, backends=backends, limits=limits, say_where_to_look=None if quiet else _say
    )
    receiver.start()  # first: with a wrong configuration no spool is made
    try:
        info = SpoolInfo(site, job.id, (_CURSOR,), limits.spool_bytes, name=job.name, notes=job.notes, tags=job.tags)
        create_spool(spool, info)
        sender = Sender(spool, receiver.channel(site), cursor=_CURSOR, limits=limits)
        sender.start()
    except BaseException:
        receiver.abandon()
        raise
    announce_to_children(spool, site, job.id)
    return _Delivery(spool, receiver, sender, limits.deadline_s)


def _warn_of_interrupted(runs_dir: Path, *, but: Path) -> None:
    """Warn, in one line, of the runs in this folder whose script was killed."""
    found = [run for run in find_interrupted(runs_dir) if run != but and has_streams(run / "trackhub" / "spool")]
    if found:
        named = ", ".join(f"`{command_for('trackhub replay', run)}`" for run in found[:_MAX_NAMED])
        more = f", and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
        _log.warning(
            "%d earlier %s killed before all was delivered; deliver the rest with %s%s",
            len(found), "run was" if len(found) == 1 else "runs were", named, more,
        )  # fmt: skip
