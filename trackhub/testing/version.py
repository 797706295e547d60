# SPDX-License-Identifier: Apache-2.0
"""The version of the contract kit."""

from __future__ import annotations

__all__ = ["KIT_VERSION"]

KIT_VERSION = 1
"""Raised when a backend that passed may fail: a check was added or made stricter.

``Backend.contract`` names the version that a backend passed, and ``trackhub backends`` shows it."""
