# SPDX-License-Identifier: Apache-2.0
"""Backends whose class declares something wrong."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from tests.contract.mutants.base import ANYTHING, CAN, Bad, Tampered, caught_by
from trackhub.builtin.jsonl import JsonlBackend, JsonlOptions
from trackhub.spi import Backend, BackendContext, BackendRun, ConfirmedBy, Credentials, OptionMark, Results, RunInfo

BUFFERS = msgspec.structs.replace(CAN, confirmed_by=ConfirmedBy.FLUSH)


@caught_by("test_class_can_be_loaded")
class IsForAnotherSpi(Bad):
    spi = 99


class _Wrapper(Backend[JsonlOptions]):
    """Has the good backend, and is none, so that it inherits nothing from it."""

    contract = 1
    capabilities = CAN

    def __init__(self, options: JsonlOptions, context: BackendContext) -> None:
        super().__init__(options, context)
        self._inner = JsonlBackend(options, context)

    def preflight(self) -> None:
        self._inner.preflight()

    def open_run(self, info: RunInfo) -> BackendRun:
        return self._inner.open_run(info)

    def results(self, info: RunInfo) -> Results | None:
        return self._inner.results(info)


@caught_by("test_class_can_be_loaded", also=ANYTHING)
class DoesNotSayItsSpi(_Wrapper):
    pass


class _OpenOptions(JsonlOptions, frozen=True, forbid_unknown_fields=False):
    pass


@caught_by("test_class_can_be_loaded")
class LetsUnknownOptionsPass(Bad):
    Options = _OpenOptions


@caught_by("test_class_can_be_loaded", also=ANYTHING)
class ForgetsTheBrackets(Backend):  # type: ignore[type-arg]  # the defect
    spi = 1

    def __init__(self, options: JsonlOptions, context: BackendContext) -> None:
        super().__init__(options, context)

    def open_run(self, info: RunInfo) -> BackendRun:
        return JsonlBackend(self.options, self.context).open_run(info)


@caught_by("test_contract_version_exists")
class PassedAContractThatIsNotWritten(Bad):
    contract = 99


@caught_by("test_constructor_does_no_work")
class WorksWhenItIsMade(Bad):
    def __init__(self, options: JsonlOptions, context: BackendContext) -> None:
        super().__init__(options, context)
        (context.workdir / "lock").write_text("mine")


class _TokenOptions(JsonlOptions, frozen=True, forbid_unknown_fields=True):
    api_token: str | None = None


@caught_by("test_options_are_marked")
class DoesNotMarkASecret(Bad):
    Options = _TokenOptions


class _ServerOptions(JsonlOptions, frozen=True, forbid_unknown_fields=True):
    server_url: str = ""


@caught_by("test_options_are_marked")
class DoesNotMarkAHost(Bad):
    Options = _ServerOptions


class _FolderOptions(JsonlOptions, frozen=True, forbid_unknown_fields=True):
    folders: dict[str, str] = {}


@caught_by("test_options_are_marked")
class DoesNotMarkAPath(Bad):
    Options = _FolderOptions


@caught_by("test_flush_as_declared", also=ANYTHING)
class ClaimsAFlushThatItHasNot(Bad):
    capabilities = BUFFERS


@caught_by("test_flush_as_declared", also=ANYTHING)
class DoesNotSayWhoConfirms(Bad):
    capabilities = BUFFERS

    class run(Tampered):
        def flush(self) -> Any:
            return None


@caught_by("test_class_can_be_loaded", also=ANYTHING)
class DeclaresItsCredentialsAsText(Bad):
    credentials = "ACME_TOKEN"  # type: ignore[assignment]  # the defect


@caught_by("test_credentials_are_declared")
class NamesADefaultHostThatIsNone(Bad):
    credentials = Credentials(("ACME_TOKEN",), default_host="acme")


class _HostOptions(JsonlOptions, frozen=True, forbid_unknown_fields=True):
    server: Annotated[str, OptionMark.HOST] = ""


@caught_by("test_credentials_are_declared")
class DoesNotSayWhereItsSecretsGo(Bad):
    Options = _HostOptions
    credentials = Credentials(("ACME_TOKEN",))


@caught_by("test_credentials_are_declared", secret_env=("ACME_TOKEN",))
class DoesNotSayThatItTakesSecrets(Bad):
    pass
