# SPDX-License-Identifier: Apache-2.0
"""Every error that trackhub raises, in one tree.

::

    TrackhubError
    ├─ ConfigError(ValueError)      the configuration is wrong; raised before training starts
    │   ├─ UnknownBackendError        no installed plugin has this name
    │   └─ InvalidOptionError         a backend's option is unknown or has a wrong value
    ├─ PluginError                  an installed plugin cannot be used
    │   ├─ BackendLoadError           its entry point cannot be imported
    │   ├─ BackendConflictError       two distributions claim one backend name
    │   └─ IncompatibleBackendError   it was written for another version of the SPI
    ├─ RecordError(ValueError)      raised to training code: this log call is wrong, nothing was recorded
    ├─ BackendError                 raised by plugins
    │   ├─ TransientError             try again later, with the same records
    │   └─ PermanentError             trying again cannot help
    └─ DeliveryError
        ├─ ChannelError               the receiver could not be reached, or did not reply
        ├─ SpoolError                 the site's spool cannot be used
        ├─ JournalError               the receiver's journal cannot be used
        └─ UndeliveredError           records were left over; carries the delivery report

A message says what was wrong, where, what was expected, and what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trackhub.delivery.report import DeliveryReport

__all__ = [
    "BackendConflictError",
    "BackendError",
    "BackendLoadError",
    "ChannelError",
    "ConfigError",
    "DeliveryError",
    "IncompatibleBackendError",
    "InvalidOptionError",
    "JournalError",
    "PermanentError",
    "PluginError",
    "RecordError",
    "SpoolError",
    "TrackhubError",
    "TransientError",
    "UndeliveredError",
    "UnknownBackendError",
]


class TrackhubError(Exception):
    """Base of every error that trackhub raises."""


class ConfigError(TrackhubError, ValueError):
    """The configuration is wrong. The only kind of error that may stop a job, and only before training."""


class UnknownBackendError(ConfigError):
    """No installed distribution provides a backend of this name."""


class InvalidOptionError(ConfigError):
    """A backend's option is unknown, has the wrong type, or holds a literal secret."""


class PluginError(TrackhubError):
    """An installed backend plugin cannot be used."""


class BackendLoadError(PluginError):
    """The plugin's entry point does not import, or does not name a usable backend class."""


class BackendConflictError(PluginError):
    """Two installed distributions provide a backend of the same name."""


class IncompatibleBackendError(PluginError):
    """The plugin was written for another version of the SPI than this trackhub has."""


class RecordError(TrackhubError, ValueError):
    """This log call is wrong. Nothing was recorded; training code may catch it and go on."""


class BackendError(TrackhubError):
    """What a backend plugin raises to report an outcome that is not success."""


class TransientError(BackendError):
    """The records were not stored, or not surely; the same records will be handed over again.

    Raise it for everything that time or an operator may mend: no connection, a 429 or 5xx reply, a full disk, and
    also a rejected login, since whoever runs the receiver can renew it while the records wait in the journal.

    Attributes:
        retry_after_s: the least time to wait before the next attempt, in seconds, when the backend said so
            (HTTP ``Retry-After``); None leaves it to the lane's backoff.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PermanentError(BackendError):
    """Trying again cannot help.

    From ``BackendRun.write`` it means that something in this batch can never be stored: the lane narrows it down,
    rejects the records that fail alone, and stores their neighbours. From ``Backend.open_run`` it means that this run
    cannot be opened: its records stay pending in the journal, for ``trackhub replay``.
    """


class DeliveryError(TrackhubError):
    """Something between the writer and the backend failed."""


class ChannelError(DeliveryError):
    """The receiver did not reply, or could not be reached. The request may or may not have arrived."""


class SpoolError(DeliveryError):
    """The spool folder cannot be created, read or understood."""


class JournalError(DeliveryError):
    """The journal cannot be opened, read or written."""


class UndeliveredError(DeliveryError):
    """Records were left undelivered where the caller asked that none be.

    Attributes:
        report: the delivery report, which says for each site and lane what was left and why.
    """

    def __init__(self, message: str, report: DeliveryReport) -> None:
        super().__init__(message)
        self.report = report
