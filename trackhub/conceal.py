# SPDX-License-Identifier: Apache-2.0
"""Keeps the secrets that this process knows out of its logs, errors, journals and reports.

`trackhub.secrets` passes each secret that it resolves to `remember_secret`, and backends pass those that they find
elsewhere. From the first secret on, every log record of the process is cleaned. The journal cleans what it stores, and
the receiver cleans the errors that it raises.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, quote_plus

from trackhub.errors import ConfigError, PluginError

__all__ = ["clean_errors", "conceal", "remember_secret"]

_SHOWN = "***"
_MIN_CHARS = 4
"""A shorter secret is not concealed: it would occur by chance in every text."""

_lock = threading.Lock()
_known: tuple[str, ...] = ()
_formatter = logging.Formatter()


def remember_secret(value: str | None) -> None:
    """Conceal this secret from now on, wherever this process logs or stores text. Thread-safe.

    Args:
        value: the secret; None, or one of fewer than four characters, is not remembered.
    """
    global _known
    if value is None or len(value) < _MIN_CHARS:
        return
    forms = {value, quote(value, safe=""), quote_plus(value), json.dumps(value)[1:-1], repr(value)[1:-1]}
    forms.update(_within_base64(value.encode()))
    with _lock:
        if not _known:
            _clean_all_log_records()
        if not forms <= set(_known):
            # Replace the longest secret first. If one secret is a part of another, the rest of the longer one would be
            # shown otherwise.
            _known = tuple(sorted({*_known, *forms}, key=len, reverse=True))


def conceal(text: str) -> str:
    """Return the text with ``***`` in place of each secret that this process knows."""
    for secret in _known:
        if secret in text:
            text = text.replace(secret, _SHOWN)
    return text


@contextlib.contextmanager
def clean_errors() -> Iterator[None]:
    """Replace known secrets in a configuration or plugin error of this block.

    If the error or one of its causes holds a secret, the error is raised without its causes.

    Raises:
        ConfigError, PluginError: those of the block.
    """
    try:
        yield
    except (ConfigError, PluginError) as error:
        shown: BaseException | None = error
        while shown is not None:
            if conceal(str(shown)) != str(shown):
                raise type(error)(conceal(str(error))) from None
            shown = shown.__cause__ or shown.__context__
        raise


def _within_base64(secret: bytes) -> Iterator[str]:
    """Yield the base64 forms of a secret inside a longer text, as in ``Authorization: Basic`` (``user:password``)."""
    for before in range(3):  # three bytes become four characters, so the form depends on the bytes before the secret
        text = base64.b64encode(bytes(before) + secret).decode().rstrip("=")
        # Leave out characters at both ends that also depend on the text around the secret.
        first, last = (0, 2, 3)[before], len(text) - ((before + len(secret)) % 3 != 0)
        if last - first >= _MIN_CHARS:
            yield text[first:last]


def _clean_all_log_records() -> None:
    make_record = logging.getLogRecordFactory()

    def make_clean_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        _clean(record)
        return record

    # A filter would see the records of one logger or handler only, and an SDK has its own.
    logging.setLogRecordFactory(make_clean_record)


def _clean(record: logging.LogRecord) -> None:
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001  # the arguments do not fit the message; logging reports that later
        return
    if (clean := conceal(message)) != message:
        record.msg, record.args = clean, ()
    if record.exc_info and record.exc_info[0] is not None:
        trace = _formatter.formatException(record.exc_info)
        if (clean := conceal(trace)) != trace:
            # Remove `exc_info`, since a handler that formats it again would show the secret.
            record.exc_text, record.exc_info = clean, None
