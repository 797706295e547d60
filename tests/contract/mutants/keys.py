# SPDX-License-Identifier: Apache-2.0
"""Backends that change or merge keys."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Callable

import msgspec

from tests.contract.mutants.base import CAN, Bad, caught_by, keys
from trackhub.spi import Artifact, Histogram, Image, KeyRule, Metrics, Params, Summary, Table, Tags, Text

RESERVING = KeyRule(max_chars=250, chars="", reserved_keys=frozenset({"step"}), reserved_as="user/")

_MERGING: dict[type, Callable[[str], str]] = {
    Metrics: lambda key: key.replace("//", "/"),
    Params: lambda key: key.strip("-") or "-",
    Tags: str.lower,
    Summary: lambda key: key.replace("__", "_"),
    Text: lambda key: key.rstrip(" ") or " ",
    Image: lambda key: key.lstrip("_") or "_",
    Histogram: lambda key: key.removeprefix("./"),
    Table: lambda key: key.casefold(),
    Artifact: posixpath.normpath,
}


def _merges(payload: type, change: Callable[[str], str]) -> None:
    """Add the mutant that changes the keys of one kind."""
    kind = payload.__name__.lower()
    name = f"MergesKeysOf{payload.__name__}"
    cls = type(name, (Bad,), {"run": keys(change, payload), "__module__": __name__})
    globals()[name] = cls
    also = [rf"test_keys_.*\[{kind}\]", "test_keys_.*"]
    caught_by(f"test_keys_that_look_alike_stay_apart[{kind}]", also=also)(cls)


for _payload, _change in _MERGING.items():
    _merges(_payload, _change)


@caught_by("test_keys_of_the_key_rule_stay_apart[metrics]", also=[r"test_keys_.*", "test_long_keys_stay_apart"])
class UndoesTheKeyRule(Bad):
    capabilities = msgspec.structs.replace(CAN, key_rule=RESERVING)
    run = keys(lambda key: key.removeprefix("user/") or "/")


@caught_by("test_keys_of_the_key_rule_stay_apart[text]", also=[r"test_keys_.*", "test_long_keys_stay_apart"])
class IsShorterThanItsKeyRule(Bad):
    capabilities = msgspec.structs.replace(CAN, key_rule=RESERVING)
    run = keys(lambda key: key[:249])


@caught_by("test_keys_with_difficult_characters", also=["test_keys_.*"])
class StripsKeys(Bad):
    run = keys(lambda key: key.strip(" ./") or "_", Metrics)


@caught_by("test_keys_in_many_scripts", also=["test_keys_.*"])
class NormalisesKeys(Bad):
    run = keys(lambda key: unicodedata.normalize("NFKC", key), Metrics)


@caught_by("test_long_keys_stay_apart")
class CutsLongKeys(Bad):
    run = keys(lambda key: key[:250], Metrics)


@caught_by("test_keys_stay_apart_at_every_step", also=[".*"])
class MergesTwoKeys(Bad):
    run = keys(lambda key: re.sub(r"\W", "_", key), Metrics)


@caught_by("test_keys_of_params_and_tags_stay_apart", also=["test_keys_.*"])
class MergesTwoParams(Bad):
    run = keys(lambda key: key.lower().replace("/", "_"), Params, Tags)
