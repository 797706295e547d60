# SPDX-License-Identifier: Apache-2.0
"""Backends that are wrong, each in one way, and the test of the contract kit that is meant for it.

Every one is the good file backend with one thing changed. ``test_kit_catches.py`` runs them.
"""

from __future__ import annotations

from tests.contract.mutants import delivery, leftovers, runs, stored
from tests.contract.mutants.base import MUTANTS, Mutant

__all__ = ["MUTANTS", "Mutant", "delivery", "leftovers", "runs", "stored"]
