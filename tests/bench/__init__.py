# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: one FLARE job, tracked by FLARE itself and by trackhub, side by side: ``python -m tests.bench``."""
