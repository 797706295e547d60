# SPDX-License-Identifier: Apache-2.0
"""The browser of the tests: Debian's `chromium`, or another one in PATH. It is no Python package."""

from __future__ import annotations

import shutil

import pytest

__all__ = ["CHROMIUM", "FLAGS", "needs_chromium"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install -y chromium")
