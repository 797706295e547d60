# SPDX-License-Identifier: Apache-2.0
"""The command ``trackhub``. The installed script calls ``main``, which hands over to `trackhub.cli.app`."""

from __future__ import annotations

import io
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command in ``sys.argv`` and exit.

    The exit status is 0 if all is well, 1 if not, 2 for a wrong command, and 130 for one that was interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Its encoding may lack letters of a name, as ASCII does. Escape these: otherwise the command would end there.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from trackhub.cli.app import run

        run()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"click", "rich"}:
            raise
        sys.stderr.write(
            f"trackhub: the command line needs {error.name}, which is not installed here. Install the extra `cli`: "
            "pip install 'flare-trackhub[cli]' (in a clone: pip install -e '.[cli]')\n"
        )
        sys.exit(2)
