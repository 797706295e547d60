# SPDX-License-Identifier: Apache-2.0
"""Backends that are wrong, each in one way, and the check of the contract kit that is meant for it.

Each is the good file backend with one thing changed. ``test_kit_catches.py`` runs them.
"""

from __future__ import annotations

from tests.contract.mutants import declared, delivery, keys, leftovers, runs, stored
from tests.contract.mutants.base import MUTANTS, Mutant

__all__ = ["MUTANTS", "Mutant", "declared", "delivery", "keys", "leftovers", "runs", "stored"]
