# SPDX-License-Identifier: Apache-2.0
"""The lane: the thread that moves records from the journal into one backend."""
