# SPDX-License-Identifier: Apache-2.0
"""The one writer of a trainer's process for calls that trackhub takes. Only one stream keeps the order of all calls.

`log_calls` and `capture` share it. It imports no FLARE, since a script that is captured may not use it.
"""

from __future__ import annotations

import functools
import os

from trackhub.spool.announce_spool import find_spool
from trackhub.spool.layout import read_spool_info
from trackhub.writer.writer import Writer

__all__ = ["process_writer"]


@functools.cache
def process_writer(spool: str) -> Writer:
    """Return the writer of this process.

    Args:
        spool: the value of ``SPOOL_ENV`` when this process started.

    Raises:
        ConfigError: the announced spool is not there, or does not belong to this site and job, or has ended.
        SpoolError: it cannot be read.
        PermissionError: this process may not write there.
    """
    folder = find_spool(spool)
    read_spool_info(folder)  # the message path also works where this process does not see the folder
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"this process may not write to {folder}")
    return Writer(folder)
