# SPDX-License-Identifier: Apache-2.0
"""Notes beside the spool which other loggers a site's scripts use, so that the report can name them.

`trackhub.flare.trainer.capture` notes a logger in the process that uses it. The sender's widget reads the notes at the
end of the job. If a site has no records, the delivery report names the loggers that its scripts used.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

__all__ = ["note_logger", "seen_loggers"]

_SUFFIX = ".logger"


@functools.cache  # one file for each logger and process
def note_logger(spool: Path, logger: str) -> None:
    """Note that a process of this site uses a logger. Never raises."""
    with contextlib.suppress(OSError):
        (spool / f"{logger}{_SUFFIX}").touch(mode=0o600)


def seen_loggers(spool: Path) -> tuple[str, ...]:
    """Return the loggers that processes of this site have used."""
    try:
        return tuple(sorted(path.stem for path in spool.glob(f"*{_SUFFIX}")))
    except OSError:
        return ()
