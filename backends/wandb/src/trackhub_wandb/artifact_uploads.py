# SPDX-License-Identifier: Apache-2.0
"""The artifacts of an online run on their way to the server. Each waits, fails and is sent again by itself.

`OnlineRun` calls it: from the lane's second thread for logged artifacts, and in ``flush`` for those of tables. The SDK
hands an artifact to its service, which uploads it and then says how that went.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any

from trackhub.spi import PermanentError, TransientError

if TYPE_CHECKING:
    from collections.abc import Callable

    from wandb.sdk.artifacts.artifact import Artifact as SdkArtifact

__all__ = ["MAX_REFUSALS", "ArtifactUpload"]

MAX_REFUSALS = 3
"""How often a server must refuse an artifact, while it answers other questions, before the artifact is given up."""

_FOR_GOOD = re.compile(r"\b(?:400|409|413|415|422)\b")
"""HTTP statuses that neither time nor a login can mend. 401 and 403 are not included: the operator can renew a
login."""


class ArtifactUpload:
    """One artifact on its way to the server. The SDK gets it again if the server refused it.

    Used by one thread at a time.

    Attributes:
        refusals: how often the server refused it.
    """

    def __init__(self, log: Callable[[], SdkArtifact], logged: SdkArtifact | None = None) -> None:
        """Prepare an upload.

        Args:
            log: hands the artifact to the SDK, and returns it. Called once for each attempt.
            logged: the artifact, if the SDK has it already.
        """
        self.refusals = 0
        self._refusals_for_good = 0
        self._log = log
        self._attempt = None if logged is None else _Attempt(logged._save_handle)

    def wait(self, timeout_s: float) -> None:
        """Wait until the server has the artifact. Hand it to the SDK first if no upload is under way.

        A timeout does not end the upload: the next call waits for the same one.

        Raises:
            TransientError: the server does not have it yet, or refused it.
            PermanentError: the server refused it for good several times.
            Exception: the SDK failed. Its errors have no common base class.
        """
        if self._attempt is None:
            self._attempt = _Attempt(self._log()._save_handle)
        if not self._attempt.ended.wait(timeout_s):
            raise TransientError("the artifact is still on its way to W&B", retry_after_s=0.1)
        attempt, self._attempt = self._attempt, None
        if attempt.error is not None:
            raise attempt.error
        if not attempt.refusal:
            return
        self.refusals += 1
        self._refusals_for_good += bool(_FOR_GOOD.search(attempt.refusal))
        if self._refusals_for_good >= MAX_REFUSALS:
            raise PermanentError(f"W&B refused the artifact {self.refusals} times: {attempt.refusal}")
        raise TransientError(f"W&B refused the artifact: {attempt.refusal}. It is sent again")


class _Attempt:
    """Waits for the SDK's answer without ending the upload: the handle's own wait cancels it after a timeout."""

    def __init__(self, handle: Any) -> None:
        self.ended = threading.Event()
        self.error: Exception | None = None
        self.refusal = ""
        self._handle = handle
        if handle is None:
            self.ended.set()
        else:
            handle.asyncer.run_soon(self._wait, daemon=True)

    async def _wait(self) -> None:
        try:
            result = await self._handle.wait_async(timeout=None)
            self.refusal = result.response.log_artifact_response.error_message
        except Exception as error:  # noqa: BLE001  # the SDK's errors have no common base class
            self.error = error
        finally:
            self.ended.set()
