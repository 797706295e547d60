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
    ├─ RecordError(ValueError)      raised to training code by a strict writer alone: a log call is wrong
    ├─ BackendError                 raised by plugins
    │   ├─ TransientError             try again later, with the same records
    │   └─ PermanentError             trying again cannot help
    └─ DeliveryError
        ├─ ChannelError               the receiver could not be reached, or did not reply
        ├─ SpoolError                 the site's spool cannot be used
        └─ JournalError               the receiver's journal cannot be used

A message says what was wrong, where, what was expected, and what to do next.
"""

from __future__ import annotations

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
    "UnknownBackendError",
]


class TrackhubError(Exception):
    """Base of every error that trackhub raises."""


class ConfigError(TrackhubError, ValueError):
    """The configuration is wrong.

    It stops a job before training starts. The only other error that does so is `PluginError`.
    """


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
    """A log call, or a value in it, cannot be recorded. Only a strict writer raises it; others count it and go on."""


class BackendError(TrackhubError):
    """Base of the errors by which a backend plugin says that something was not stored."""


class TransientError(BackendError):
    """The records were not stored, or nobody knows whether they were. The lane hands the same records over again.

    If one record fails with it every time, while others are stored in between, the lane rejects that record
    (docs/adr/0011). An error with ``retry_after_s``, or with a full disk as its cause, never counts against a record.

    Raise it for everything that time or an operator may mend: no connection, a 429 or 5xx reply, a full disk. Raise it
    for a rejected login, too: an operator can renew the login while the records wait in the journal.

    Attributes:
        retry_after_s: the shortest time to wait before the next attempt, in seconds, if the store named one (HTTP
            ``Retry-After``); None if it did not.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PermanentError(BackendError):
    """Trying again cannot help.

    From ``BackendRun.write`` it means that something in this batch can never be stored. The lane finds the records that
    fail alone, rejects them, and stores the others. From ``Backend.open_run`` it means that this run cannot be opened.
    Its records stay pending in the journal, for ``trackhub replay``.
    """


class DeliveryError(TrackhubError):
    """Base of the errors between the writer and the backend."""


class ChannelError(DeliveryError):
    """The receiver could not be reached, or did not reply in time. The request may still have arrived."""


class SpoolError(DeliveryError):
    """The spool folder cannot be created, read or understood."""


class JournalError(DeliveryError):
    """The journal cannot be opened, read or written."""
