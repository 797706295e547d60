# SPDX-License-Identifier: Apache-2.0
"""Requests and replies are encoded without loss, and only neighbouring versions are compatible."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackhub.delivery import wire
from trackhub.framing import FORMAT_VERSION
from trackhub.records import MAX_COUNT

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
count = st.integers(0, MAX_COUNT)
reason = st.from_regex(r"\A[a-z_]{1,64}\Z")
counts = st.dictionaries(reason, count, max_size=3)
stream = st.from_regex(r"\A[0-9a-f]{32}\Z")
site_counts = st.builds(
    wire.SiteCounts, logged=count, withheld=count, dropped=counts, refused=counts, acked=count, spooled=count
)
requests: dict[str, st.SearchStrategy[wire.Request]] = {
    "hello": st.builds(wire.Hello, st.tuples(count, count)),
    "batch": st.builds(
        wire.Batch, stream, count, count, st.integers(0, wire.MAX_BATCH_RECORDS), st.binary(max_size=100)
    ),
    "chunk": st.builds(wire.Chunk, text, count, text, count, st.binary(max_size=100)),
    "keep-alive": st.builds(wire.KeepAlive, site_counts),
    "final": st.builds(wire.Final, site_counts, st.booleans()),
}
replies: dict[str, st.SearchStrategy[wire.Reply]] = {
    "accepted": st.builds(wire.Accepted, count, text),
    "refused": st.builds(wire.Refused, text, text),
    "busy": st.builds(wire.Busy, text),
    "need_blob": st.builds(wire.NeedBlob, text),
}


@pytest.mark.parametrize("name", requests)
def test_a_decoded_request_equals_the_encoded_one(name: str) -> None:
    @given(requests[name])
    def check(request: wire.Request) -> None:
        assert wire.decode_request(wire.encode(request)) == request

    check()


@pytest.mark.parametrize("name", replies)
def test_a_decoded_reply_equals_the_encoded_one(name: str) -> None:
    @given(replies[name])
    def check(reply: wire.Reply) -> None:
        assert wire.decode_reply(wire.encode(reply)) == reply

    check()


@given(st.binary(max_size=200))
def test_decoding_any_bytes_raises_decode_error_or_nothing(data: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_reply):
        with contextlib.suppress(msgspec.DecodeError):
            decode(data)


def test_fields_added_at_the_end_by_a_newer_minor_version_are_ignored() -> None:
    data = msgspec.msgpack.encode([2, "a" * 32, 0, 1, 1, b"f", "a new field"])
    assert wire.decode_request(data) == wire.Batch("a" * 32, 0, 1, 1, b"f")


@pytest.mark.parametrize(
    ("minor", "major", "compatible"),
    [(0, 0, True), (1, 0, True), (-1, 0, True), (2, 0, False), (0, 1, False), (0, -1, False)],
)
def test_versions_may_be_one_minor_version_apart_and_no_more(minor: int, major: int, compatible: bool) -> None:
    theirs = (FORMAT_VERSION[0] + major, FORMAT_VERSION[1] + minor)
    assert wire.is_compatible(theirs) is compatible


def test_site_counts_are_balanced_when_every_record_has_one_outcome() -> None:
    found = wire.SiteCounts(logged=21, withheld=1, dropped={"a": 2, "b": 3}, refused={"c": 4}, acked=5, spooled=6)
    assert found.is_balanced()
    for field in ("logged", "withheld", "acked", "spooled"):
        assert not msgspec.structs.replace(found, **{field: 7}).is_balanced()
