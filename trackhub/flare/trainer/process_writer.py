# SPDX-License-Identifier: Apache-2.0
"""Makes the writer for all log calls that trackhub takes over in a trainer's process.

`record_flare_log_calls` and `capture` share this writer, since the order of all calls is kept only within one stream.
This module imports no FLARE, since a captured script need not use FLARE.
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
    read_spool_info(folder)  # raise if this process does not see the folder, so that FLARE's messages carry the calls
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"this process may not write to {folder}")
    return Writer(folder)
