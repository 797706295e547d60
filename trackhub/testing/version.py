# SPDX-License-Identifier: Apache-2.0
"""The version of the contract kit."""

from __future__ import annotations

__all__ = ["KIT_VERSION"]

KIT_VERSION = 1
"""This number rises when a check is added or made stricter, so that a backend that passed before may fail.

``Backend.contract`` names the version that a backend passed, and ``trackhub backends`` shows it."""
