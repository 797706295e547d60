# SPDX-License-Identifier: Apache-2.0
"""The receiver's journal: one SQLite file, its rows, its counts, its repair, and how to find it."""
