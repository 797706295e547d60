# SPDX-License-Identifier: Apache-2.0
"""A script that becomes another user after its first record: what the spool cannot take is counted in its ledger."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.unit.readers_and_bad_backends import new_spool
from trackhub.spool.writer_ledger import read_ledger
from trackhub.writer.writer import Writer

CALLS = 3000


def _log_as_another_user(spool: Path) -> None:
    writer = Writer(spool)
    writer.log({"a": 0.0})
    os.setgid(65534)
    os.setuid(65534)
    for i in range(1, CALLS):
        writer.log({"a": float(i)})
    writer.close()


@pytest.mark.skipif(os.getuid() != 0, reason="the test becomes another user, and only root can")
def test_a_script_that_changes_its_user_after_its_first_record_counts_what_is_lost() -> None:
    with tempfile.TemporaryDirectory() as folder:  # which other users can reach, unlike pytest's own
        spool = Path(folder) / "spool"
        os.chmod(folder, 0o755)
        new_spool(spool)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _log_as_another_user(spool)
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

        (ledger,) = spool.glob("*.ledger")
        counts = read_ledger(ledger)

    assert counts.logged == CALLS
    assert 0 < counts.dropped["io_error"] < CALLS
