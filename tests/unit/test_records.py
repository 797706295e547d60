# SPDX-License-Identifier: Apache-2.0
"""Records survive their encoding, and damage to frames is seen."""

from __future__ import annotations

import math
import struct
import unicodedata
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import frames_in
from trackhub.framing import MAX_BODY_BYTES, CorruptFrameError, Frame, decode_body, encode_frame, scan_frames
from trackhub.records import (
    KIND_OF,
    MAX_COUNT,
    MAX_STEP,
    Artifact,
    Blob,
    Gap,
    Histogram,
    Image,
    Kind,
    Metrics,
    Params,
    Payload,
    Record,
    Summary,
    Table,
    Tags,
    Text,
    key_problem,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
number = st.floats(width=64)
scalar = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | number | text
param = st.recursive(scalar, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3), max_leaves=8)
size = st.integers(0, MAX_COUNT)
pixels = st.integers(0, 2**31 - 1)
blob = st.builds(Blob, st.from_regex(r"\A[0-9a-f]{32}-[0-9]{1,16}\Z"), size, st.from_regex(r"\A[0-9a-f]{64}\Z"), text)
payloads: dict[Kind, st.SearchStrategy[Payload]] = {
    Kind.METRICS: st.builds(Metrics, st.dictionaries(text, number)),
    Kind.PARAMS: st.builds(Params, st.dictionaries(text, param, max_size=4)),
    Kind.TAGS: st.builds(Tags, st.dictionaries(text, text)),
    Kind.TEXT: st.builds(Text, text, text),
    Kind.IMAGE: st.builds(Image, text, blob, pixels, pixels, text),
    Kind.HISTOGRAM: st.builds(Histogram, text, st.lists(number), st.lists(number)),
    Kind.TABLE: st.builds(Table, text, st.lists(text), st.lists(st.lists(scalar, max_size=3), max_size=3)),
    Kind.ARTIFACT: st.builds(Artifact, text, blob, text, text),
    Kind.SUMMARY: st.builds(Summary, st.dictionaries(text, param, max_size=4)),
    Kind.GAP: st.builds(Gap, st.integers(1, MAX_COUNT), st.from_regex(r"\A[a-z_]{1,64}\Z")),
}
step = st.none() | st.integers(0, MAX_STEP)


def records(payload: st.SearchStrategy[Payload]) -> st.SearchStrategy[Record]:
    return st.builds(Record, st.integers(0, MAX_COUNT), st.floats(0, 1e11), step, step, payload)


any_record = st.one_of(*map(records, payloads.values()))


def same(a: Any, b: Any) -> bool:
    """Equality by bits: NaN equals NaN, 0.0 is not -0.0, 1 is not 1.0 or True."""
    if isinstance(a, msgspec.Struct):
        return type(a) is type(b) and same(msgspec.structs.astuple(a), msgspec.structs.astuple(b))
    if isinstance(a, float):
        return type(b) is float and struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("kind", payloads)
def test_every_kind_of_record_survives_its_frame(kind: Kind) -> None:
    @given(records(payloads[kind]))
    def check(record: Record) -> None:
        data = encode_frame(record)

        (frame,) = scan_frames(data)

        assert (frame.kind, frame.start, frame.end) == (kind, 0, len(data))
        assert same(decode_body(data[frame.body : frame.end]), record)

    check()


def test_every_kind_has_a_payload() -> None:
    assert set(payloads) == set(Kind)


def test_the_layout_of_a_frame_is_the_documented_one() -> None:
    data = encode_frame(Record(7, 1.5, None, 2, Metrics({"a": math.inf})))

    crc, size, kind = struct.unpack_from("<IIB", data)
    assert (size, kind, crc) == (len(data) - 9, 1, zlib.crc32(data[4:]))
    assert msgspec.msgpack.decode(data[9:]) == [7, 1.5, None, 2, [1, {"a": math.inf}]]


def test_nan_keeps_its_sign_and_payload_bits() -> None:
    odd = struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_DEAD_BEEF))[0]
    record = decode_body(frames_in(encode_frame(Record(0, 0.0, 0, None, Metrics({"x": odd}))))[0])
    assert isinstance(record.payload, Metrics)
    assert struct.pack("<d", record.payload.values["x"]) == struct.pack("<d", odd)


@given(st.lists(any_record, min_size=1, max_size=5), st.data())
def test_a_cut_buffer_yields_the_whole_frames_before_the_cut(items: list[Record], data: st.DataObject) -> None:
    frames = [encode_frame(r) for r in items]
    buffer = b"".join(frames)
    cut = data.draw(st.integers(0, len(buffer)))
    whole = sum(sum(map(len, frames[: i + 1])) <= cut for i in range(len(frames)))

    found = list(scan_frames(buffer[:cut]))

    assert len(found) == whole
    assert [f.end for f in found] == [sum(map(len, frames[: i + 1])) for i in range(whole)]


@settings(max_examples=200)
@given(st.lists(any_record, min_size=1, max_size=4), st.data())
def test_a_flipped_bit_is_never_read_as_data(items: list[Record], data: st.DataObject) -> None:
    frames = [encode_frame(r) for r in items]
    buffer = bytearray(b"".join(frames))
    bit = data.draw(st.integers(0, len(buffer) * 8 - 1))
    hit = next(i for i in range(len(frames)) if bit // 8 < sum(map(len, frames[: i + 1])))
    buffer[bit // 8] ^= 1 << bit % 8

    sound: list[Frame] = []
    offset = None
    try:
        sound.extend(scan_frames(bytes(buffer)))
    except CorruptFrameError as e:
        offset = e.offset

    assert offset in (None, sum(map(len, frames[:hit])))
    # A size that grew beyond the end looks like a frame that is still being written.
    assert len(sound) == hit
    assert [bytes(buffer[f.start : f.end]) for f in sound] == frames[:hit]


def test_scanning_starts_at_an_offset() -> None:
    first, second = (
        encode_frame(Record(0, 0.0, 0, None, Text("a", "b"))),
        encode_frame(Record(1, 0.0, 0, None, Text("c", "d"))),
    )
    (frame,) = scan_frames(first + second, len(first))
    assert (frame.start, frame.end) == (len(first), len(first) + len(second))


def test_a_record_that_is_too_large_is_refused() -> None:
    encode_frame(Record(0, 0.0, 0, None, Text("k", "x" * (MAX_BODY_BYTES - 100))))
    with pytest.raises(ValueError, match=str(MAX_BODY_BYTES)):
        encode_frame(Record(0, 0.0, 0, None, Text("k", "x" * MAX_BODY_BYTES)))


def test_fields_that_a_newer_minor_version_adds_at_the_end_are_ignored() -> None:
    body = msgspec.msgpack.encode([3, 1.0, 5, None, [4, "key", "text", "a new field"], "another"])
    assert decode_body(body) == Record(3, 1.0, 5, None, Text("key", "text"))


def test_a_kind_of_a_newer_version_is_still_a_sound_frame() -> None:
    body = msgspec.msgpack.encode([0, 1.0, None, None, [42, "x"]])
    crc = zlib.crc32(body, zlib.crc32(struct.pack("<IB", len(body), 42)))

    (frame,) = scan_frames(struct.pack("<IIB", crc, len(body), 42) + body)

    assert frame.kind == 42
    with pytest.raises(msgspec.ValidationError):
        decode_body(body)


KEYS = {
    "plain": "train/loss",
    "one character": "a",
    "1,000 characters": "k" * 1000,
    "spaces inside and around": " train loss ",
    "Persian with a zero-width non-joiner": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "a no-break space": "train\u00a0loss",
    "an ideographic space": "\u8a13\u7df4\u3000\u640d\u5931",
    "an emoji composed with zero-width joiners": "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "a flag": "\U0001f1e9\U0001f1ea",
    "an emoji with a variation selector": "\u2764\ufe0f",
    "a combining accent": "e\u0301",
    "a soft hyphen": "grad\u00adient",
    "a private-use character": "\ue000",
    "the last code point": "\U0010ffff",
}
NO_KEYS = {
    "empty": "",
    "1,001 characters": "k" * 1001,
    "NUL": "a\0b",
    "a tab": "a\tb",
    "a newline": "a\nb",
    "a newline at the end": "a\n",
    "an escape": "\x1b[31m",
    "DEL": "a\x7f",
    "U+0080": "a\x80",
    "next line, U+0085": "a\x85b",
    "U+009F": "a\x9f",
    "line separator": "a\u2028b",
    "paragraph separator": "a\u2029b",
    "a lone high surrogate": "a\ud800",
    "a lone low surrogate": "\udfffa",
    "two surrogates": "\ud83d\ude00",
}


@pytest.mark.parametrize("what", KEYS)
def test_a_key_may_be_written_in_any_script(what: str) -> None:
    assert key_problem(KEYS[what]) is None


@pytest.mark.parametrize("what", NO_KEYS)
def test_a_key_has_no_control_characters_and_no_surrogates_and_is_not_too_long(what: str) -> None:
    problem = key_problem(NO_KEYS[what])
    assert problem is not None
    assert "expected" in problem
    assert problem.isprintable()
    assert len(problem) < 200


@given(st.text(st.characters(), max_size=1010))
def test_the_rule_of_keys_is_the_one_that_the_unicode_standard_states(key: str) -> None:
    fine = 1 <= len(key) <= 1000 and not any(unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in key)
    assert (key_problem(key) is None) == fine


def test_the_kind_of_every_payload_is_the_number_in_its_encoding() -> None:
    assert set(KIND_OF.values()) == set(Kind)
    for payload_class, kind in KIND_OF.items():
        assert payload_class.__struct_config__.tag == kind
        assert payload_class.__name__.upper() == kind.name
