# SPDX-License-Identifier: Apache-2.0
"""What the author of a backend fills in: the class, its options, another door to its store, and its canonical form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from trackhub.run import RunInfo, RunStatus
from trackhub.spi import Backend, BackendContext, Kind
from trackhub.testing.outages import FolderPeer, Peer
from trackhub.testing.readback import ReadBack

__all__ = ["SECRET_ENV", "ContractHooks", "StoreContext"]

SECRET_ENV = "TRACKHUB_CONTRACT_SECRET"
"""The environment variable in which a test plants a token; an option refers to it as ``${secret:…}``."""


class StoreContext(BackendContext, frozen=True, kw_only=True):
    """Where the backend works, and with which options.

    Attributes:
        options: of this receiver, as plain values: those of ``options`` or ``shared_options``.
    """

    options: Mapping[str, Any]


class ContractHooks:
    """The part of a contract class that is its author's. ``backend`` and ``read_back`` are required.

    Everything else in a contract class belongs to the kit. Helpers of your own begin with an underscore, tests of your
    own with ``test_``; a pytest fixture may have any name that the kit does not use.

    A new instance is made for every test, and no hook may rely on what another one left in ``self``. A server that the
    backend needs is best started in a fixture of class or module scope, which puts its address where ``options`` can
    find it.

    Attributes:
        backend: the class under test.
        name: the name that the backend is installed under; its folder in the job's run folder is called so.
        cannot_tell: what this store cannot tell, with the reason: a field of `ReadBack` (``"tags"``), or an attribute
            of its items (``"texts.step"``, ``"points.time"``). What the store can tell after all must not be here.
        secret_env: environment variables that this backend takes secrets from.
        secret_options: options that hold a secret: option to value, with ``${secret:TRACKHUB_CONTRACT_SECRET}`` in it.
        extra_options: options that ``trackhub check --option`` gave; they win over those of ``options``.
        deadline_s: seconds that one receiver may need at most, to start and to end.
        patience_s: seconds within which every call must return, whatever the peer does.
    """

    backend: ClassVar[type[Backend[Any]]]
    name: ClassVar[str] = "backend"
    cannot_tell: ClassVar[Mapping[str, str]] = {}
    secret_env: ClassVar[Sequence[str]] = ()
    secret_options: ClassVar[Mapping[str, str]] = {}
    extra_options: ClassVar[Mapping[str, Any]] = {}
    deadline_s: ClassVar[float] = 30.0
    patience_s: ClassVar[float] = 20.0

    def options(self, tmp_path: Path) -> Mapping[str, Any]:
        """Return the options of one receiver, as plain values.

        Args:
            tmp_path: an empty folder of this test's own, for a store that does not lie in the receiver's run folder.
        """
        return {}

    def shared_options(self, tmp_path: Path) -> Mapping[str, Any]:
        """Return options with which receivers that have different run folders write to one store, if that can be.

        Args:
            tmp_path: the same folder for all of them.
        """
        return self.options(tmp_path)

    def prepare(self, context: StoreContext) -> None:
        """Called before a receiver is started: a place to copy a template of a store to, if making one takes long."""

    def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack:
        """Return what the store holds of this run, without the plugin's code: by its API, its files, its database.

        The run may be open, or its writer may have been killed.

        Args:
            run: which run; ``run.blob_dir`` is not for reading back.
            context: where the backend works, and with which options.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement read_back(run, context)")

    def peer(self, context: StoreContext) -> Peer:
        """Return what the backend writes to, so that the kit can make it fail and heal.

        By default it is the backend's folder. For a backend that writes elsewhere nothing fails then, and nothing is
        proved: give the real peer.
        """
        return FolderPeer(context.workdir)

    def canonical_value(self, value: float) -> float:
        """Return how the store keeps a metric's value: as it is, rounded to float32, ..."""
        return value

    def canonical_step(self, step: int) -> int:
        """Return how the store keeps a step."""
        return step

    def canonical_time(self, time: float) -> float:
        """Return how the store keeps a time: as it is, in whole milliseconds, ..."""
        return time

    def canonical_key(self, kind: Kind, key: str) -> str:
        """Return how the store names a key that the core has made acceptable to it. Two keys never become one."""
        return key

    def canonical_params(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return how the store keeps a run's params: as they are, as text, nested ones flattened, ..."""
        return params

    def canonical_cell(self, value: Any) -> Any:
        """Return how the store keeps the cell of a table."""
        return value

    def canonical_status(self, status: RunStatus) -> str:
        """Return the store's own word for a status. FINISHED and FAILED never become one."""
        return status.value
