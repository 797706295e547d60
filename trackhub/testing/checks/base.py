# SPDX-License-Identifier: Apache-2.0
"""What every group of the contract is built on: the author's hooks, and the fixtures that drive a backend."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from trackhub import registry
from trackhub.delivery.wire import Chunk
from trackhub.records import Artifact, Image, Payload
from trackhub.run import RunInfo, RunStatus, Side
from trackhub.spi import Backend, Capabilities, ConfirmedBy, Entry, JobInfo
from trackhub.testing.author import ContractHooks, StoreContext
from trackhub.testing.fault_proxy import Watch
from trackhub.testing.log_calls import Call, Stream
from trackhub.testing.readback import ReadBack
from trackhub.testing.receiver_rig import KitRig
from trackhub.testing.scenarios import Gallery

__all__ = ["QUICK_ENV", "ContractBase", "Kit"]

QUICK_ENV = "TRACKHUB_CONTRACT_QUICK"
"""Set to 1, the kit is quick: fewer points in the volume test, fewer rounds in the others."""

_GALLERY = pytest.StashKey[Gallery | Exception]()


class Kit:
    """Makes receivers for one test, and ends those that a failed test leaves behind.

    Attributes:
        store: folder that the options of all of a test's receivers may point into.
        quick: whether to do with less.
    """

    def __init__(self, hooks: ContractHooks, folder: Path) -> None:
        """Work in this folder."""
        self.hooks = hooks
        self.store = folder / "store"
        self.store.mkdir()
        self.quick = os.environ.get(QUICK_ENV, "") not in ("", "0")
        self._folder = folder
        self._rigs: list[KitRig] = []

    def rig(
        self,
        *,
        job: str | None = None,
        side: Side = Side.SERVER,
        watch: Watch | None = None,
        shared: bool = False,
        options: dict[str, Any] | None = None,
        deliver: bool = True,
    ) -> KitRig:
        """Return a receiver with a run folder of its own; it is not started.

        Args:
            job: its job; by default one of its own.
            side: where it is.
            watch: the faults that it shall meet.
            shared: use the options with which several receivers write to one store.
            options: more options.
            deliver: False for a receiver that only fills the journal.
        """
        root = self._folder / f"receiver-{len(self._rigs)}"
        root.mkdir()
        given = (self.hooks.shared_options if shared else self.hooks.options)(self.store)
        rig = KitRig(
            self.hooks,
            root,
            {**given, **(options or {})},
            job=job or f"job-{uuid4().hex[:8]}",
            side=side,
            watch=watch,
            deliver=deliver,
        )
        return self.keep(rig)

    def keep(self, rig: KitRig) -> KitRig:
        """Have this receiver ended with the test."""
        self._rigs.append(rig)
        return rig

    def close(self) -> None:
        """End what is left running."""
        for rig in self._rigs:
            rig.close()

    def capabilities(self) -> Capabilities:
        """Return what the backend claims with the options of a receiver."""
        backend, _ = self._backend()
        try:
            backend.preflight()
            return backend.capabilities
        finally:
            backend.close()

    def _backend(self) -> tuple[Backend[Any], StoreContext]:
        root = self._folder / f"direct-{uuid4().hex[:8]}"
        options = {**self.hooks.options(self.store), **self.hooks.extra_options}
        context = StoreContext(root / self.hooks.name, JobInfo(f"job-{uuid4().hex[:8]}"), Side.SERVER, options=options)
        context.workdir.mkdir(parents=True)
        self.hooks.prepare(context)
        cls = self.hooks.backend
        return cls(registry.build_options(self.hooks.name, cls, options), context), context

    def without_core(self, batches: Sequence[Sequence[Call]], site: str = "site-1") -> ReadBack:
        """Hand calls to the backend as they are, past the core that would have refused or fitted them.

        Raises:
            Exception: whatever the backend raises on them.
        """
        backend, context = self._backend()
        info = RunInfo(context.job, site, Side.SERVER, 0.0, 0, context.workdir.parent / "blobs")
        stream = Stream(context.job.id)
        try:
            backend.preflight()
            run = backend.open_run(info)
            try:
                for calls in batches:
                    run.write(_entries(stream, calls, info))
                if backend.capabilities.confirmed_by is ConfirmedBy.FLUSH:
                    run.flush()
            finally:
                run.finish(RunStatus.FINISHED)
        finally:
            backend.close()
        return self.hooks.read_back(info, context)


def _entries(stream: Stream, calls: Sequence[Call], info: RunInfo) -> list[Entry]:
    first = len(stream.calls)
    timed, chunks, _ = stream.append(calls)
    blobs: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        blobs.setdefault(chunk.name, []).append(chunk)
    info.blob_dir.mkdir(parents=True, exist_ok=True)
    for name, parts in blobs.items():
        (info.blob_dir / name).write_bytes(b"".join(part.data for part in parts))
    entries = []
    for position, call in enumerate(timed, first):
        assert call.time is not None
        payload: Payload = call.payload
        if isinstance(payload, Image | Artifact):
            payload = stream.with_blob(position, call)
        entries.append(Entry(position, call.time, call.step, call.round, payload, stream.id, position))
    return entries


class ContractBase(ContractHooks):
    """The fixtures. They belong to the kit."""

    @pytest.fixture
    def kit(self, tmp_path: Path) -> Iterator[Kit]:
        """Receivers for one test."""
        folder = tmp_path / "kit"
        folder.mkdir()
        kit = Kit(self, folder)
        yield kit
        kit.close()

    @pytest.fixture
    def gallery(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
        """All scenarios, delivered once for the class."""
        owner = request.node.getparent(pytest.Class)
        assert owner is not None
        made: Gallery | Exception | None = owner.stash.get(_GALLERY, None)
        if made is None:
            store = tmp_path_factory.mktemp("store")
            try:
                made = Gallery(self, tmp_path_factory.mktemp("gallery"), store)
            except Exception as error:  # noqa: BLE001 - every test that needs the gallery must fail with it
                made = error
            owner.stash[_GALLERY] = made
        if isinstance(made, Exception):
            raise made
        return made
