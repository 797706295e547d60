# SPDX-License-Identifier: Apache-2.0
"""A configuration is logged field by field, whatever library made it. A field that cannot be read costs itself."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.unit.readers_and_bad_backends import new_spool
from tests.unit.test_writer_bad_values import count_of, payloads
from trackhub.errors import RecordError
from trackhub.records import Metrics, Params, Summary
from trackhub.writer import nested_mappings
from trackhub.writer.writer import Writer


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(new_spool(tmp_path / "spool"))


@dataclasses.dataclass
class Config:
    kind: ClassVar[str] = "the class's own, and no param"
    lr: float = 0.1
    seed: dataclasses.InitVar[int] = 3
    steps: int = dataclasses.field(init=False)


class OwnNamespace(argparse.Namespace):
    """As jsonargparse's, and so all of Lightning's command line."""


class RaisesForItsLength(dict[str, Any]):
    def __len__(self) -> int:
        raise RuntimeError("length")


class RaisesForItsKeys(dict[str, Any]):
    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("keys")


class RaisesAfterItsFirstKey(Mapping[str, Any]):
    def __iter__(self) -> Iterator[str]:
        yield "first"
        raise RuntimeError("second key")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: str) -> float:
        return 1.0


@pytest.mark.parametrize(
    "fields", [None, 5, "ab", property(lambda self: ())], ids=["none", "number", "text", "property"]
)
def test_an_object_whose_fields_are_of_an_unknown_kind_is_its_text(writer: Writer, fields: Any) -> None:
    kind = type("Odd", (), {"__fields__": fields, "__str__": lambda self: "odd"})
    writer.log_params({"odd": kind(), "lr": 0.1})

    assert payloads(writer) == [Params({"odd": "odd", "lr": 0.1})]


class Endless(Sequence[int]):
    """A data set that says how long it is, and gives an item for each index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return 7


def test_a_data_set_among_params_is_not_read_whole(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    writer.log_params({"small": Endless(2), "large": Endless(10**12), "range": [range(10**12)], "lr": 0.1})

    assert payloads(writer) == [Params({"small": [7, 7], "lr": 0.1})]
    assert "param 'large': more than 100,000 values" in caplog.text
    assert "param 'range': more than 100,000 values" in caplog.text


def test_a_dataclass_with_a_field_that_is_not_set_keeps_its_others(writer: Writer) -> None:
    config: Any = Config()
    writer.log_params(config)
    writer.log_params({"config": config, "other": 1})

    assert payloads(writer) == [Params({"lr": 0.1}), Params({"config/lr": 0.1, "other": 1})]
    assert count_of(writer).altered == {"invalid_value": 2}  # the field `steps`, each time


def test_a_subclass_of_namespace_is_a_namespace_at_every_level(writer: Writer) -> None:
    config: Any = OwnNamespace(lr=0.1, data=OwnNamespace(size=3))
    writer.log_params(config)

    assert payloads(writer) == [Params({"lr": 0.1, "data/size": 3})]


def test_models_of_attrs_and_pydantic_are_logged_with_extra_fields(writer: Writer) -> None:
    attrs, pydantic = pytest.importorskip("attrs"), pytest.importorskip("pydantic")
    model = pydantic.create_model("Model", __config__=pydantic.ConfigDict(extra="allow"), width=(int, 64))
    writer.log_params({"a": attrs.make_class("A", ["depth"])(3), "p": model(note="x")})

    assert payloads(writer) == [Params({"a/depth": 3, "p/width": 64, "p/note": "x"})]


@pytest.mark.parametrize(
    "odd",
    [RaisesForItsLength(first=1.0), RaisesForItsKeys(first=1.0), RaisesAfterItsFirstKey()],
    ids=lambda odd: type(odd).__name__,
)
def test_a_mapping_that_cannot_be_read_costs_only_itself(writer: Writer, odd: Any) -> None:
    for log in (writer.log, writer.log_params, writer.summarize):
        log({"a": 1.0, "odd": odd, "z": 2.0})

    for found, kind in zip(payloads(writer), (Metrics, Params, Summary), strict=True):
        assert type(found) is kind
        assert isinstance(found, Metrics | Params | Summary)
        assert found.values.items() >= {"a": 1.0, "z": 2.0}.items()
    assert not count_of(writer).dropped


def configuration_with_parents(parts: int) -> types.SimpleNamespace:
    root = types.SimpleNamespace(lr=0.1)
    for i in range(parts):
        setattr(root, f"part{i}", types.SimpleNamespace(parent=root, size=i))
    return root


def test_a_part_that_refers_to_its_parent_costs_only_that_reference(writer: Writer) -> None:
    log: Callable[..., None] = writer.log_params
    log(configuration_with_parents(10))
    assert payloads(writer) == [Params({"lr": 0.1, **{f"part{i}/size": i for i in range(10)}})]
    assert count_of(writer).altered == {"invalid_value": 10}


def test_objects_that_all_refer_to_each_other_end_a_call_soon(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested_mappings, "MAX_VALUES_OF_RECORD", 1000)
    nodes: list[dict[str, Any]] = [{"size": i} for i in range(12)]
    for node in nodes:
        node.update({f"other{i}": other for i, other in enumerate(nodes) if other is not node})
    writer.log_params({"net": nodes[0], "lr": 0.1})
    (params,) = payloads(writer)
    assert isinstance(params, Params)
    assert (params.values["net/size"], params.values["lr"]) == (0, 0.1)
    assert len(params.values) + count_of(writer).altered["invalid_value"] < 1100


def test_a_part_that_many_others_share_ends_a_call_soon(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    shared: dict[str, Any] = {"size": 1}
    for _ in range(18):
        shared = {"left": shared, "right": shared}
    writer.log_params({"net": shared, "lr": 0.1})
    found = {key for part in payloads(writer) if isinstance(part, Params) for key in part.values}
    assert "lr" in found
    assert 10_000 < len(found) < 100_000
    assert "the nested mappings of one call: more than 100,000 values" in caplog.text


def test_a_part_that_comes_twice_is_logged_twice(writer: Writer) -> None:
    shared = {"lr": 0.1}
    writer.log_params({"a": shared, "b": {"c": shared}})
    assert payloads(writer) == [Params({"a/lr": 0.1, "b/c/lr": 0.1})]


@pytest.mark.parametrize("value", [[{1: "conv", "1": "pool"}], ({"a": {None: 1, "None": 2}},)])
def test_keys_in_a_list_that_become_the_same_text_are_counted(tmp_path: Path, value: Any) -> None:
    with pytest.raises(RecordError, match="comes twice"):
        Writer(new_spool(tmp_path / "spool"), strict=True).log_params({"layers": value})
