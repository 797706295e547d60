# SPDX-License-Identifier: Apache-2.0
"""msgspec learns every Struct that threads decode when its module is imported, and not in two threads at once.

Otherwise a receiver with several lanes, or a simulator with several clients, dies by SIGSEGV now and then.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# msgspec calls `get_class_annotations` for each class that it learns.
LEARNT = """
import sys, msgspec
from trackhub.delivery.federation.federation_run import FederationOptions
from trackhub.delivery.journal.tables_and_rows import JobInfo, Progress, Shift
from trackhub.delivery.lane.fit_records_to_backend import _Memory
from trackhub.delivery.report import DeliveryReport, RunReport, SiteReport
from trackhub.delivery.wire import Reply, Request, SiteCounts
from trackhub.records import Record
from trackhub.spi import Entry, Results
from trackhub.spool.acks import Ack, Retired
from trackhub.spool.announce_spool import _Claim
from trackhub.spool.layout import SpoolInfo

learnt = []

def note(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "get_class_annotations":
        learnt.append(frame.f_locals["obj"].__name__)

class Unknown(msgspec.Struct):
    a: int

sys.setprofile(note)
for cls in (JobInfo, Progress, Shift, _Memory, DeliveryReport, RunReport, SiteReport, Reply, Request, SiteCounts,
            Record, Entry, Results, Ack, Retired, _Claim, SpoolInfo, FederationOptions, Unknown):
    msgspec.msgpack.Decoder(cls)
sys.setprofile(None)
print(*learnt)
"""


def test_what_threads_decode_is_learnt_at_import() -> None:
    done = subprocess.run([sys.executable, "-c", LEARNT], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr == ""
    assert done.stdout.split() == ["Unknown"], "call `trackhub.plain_values_to_structs.prepare` for these"


def test_every_struct_that_is_decoded_is_among_these() -> None:
    found = set()
    for path in (ROOT / "trackhub").rglob("*.py"):
        if "testing" not in path.parts:
            found |= set(re.findall(r"decode\(.*type=(_?[A-Z]\w+)", path.read_text(encoding="utf-8")))
    assert found - {"JSON_FACTS"} == {
        "JobInfo", "SiteCounts", "Progress", "DeliveryReport", "_Memory", "Ack", "Retired", "SpoolInfo", "_Claim",
        "FederationOptions",
    }  # fmt: skip
