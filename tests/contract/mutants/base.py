# SPDX-License-Identifier: Apache-2.0
"""What mutants are made of: the good file backend, and ways to tamper with what it is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import msgspec

from trackhub.builtin.jsonl import JsonlBackend, JsonlRun
from trackhub.records import KEYED
from trackhub.spi import (
    Backend,
    BackendRun,
    Entry,
    Metrics,
    RunInfo,
    RunStatus,
    WriteReport,
)
from trackhub.testing.contracts.jsonl import JsonlContract

CAN = JsonlBackend.capabilities


class Mutant(NamedTuple):
    """One mutant's contract class, and the checks that must fail on it.

    Attributes:
        file: where the class is.
        name: the class's name.
        caught_by: the checks that are meant for it.
        also: regular expressions of other checks that fail on it, too, since its defect touches them.
    """

    file: str
    name: str
    caught_by: tuple[str, ...]
    also: tuple[str, ...]


MUTANTS: list[Mutant] = []
AnyBackend = TypeVar("AnyBackend", bound=type[Backend[Any]])


def caught_by(*checks: str, also: Sequence[str] = (), **hooks: Any) -> Callable[[AnyBackend], AnyBackend]:
    """Make a contract class for a mutant. ``hooks`` replace those of the good one."""

    def add(cls: AnyBackend) -> AnyBackend:
        name = f"Test{cls.__name__}"
        module = sys.modules[cls.__module__]
        contract = type(name, (JsonlContract,), {"backend": cls, "__module__": cls.__module__, **hooks})
        setattr(module, name, contract)
        MUTANTS.append(Mutant(str(module.__file__), name, checks, tuple(also)))
        return cls

    return add


class Tampered(BackendRun):
    """A good run, before which something is done to the entries."""

    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        self.inner = inner
        self.backend = backend
        self.info = info

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        return list(batch)

    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        if entries := self.tamper(batch):
            self.inner.write(entries)
        return None

    def finish(self, status: RunStatus) -> None:
        self.inner.finish(status)

    def probe(self, entry: Entry) -> None:
        self.inner.probe(entry)

    def next_position(self) -> int:
        return self.inner.next_position()


class Bad(JsonlBackend):
    """A good backend, around whose runs there is a tampered one."""

    run: ClassVar[type[Tampered]] = Tampered

    def open_run(self, info: RunInfo) -> Any:
        return self.run(super().open_run(info), self, info)


ANYTHING = (".*",)
"""For a defect that touches nearly every check."""

HANGS: Any = {"deadline_s": 1.0, "patience_s": 1.0}
"""Short waits, for a mutant that hangs. On a busy machine they are too short for any check, so ``also`` is ANYTHING."""

NEIGHBOURS = (
    "test_record_without_its_content_is_rejected",
    "test_payloads_that_write_does_not_know_are_rejected",
)
"""Checks that also read what is stored beside a rejected record."""


def replace_keys(payload: Any, change: Callable[[str], str]) -> Any:
    if isinstance(payload, KEYED):
        renamed: dict[str, Any] = {change(key): value for key, value in payload.values.items()}
        return type(payload)(renamed)
    return msgspec.structs.replace(payload, key=change(payload.key))


def each(change: Callable[[Entry], Entry | None]) -> type[Tampered]:
    """Return a run that changes or drops each entry by itself."""

    class Each(Tampered):
        def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
            return [kept for entry in batch if (kept := change(entry)) is not None]

    return Each


def payloads(change: Callable[[Any], Any]) -> type[Tampered]:
    """Return a run that changes each payload, or drops the entry where that gives None."""

    def apply(entry: Entry) -> Entry | None:
        payload = change(entry.payload)
        return None if payload is None else msgspec.structs.replace(entry, payload=payload)

    return each(apply)


def keys(change: Callable[[str], str], *kinds: type) -> type[Tampered]:
    """Return a run that renames keys."""
    return payloads(lambda p: replace_keys(p, change) if not kinds or isinstance(p, kinds) else p)


def values(change: Callable[[float], float | None]) -> type[Tampered]:
    """Return a run that changes metric values, or drops those that become None."""

    def apply(payload: Any) -> Any:
        if not isinstance(payload, Metrics):
            return payload
        changed = {key: new for key, value in payload.values.items() if (new := change(value)) is not None}
        return Metrics(changed) if changed else None

    return payloads(apply)


def steps(change: Callable[[int | None], int | None]) -> type[Tampered]:
    """Return a run that changes steps."""
    return each(lambda entry: msgspec.structs.replace(entry, step=change(entry.step)))
