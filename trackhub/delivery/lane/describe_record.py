# SPDX-License-Identifier: Apache-2.0
"""Names a record by its kind and its keys, for the log and for the delivery report.

The modules of the lane call it when a record is rejected or holds up a run. With a number alone, nobody would find the
log call in the training script.
"""

from __future__ import annotations

from trackhub.printable import printable
from trackhub.records import KEYED, Payload
from trackhub.spi import Entry, Rejection

__all__ = ["name_of", "named_rejection", "show_keys"]

_MAX_NAMES = 3
_MAX_NAME_CHARS = 80


def show_keys(payload: Payload) -> str:
    """Return the kind and the first keys of a payload in one printable line, such as ``metrics 'train/loss'``."""
    keys = list(payload.values) if isinstance(payload, KEYED) else [getattr(payload, "key", "")]
    shown = ", ".join(f"'{_cut(key)}'" for key in keys[:_MAX_NAMES]) + ", ..." * (len(keys) > _MAX_NAMES)
    return f"{type(payload).__name__.lower()} {shown}"


def name_of(entry: Entry) -> str:
    """Describe a record so that a person finds it: its kind, its keys, its step and its position."""
    step = "" if entry.step is None else f"step {entry.step}, "
    return f"{show_keys(entry.payload)} ({step}record {entry.position})"


def named_rejection(payload: Payload, rejection: Rejection) -> Rejection:
    """Return the rejection of a record with the record's keys before its detail."""
    return Rejection(rejection.position, rejection.reason, f"{show_keys(payload)}: {rejection.detail}")


def _cut(key: str) -> str:
    shown = printable(key)
    return shown if len(shown) <= _MAX_NAME_CHARS else f"{shown[: _MAX_NAME_CHARS - 3]}..."
