# SPDX-License-Identifier: Apache-2.0
"""Any bytes get a declared answer of the decoder and the gate, and all ways of reading frames agree on them.

`tests/by_hand/fuzz_decoder.py` looks for bytes that do not, for as long as one likes.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.decoder_rules import check_decoder, real_bodies, real_requests
from tests.hostile.test_fuzz import Fuzzer


@pytest.mark.parametrize("number", range(len(real_requests()) + len(real_bodies())))
def test_what_an_honest_sender_makes_passes(number: int) -> None:
    check_decoder([*real_requests(), *real_bodies()][number])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_get_an_answer_that_is_declared(data: bytes) -> None:
    check_decoder(data)


@pytest.mark.parametrize("seed", range(3))
def test_changed_requests_and_records_get_an_answer_that_is_declared(seed: int) -> None:
    fuzzer, choose = Fuzzer(seed), random.Random(seed)
    for _ in range(400):
        check_decoder(fuzzer.changed(choose.choice([*real_requests(), *real_bodies()])))
