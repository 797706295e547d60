# SPDX-License-Identifier: Apache-2.0
"""The gate: checks all of a batch before anything of it is stored. `Receiver` calls it.

The site still has what is damaged here. A lane that met the damage later could only count it as lost.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import msgspec

from trackhub.delivery.wire import Batch, Refused
from trackhub.framing import (
    DECODED_IN_TRANSIT,
    CorruptFrameError,
    decode_body,
    decode_head,
    pass_metrics,
    scan_frames,
)
from trackhub.records import MAX_STEP, Artifact, Gap, Image, Kind

__all__ = ["Contents", "examine"]


class Contents(NamedTuple):
    """What the receiver must know of a batch before it stores it.

    Attributes:
        time: of the first record or gap, in unix seconds.
        gaps: the number of records that the site says it does not have, by reason.
        blobs: the names of the blobs that the records refer to.
    """

    time: float
    gaps: Counter[str]
    blobs: list[str]


def examine(batch: Batch) -> Contents | Refused:
    """Check every frame of a batch, and that the batch's own numbers agree with them."""
    records, gaps, first = 0, Counter[str](), None
    blobs: list[str] = []
    try:
        offset = 0
        while frame := next(scan_frames(batch.frames, offset), None):
            body = batch.frames[frame.body : frame.end]
            first = first or decode_head(body)
            passed, _, offset = pass_metrics(batch.frames, frame.end)  # metrics need no look into: docs/adr/0004
            records += passed
            records += frame.kind != Kind.GAP
            payload = decode_body(body).payload if frame.kind in DECODED_IN_TRANSIT else None
            if isinstance(payload, Gap):
                gaps[payload.reason] += payload.count
            elif isinstance(payload, Image | Artifact):
                blobs.append(payload.blob.name)
    except (CorruptFrameError, msgspec.DecodeError) as e:
        return Refused("malformed", str(e))
    # No number may be beyond what SQLite can store, or the batch would fail again and again.
    if first is None or first.seq != batch.first_seq or not 0 <= first.seq <= batch.next_seq <= MAX_STEP:
        found = "it has no frame" if first is None else f"its first frame has seq {first.seq}"
        return Refused(
            "malformed",
            f"the batch declares seq {batch.first_seq} to {batch.next_seq}, but {found}. This is a defect of the "
            "sender: report it",
        )
    if records != batch.records or batch.next_seq - batch.first_seq != records + gaps.total():
        return Refused(
            "malformed",
            f"the batch covers seq {batch.first_seq} to {batch.next_seq} and declares {batch.records} records; its "
            f"frames hold {records} records and gaps of {gaps.total()}. This is a defect of the sender: report it",
        )
    return Contents(first.time, gaps, blobs)
