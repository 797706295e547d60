# SPDX-License-Identifier: Apache-2.0
"""Backends that leave something behind, and contract classes that are not whole."""

from __future__ import annotations

import io
import logging
import os
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy

from tests.contract.mutants.base import (
    ANYTHING,
    Bad,
    Tampered,
    caught_by,
)
from trackhub.builtin.jsonl import JsonlOptions
from trackhub.spi import (
    Entry,
    OptionMark,
    RunInfo,
)


@caught_by("test_secrets_are_nowhere")
class WritesTheTokenToDisk(Bad):
    def open_run(self, info: RunInfo) -> Any:
        (self.context.workdir / "environment.txt").write_text(repr(dict(os.environ)))
        return super().open_run(info)


@caught_by("test_secrets_are_nowhere")
class LogsTheToken(Bad):
    def open_run(self, info: RunInfo) -> Any:
        logging.getLogger("acme.client").debug("logging in with %s", os.environ.get("TRACKHUB_CONTRACT_SECRET"))
        return super().open_run(info)


class _TokenOptions(JsonlOptions, frozen=True, forbid_unknown_fields=True):
    token: Annotated[str, OptionMark.SECRET] = ""


@caught_by("test_secrets_are_nowhere", secret_options={"token": "${secret:TRACKHUB_CONTRACT_SECRET}"})
class PrintsItsOptions(Bad):
    Options = _TokenOptions

    def preflight(self) -> None:
        print(f"acme uses {msgspec.structs.asdict(self.options)['token']!s}", file=sys.stderr)
        super().preflight()


@caught_by("test_no_thread_is_left", patience_s=1.0)
class LeaksAThread(Bad):
    def open_run(self, info: RunInfo) -> Any:
        threading.Thread(target=threading.Event().wait, args=(60.0,), daemon=True).start()
        return super().open_run(info)


_LEAKED: list[io.IOBase] = []


@caught_by("test_no_file_is_left_open", patience_s=1.0)
class LeaksAFile(Bad):
    def open_run(self, info: RunInfo) -> Any:
        run = super().open_run(info)
        _LEAKED.append((self.context.workdir / f"lock-{info.run_id}").open("wb"))
        return run


_PROCESSES: list[subprocess.Popen[bytes]] = []


@caught_by("test_no_process_is_left", patience_s=1.0)
class LeaksAProcess(Bad):
    def open_run(self, info: RunInfo) -> Any:
        _PROCESSES.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"]))
        return super().open_run(info)


@caught_by("test_random_generators_are_left_alone")
class NamesRunsByChance(Bad):
    def open_run(self, info: RunInfo) -> Any:
        random.random()
        return super().open_run(info)


@caught_by("test_random_generators_are_left_alone")
class SamplesWithNumpy(Bad):
    def open_run(self, info: RunInfo) -> Any:
        numpy.random.random()
        return super().open_run(info)


class _Bounded(Tampered):
    taken = 0

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        room = max(0, 900 - self.taken)
        self.taken += len(batch)
        return list(batch[:room])


@caught_by("test_volume")
class HoldsNoMoreThanSoMany(Bad):
    run = _Bounded


class _Misspelt(Tampered):
    def flsh(self) -> None:
        """Nobody calls this."""


@caught_by("test_no_method_is_misspelt")
class MisspellsFlush(Bad):
    run = _Misspelt


@caught_by("test_no_method_is_misspelt")
class MisspellsPreflight(Bad):
    def preflght(self) -> None:
        """Nobody calls this."""


def _nothing(self: Any) -> None:
    """Passes."""


@caught_by("test_contract_is_whole", test_order_is_kept=None)
class RemovesATest(Bad):
    pass


@caught_by("test_contract_is_whole", test_extreme_numbers=_nothing)
class ReplacesATest(Bad):
    pass


@caught_by("test_contract_is_whole", read_bakc=_nothing)
class MisspellsAHook(Bad):
    pass


@caught_by("test_kind_as_declared[tags]", also=ANYTHING, cannot_tell={"tags": "for no reason"})
class SaysItCannotTell(Bad):
    pass
