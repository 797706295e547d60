# SPDX-License-Identifier: Apache-2.0
"""Makes ``python -m trackhub.cli`` the same as the command ``trackhub``."""

from __future__ import annotations

from trackhub.cli import main

main()
