# SPDX-License-Identifier: Apache-2.0
"""What the author of a backend fills in: the class, its options, and another way to read its store.

A contract class derives from `BackendContract`, and through it from `ContractHooks`. Checks, rigs and the comparison of
what is stored call the hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from trackhub.job_and_run_info import RunInfo, RunStatus
from trackhub.spi import Backend, BackendContext, Kind
from trackhub.testing.readback import ReadBack
from trackhub.testing.store_outage import FolderOutage, Outage

__all__ = ["SECRET_ENV", "ContractHooks", "StoreContext"]

SECRET_ENV = "TRACKHUB_CONTRACT_SECRET"
"""The environment variable that holds a token during a check. Options refer to it as ``${secret:...}``."""


class StoreContext(BackendContext, frozen=True, kw_only=True):
    """Where the backend works, and with which options.

    Attributes:
        options: the receiver's options of the backend, as plain values.
    """

    options: Mapping[str, Any]


class ContractHooks:
    """The part of a contract class that its author fills in. ``backend`` and ``read_back`` are required.

    Everything else in a contract class belongs to the kit. Helpers of your own begin with an underscore, and tests of
    your own with ``test_``. A pytest fixture may have any name that the kit does not use.

    Every check gets a new object, so no hook may rely on what another one left in ``self``. Start a server that the
    backend needs in a fixture of class or module scope. The fixture puts its address where ``options`` can find it.

    Attributes:
        backend: the class under test.
        name: the name that the backend is installed under. Its folder in the job's run folder has this name.
        cannot_tell: what this store cannot tell -> the reason. A key is a field of `ReadBack` (``"tags"``) or an
            attribute of its items (``"texts.step"``, ``"points.time"``). A check fails if the store can tell it after
            all.
        secret_env: environment variables that the backend takes secrets from.
        secret_options: options that hold a secret: option -> value, with ``${secret:TRACKHUB_CONTRACT_SECRET}`` in it.
        extra_options: options that ``trackhub check --option`` gave. They take precedence over ``options``.
        deadline_s: the most seconds that one receiver may take to start, and again to end.
        patience_s: seconds within which every call must return, whatever the store does.
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
            tmp_path: an empty folder for this check, for a store that does not lie in the receiver's run folder.
        """
        return {}

    def shared_options(self, tmp_path: Path) -> Mapping[str, Any]:
        """Return options with which receivers that have different run folders write to one store.

        By default the options of ``options``. That is right for a store that several receivers cannot share.

        Args:
            tmp_path: the same folder for all of them.
        """
        return self.options(tmp_path)

    def prepare(self, context: StoreContext) -> None:
        """Prepare the store before a receiver starts, such as by copying an empty one that takes long to make."""

    def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack:
        """Return what the store holds of this run, read by its API, its files or its database.

        Use none of the plugin's own code: an error in it would hide itself. The run may be open, or its writer may have
        been killed. Any exception means that the run is not there.

        Args:
            run: which run. ``run.blob_dir`` is not for reading back.
            context: where the backend works, and with which options.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement read_back(run, context)")

    def outage(self, context: StoreContext) -> Outage:
        """Return an outage of the store that the backend writes to: the kit begins and ends it.

        By default the backend's folder is taken away. That proves nothing about a backend that writes elsewhere, so
        return an outage of the real store then.
        """
        return FolderOutage(context.workdir)

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
        """Return how ``read_back`` shows a key that the core has fitted to the key rule of its kind.

        It is the key itself, unless the store cannot show that: a file's name may have to differ from the key. Two keys
        never become one.

        Args:
            kind: what was logged under the key.
            key: as the backend received it.
        """
        return key

    def canonical_summary(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return how the store keeps the final values of a run. By default as it keeps params."""
        return self.canonical_params(values)

    def canonical_params(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return how the store keeps a run's params: as they are, as text, nested ones flattened, ..."""
        return params

    def canonical_cell(self, value: Any) -> Any:
        """Return how the store keeps the cell of a table."""
        return value

    def canonical_status(self, status: RunStatus) -> str:
        """Return the store's own word for a status. No other status may share the word of FINISHED."""
        return status.value
