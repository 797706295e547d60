# SPDX-License-Identifier: Apache-2.0
"""What a log call becomes: records, in most cases one. Each has one payload.

This module also has the rules for keys and for the number of values.

The writer makes records, and a backend receives their payloads. `trackhub.framing` encodes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import IntEnum
from typing import Annotated, Any, Final, get_args

import msgspec
from msgspec import Meta

__all__ = [
    "KEYED",
    "KIND_OF",
    "MAX_CAPTION_CHARS",
    "MAX_COUNT",
    "MAX_DEPTH",
    "MAX_IMAGE_BYTES",
    "MAX_KEY_CHARS",
    "MAX_METRICS_OF_RECORD",
    "MAX_NAME_CHARS",
    "MAX_STEP",
    "MAX_VALUES_OF_RECORD",
    "STEPLESS",
    "STREAM_PATTERN",
    "Artifact",
    "Blob",
    "Count",
    "Gap",
    "Histogram",
    "Image",
    "Kind",
    "Metrics",
    "Params",
    "Payload",
    "Reason",
    "Record",
    "Summary",
    "Table",
    "Tags",
    "Text",
    "count_values",
    "key_problem",
    "size_problem",
]

MAX_KEY_CHARS = 1000
"""Longest key, in characters. It is above the limits of all backends: a lane shortens a key for its backend."""

MAX_STEP = 2**63 - 1
"""Largest step and round: what TensorBoard's and MLflow's int64 fields hold."""

MAX_COUNT = 2**53 - 1
"""Largest count, and largest number of a record in its stream. Every reader of JSON keeps numbers up to it exactly."""

MAX_DEPTH = 20
"""How many lists and dicts may enclose a value of a param."""

MAX_METRICS_OF_RECORD = 10_000
"""Most metrics that are logged together. A backend gets a record as a whole, and MLflow's SDK needs up to 0.3 ms for
each new metric. A record of more metrics would hold up the records of all other sites."""

MAX_VALUES_OF_RECORD = 100_000
"""Most values of any record: cells of a table, edges and counts of a histogram, params, tags or final values, those in
nested ones included. The SDKs need 0.01 to 0.02 ms for each. A table of 116,000 floats would be larger than a
record may be anyway."""

MAX_IMAGE_BYTES = 64 << 20
"""Largest file of an image, in bytes. Backends read an image as a whole. Log a larger one as an artifact."""

MAX_CAPTION_CHARS = 20_000
"""Longest caption of an image. With each confirmation, a lane stores the captions of images on their way."""

MAX_NAME_CHARS = 255
"""Longest file name, and longest type of an artifact, in characters."""

STREAM_PATTERN = r"\A[0-9a-f]{32}\Z"
"""What the id of a stream looks like."""

# The types below with ``Meta`` declare what a site may send. Only the decoder checks them, and no constructor does.
# `trackhub.delivery.check_received_batch` checks what a type cannot say.
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
"""A number of records or bytes, or the number of a record in its stream."""

Reason = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.-]{1,64}\Z")]
"""A word under which a report counts records. Terminals show it, so only harmless characters are allowed."""

_Step = Annotated[int, Meta(ge=0, le=MAX_STEP)]
_Time = Annotated[float, Meta(ge=0, le=253_402_300_799)]  # up to the end of the year 9999; NaN is excluded
_Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]

# Unicode category Cc, which will never have more members; the line and the paragraph separator; surrogates.
_NOT_IN_KEYS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def key_problem(key: str) -> str | None:
    """Return why a string cannot be a key, as the end of a sentence that begins with the key. None if it can be one.

    A key has 1 to ``MAX_KEY_CHARS`` characters of any script. It is valid UTF-8 without control characters (Unicode
    category Cc), U+2028, U+2029 and lone surrogates. The writer uses this rule, and so does the receiver for what a
    site sends. Terminals and pages must still escape a key: it may contain characters that reverse the
    direction of the text.
    """
    if not key:
        return "is empty; expected a name such as 'train/loss'"
    if len(key) > MAX_KEY_CHARS:
        return f"has {len(key)} characters; expected at most {MAX_KEY_CHARS}"
    # A printable text has none of these characters, and isprintable is four times as fast as the pattern.
    if not key.isprintable() and (found := _NOT_IN_KEYS.search(key)):
        return f"contains U+{ord(found[0]):04X}; expected no control characters, line separators or lone surrogates"
    return None


class Kind(IntEnum):
    """The kind of a payload. The numbers are part of the format and never change."""

    METRICS = 1
    PARAMS = 2
    TAGS = 3
    TEXT = 4
    IMAGE = 5
    HISTOGRAM = 6
    TABLE = 7
    ARTIFACT = 8
    GAP = 9
    SUMMARY = 10


class Blob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A reference to bytes that are stored in a file of their own and travel beside the record, in chunks.

    Attributes:
        name: file name, unique within the site: ``<stream>-<seq>``.
        size: length in bytes.
        sha256: hex digest of the content.
        media_type: MIME type, such as ``image/png``.
    """

    name: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}-\d{1,16}\Z")]
    size: Count
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    media_type: _Name


class Metrics(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """Scalars logged together: key to float64. NaN and infinities are kept."""

    values: dict[str, float]


class Params(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Hyperparameters: key to None, bool, int, float, str, or lists and dicts of these.

    The keys of nested dicts must be valid keys, too.
    """

    values: dict[str, Any]


class Tags(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """Labels of the run: key to string. The last value of a key counts."""

    values: dict[str, str]


class Text(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """A piece of text. Backends that can render Markdown do so."""

    key: str
    text: str


class Image(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """One encoded image.

    The receiver and each lane check that the file begins as a PNG or JPEG file does. They check that its header agrees
    with the media type, the width and the height. Nobody has decoded the file: the rest may be damaged, or may be a few
    bytes that become gigabytes of pixels.

    Attributes:
        key: its key.
        blob: the bytes of the PNG or JPEG file, at most ``MAX_IMAGE_BYTES``.
        width: in pixels.
        height: in pixels.
        caption: a line of text below it, at most ``MAX_CAPTION_CHARS``; may be empty.
    """

    key: str
    blob: Blob
    width: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    height: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    caption: str = ""


class Histogram(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """Counts in bins.

    Attributes:
        key: its key.
        edges: n + 1 finite bin limits, rising. Bin i is ``[edges[i], edges[i + 1])``; the last bin includes its end.
        counts: n counts, each >= 0.
    """

    key: str
    edges: list[float]
    counts: list[float]


class Table(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """Rows of cells. A cell is None, bool, int, float or str; every row has one cell per column."""

    key: str
    columns: list[str]
    rows: list[list[Any]]


class Artifact(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """A file.

    Attributes:
        key: the artifact's name within the run; may contain ``/``.
        blob: the bytes of the file.
        filename: the last part of the path that was logged.
        artifact_type: what it is, in W&B's sense: ``file``, ``model``, ``dataset``, ...
    """

    key: str
    blob: Blob
    filename: _Name
    artifact_type: _Name = "file"


class Gap(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """Takes the place of records that are missing from a stream, so that every hole has a reason.

    Backends never receive one.

    Attributes:
        count: how many records in a row are missing. The record with the gap has the ``seq`` of the first of them.
        reason: why they are missing: ``spool_full``, ``disk_full``, ``withheld``, ...
    """

    count: Annotated[int, Meta(ge=1, le=MAX_COUNT)]
    reason: Reason


class Summary(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=10):
    """Final values of the run: key to a value as in `Params`. The last value of a key counts."""

    values: dict[str, Any]


Payload = Metrics | Params | Tags | Text | Image | Histogram | Table | Artifact | Gap | Summary
"""What a record holds."""

KEYED = (Metrics, Params, Tags, Summary)
"""The payloads that have several values, each under its key. The others have one key, and a gap has none."""

STEPLESS = (Params, Tags, Summary)
"""The payloads that never have a step. The last value of a key counts, or the first value for params."""

KIND_OF: Final[Mapping[type[msgspec.Struct], Kind]] = {
    cls: Kind(cls.__struct_config__.tag) for cls in get_args(Payload)
}
"""The kind of each payload class."""


def count_values(payload: Payload) -> int:
    """Return how many values a payload has, those inside nested params included. Text, a file and a gap are one."""
    if isinstance(payload, Metrics | Tags):
        return len(payload.values)
    if isinstance(payload, Params | Summary):
        return _count_nested(payload.values)
    if isinstance(payload, Histogram):
        return len(payload.edges) + len(payload.counts)
    if isinstance(payload, Table):  # a hostile one has columns without rows, or rows without cells
        return max(len(payload.columns), len(payload.rows), sum(map(len, payload.rows)))
    return 1


def _count_nested(values: dict[str, Any]) -> int:
    count, left = 0, list[Any]([values])
    while left:  # no recursion: a hostile value may be nested deeper than Python can go
        value = left.pop()
        count += len(value)
        left += [inner for inner in (value.values() if type(value) is dict else value) if type(inner) in (dict, list)]
    return count


def size_problem(payload: Payload) -> str | None:
    """Return why a payload has too many values for one record, without a full stop. None if the number is allowed.

    The writer uses this rule, and so does the receiver for what a site sends. A record whose encoded body has no more
    than ``MAX_METRICS_OF_RECORD`` bytes need not be checked, since each value takes a byte at least.
    """
    if isinstance(payload, Metrics) and len(payload.values) > MAX_METRICS_OF_RECORD:
        return (
            f"{len(payload.values)} metrics are logged together; expected at most {MAX_METRICS_OF_RECORD}; log them in "
            "several calls"
        )
    if (values := count_values(payload)) > MAX_VALUES_OF_RECORD:
        return f"it has {values} values; expected at most {MAX_VALUES_OF_RECORD}; log a file of them with log_artifact"
    return None


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One log call, or a part of it.

    The site is not part of it. The receiver knows the site from the authenticated channel, so that no site can write as
    another.

    Attributes:
        seq: the record's number in its stream, counted from 0.
        time: unix seconds (UTC) at the log call.
        step: what the caller gave, 0 to ``MAX_STEP``; None if it gave none.
        round: the federated round in which it was logged; None if the process did not know one.
        payload: what was logged.
    """

    seq: Count
    time: _Time
    step: _Step | None
    round: _Step | None
    payload: Payload
