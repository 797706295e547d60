# SPDX-License-Identifier: Apache-2.0
"""Lets ``python -m trackhub.cli`` do what the command ``trackhub`` does."""

from __future__ import annotations

from trackhub.cli import main

main()
