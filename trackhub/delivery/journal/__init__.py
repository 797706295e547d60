# SPDX-License-Identifier: Apache-2.0
"""The receiver's journal: one SQLite file per receiver, the job's complete local record.

``journal`` writes it, and ``tables_and_rows`` says what its tables hold. ``report_builder`` makes the delivery report,
and ``read_only`` reads a journal beside a running receiver. ``repair`` rebuilds a damaged journal.
``find_journals_and_spools`` finds journals and spools on a disk.
"""
