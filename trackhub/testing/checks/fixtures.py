# SPDX-License-Identifier: Apache-2.0
"""The pytest fixtures of the contract kit: what a check gets in order to drive the backend under test.

The classes of checks derive from `ContractFixtures`. The fixture ``kit`` makes receivers for one check. The fixture
``scenarios`` is the job in which all scenarios were delivered.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from trackhub import registry
from trackhub.delivery.wire import Chunk
from trackhub.job_and_run_info import JobInfo, RunInfo, RunStatus, Side
from trackhub.records import Artifact, Image, Params
from trackhub.spi import Backend, Capabilities, ConfirmedBy, Entry, Kind
from trackhub.testing.contract_hooks import ContractHooks, StoreContext
from trackhub.testing.faulty_backend import FaultyBackend
from trackhub.testing.readback import ReadBack
from trackhub.testing.receiver_rig import ReceiverRig
from trackhub.testing.sample_calls_and_requests import Call, FuturePayload, Stream, new_job
from trackhub.testing.scenario_delivery import DeliveredScenarios

__all__ = ["QUICK_ENV", "ContractFixtures", "Kit", "one_param"]

QUICK_ENV = "TRACKHUB_CONTRACT_QUICK"
"""Set to 1, it makes the kit quicker: the checks of large batches and of volume log fewer points."""

_SCENARIOS = pytest.StashKey[DeliveredScenarios | Exception]()


class Kit:
    """Makes receivers for one check, and ends those that a failed check leaves behind.

    Attributes:
        hooks: the contract class.
        store: a folder for one check. The options of all its receivers may name paths in it.
        is_quick: True to log fewer points.
    """

    def __init__(self, hooks: ContractHooks, folder: Path) -> None:
        """Work in this folder, which is empty."""
        self.hooks = hooks
        self.store = folder / "store"
        self.store.mkdir()
        self.is_quick = os.environ.get(QUICK_ENV, "") not in ("", "0")
        self._folder = folder
        self._rigs: list[ReceiverRig] = []

    def rig(
        self,
        *,
        job: JobInfo | None = None,
        side: Side = Side.SERVER,
        proxy: FaultyBackend | None = None,
        shared: bool = False,
        options: dict[str, Any] | None = None,
        deliver: bool = True,
    ) -> ReceiverRig:
        """Return a receiver with a run folder of its own. It is not started.

        Args:
            job: its job; by default a new one.
            side: where it is.
            proxy: the faults that its backend meets; none by default.
            shared: use the options with which several receivers write to one store.
            options: more options.
            deliver: False for a receiver that only fills its journal.
        """
        root = self._folder / f"receiver-{len(self._rigs)}"
        root.mkdir()
        given = (self.hooks.shared_options if shared else self.hooks.options)(self.store)
        all_options = {**given, **(options or {})}
        rig = ReceiverRig(self.hooks, root, all_options, job=job or new_job(), side=side, proxy=proxy, deliver=deliver)
        return self.keep(rig)

    def again(self, rig: ReceiverRig) -> ReceiverRig:
        """Return another receiver on the same journal and store, started."""
        return self.keep(rig.again()).start()

    def keep(self, rig: ReceiverRig) -> ReceiverRig:
        """End this receiver with the check. Return it."""
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

    def without_core(self, calls: Sequence[Call], site: str = "site-1") -> ReadBack:
        """Hand calls to the backend without the core, which would reject or fit them. Return what is stored.

        Args:
            calls: what to write, in one batch.
            site: whose run to write.

        Raises:
            Exception: whatever the backend raises.
        """
        backend, context = self._backend()
        info = RunInfo(context.job, site, Side.SERVER, 0.0, 0, context.run_folder / "blobs")
        try:
            backend.preflight()
            run = backend.open_run(info)
            try:
                run.write(_entries(Stream(context.job.id), calls, info))
                if backend.capabilities.confirmed_by is ConfirmedBy.FLUSH:
                    run.flush()
            finally:
                run.finish(RunStatus.FINISHED)
        finally:
            backend.close()
        return self.hooks.read_back(info, context)

    def _backend(self) -> tuple[Backend[Any], StoreContext]:
        root = self._folder / f"direct-{uuid4().hex[:8]}"
        options = {**self.hooks.options(self.store), **self.hooks.extra_options}
        context = StoreContext(root / self.hooks.name, new_job(), Side.SERVER, options=options)
        context.workdir.mkdir(parents=True)
        self.hooks.prepare(context)
        cls = self.hooks.backend
        return cls(registry.build_options(self.hooks.name, cls, options), context), context


def _entries(stream: Stream, calls: Sequence[Call], info: RunInfo) -> list[Entry]:
    """Return the calls as entries, their blobs in the run's blob folder."""
    timed, chunks, _ = stream.append(calls)
    blobs: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        blobs.setdefault(chunk.name, []).append(chunk)
    info.blob_dir.mkdir(parents=True, exist_ok=True)
    for name, parts in blobs.items():
        (info.blob_dir / name).write_bytes(b"".join(part.data for part in parts))
    entries = []
    for position, call in enumerate(timed):
        assert call.time is not None
        payload = call.payload
        if isinstance(payload, Image | Artifact):
            payload = stream.with_blob(position, call)
        assert not isinstance(payload, FuturePayload)
        entries.append(Entry(position, call.time, call.step, call.round, payload, stream.id, position))
    return entries


def one_param(can: Capabilities) -> list[Call]:
    """Return a call that logs a param, if the backend claims params. Some stores show a status only beside params."""
    return [Call(Params({"lr": 0.5}))] if Kind.PARAMS in can.kinds else []


class ContractFixtures(ContractHooks):
    """The fixtures. They belong to the kit."""

    @pytest.fixture
    def kit(self, tmp_path: Path) -> Iterator[Kit]:
        """Receivers for one check."""
        folder = tmp_path / "kit"
        folder.mkdir()
        kit = Kit(self, folder)
        yield kit
        kit.close()

    @pytest.fixture
    def scenarios(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DeliveredScenarios:
        """All scenarios, delivered once for the class."""
        owner = request.node.getparent(pytest.Class)
        assert owner is not None
        delivered: DeliveredScenarios | Exception | None = owner.stash.get(_SCENARIOS, None)
        if delivered is None:
            store = tmp_path_factory.mktemp("store")
            try:
                delivered = DeliveredScenarios(self, tmp_path_factory.mktemp("scenarios"), store)
            except Exception as error:  # noqa: BLE001 - every check that needs the scenarios must fail with it
                delivered = error
            owner.stash[_SCENARIOS] = delivered
        if isinstance(delivered, Exception):
            raise delivered
        return delivered
