# SPDX-License-Identifier: Apache-2.0
"""The receiver's journal: one SQLite file per receiver, the job's complete local record.

``store`` writes it, and ``rows`` is what its tables hold. ``counts`` makes the delivery report of it, and ``read_only``
reads it beside a running receiver. ``repair`` rebuilds a damaged one. ``find`` finds journals and spools on a disk.
"""
