# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from trackhub.testing.contracts.jsonl import JsonlContract


class TestJsonl(JsonlContract):
    pass
