# SPDX-License-Identifier: Apache-2.0
"""The registry finds installed backends, loads one, and checks its options."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import pytest

from trackhub import registry
from trackhub.errors import (
    BackendConflictError,
    BackendLoadError,
    ConfigError,
    IncompatibleBackendError,
    InvalidOptionError,
    UnknownBackendError,
)
from trackhub.spi import Backend, BackendRun, NoOptions, OptionMark, RunInfo

if TYPE_CHECKING:
    from tests.conftest import MakePlugin

GOOD = """
    from trackhub.spi import Backend, BackendRun, RunInfo

    class Acme(Backend):
        spi = 1

        def open_run(self, info: RunInfo) -> BackendRun:
            raise NotImplementedError
"""

USABLE = "class Acme(Backend):\n    spi = 1\n    open_run = print\n"


def entry(name: str) -> registry.BackendEntry:
    return next(found for found in registry.available() if found.name == name)


def test_listing_names_the_distribution_and_imports_no_plugin(make_plugin: MakePlugin) -> None:
    make_plugin("acme-tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": "raise RuntimeError('imported')"})

    found = entry("acme")

    assert found == registry.BackendEntry("acme", "acme-tracking", "1.0", "acme_plugin:Acme", "ok", "")
    assert "acme_plugin" not in sys.modules


def test_the_listing_is_sorted_by_name(make_plugin: MakePlugin) -> None:
    make_plugin("z", {"zz": "plug:A", "aa": "plug:A"}, {"plug": GOOD})

    names = [found.name for found in registry.available()]

    assert names == sorted(names)
    assert {"aa", "zz"} <= set(names)


def test_a_backend_loads_by_its_name(make_plugin: MakePlugin) -> None:
    make_plugin("acme-tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": GOOD})

    loaded = registry.load("acme")

    assert issubclass(loaded, Backend)
    assert loaded.__name__ == "Acme"


def test_an_unknown_backend_is_an_error_that_says_what_there_is(make_plugin: MakePlugin) -> None:
    make_plugin("acme-tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": GOOD})

    with pytest.raises(UnknownBackendError) as caught:
        registry.load("acmee")

    message = str(caught.value)
    assert "available:" in message
    assert "Did you mean 'acme'?" in message
    assert "install" not in message  # nobody offers a plugin that is called like a slip of the pen


def test_a_name_that_is_near_to_none_is_an_error_that_says_what_to_install() -> None:
    with pytest.raises(UnknownBackendError) as caught:
        registry.load("quite_another")

    assert "install its distribution where the backend runs" in str(caught.value)


def test_a_name_that_no_distribution_can_have_is_not_offered_for_installation() -> None:
    with pytest.raises(UnknownBackendError) as caught:
        registry.load("x; echo y")

    assert "pip install" not in str(caught.value)


def test_two_distributions_with_one_name_are_a_conflict_that_names_both(make_plugin: MakePlugin) -> None:
    make_plugin("acme-one", {"acme": "acme_one:Acme"}, {"acme_one": GOOD})
    make_plugin("acme-two", {"acme": "acme_two:Acme"}, {"acme_two": GOOD}, version="2.5")

    with pytest.raises(BackendConflictError) as caught:
        registry.load("acme")

    for part in ("acme-one 1.0", "acme-two 2.5"):
        assert part in str(caught.value)
    states = [(found.distribution, found.state) for found in registry.available() if found.name == "acme"]
    assert states == [("acme-one", "conflict"), ("acme-two", "conflict")]


def test_one_distribution_seen_twice_on_the_path_is_one(make_plugin: MakePlugin) -> None:
    make_plugin("acme-tracking", {"acme": "acme_plugin:Old"}, {"acme_plugin": GOOD}, version="1.0")
    make_plugin("Acme.Tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": GOOD}, version="1.1")

    found = [item for item in registry.available() if item.name == "acme"]

    assert [(item.version, item.state) for item in found] == [("1.1", "ok")]  # the first on sys.path, as for imports
    assert registry.load("acme").__name__ == "Acme"


def test_a_malformed_distribution_does_not_hide_the_others(make_plugin: MakePlugin) -> None:
    make_plugin("acme-tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": GOOD})
    make_plugin("mangled", {}, raw_entry_points="[trackhub.backends]\nno equals sign\n")
    bare = make_plugin("bare", {"bare": "x:Y"})
    next(bare.glob("*.dist-info")).joinpath("METADATA").unlink()

    assert entry("acme").state == "ok"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("gone", "module_that_is_not_there:Acme", "no module 'module_that_is_not_there'"),
        ("shapeless", "acme_plugin", "not of the form 'module:Class'"),
        ("Capital", "acme_plugin:Acme", "a backend's name is made of"),
        ("../up", "acme_plugin:Acme", "a backend's name is made of"),
        ("none", "acme_plugin:Acme", "reserved"),
    ],
)
def test_what_is_plainly_broken_is_listed_as_broken_and_does_not_load(
    make_plugin: MakePlugin, name: str, value: str, expected: str
) -> None:
    make_plugin("acme-tracking", {name: value}, {"acme_plugin": GOOD})

    assert entry(name).state == "broken"
    assert expected in entry(name).problem
    with pytest.raises(BackendLoadError, match="cannot be used"):
        registry.load(name)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import module_that_is_not_there", ModuleNotFoundError),
        ("raise RuntimeError('no licence')", RuntimeError),
        ("raise SystemExit(3)", SystemExit),
        ("", AttributeError),
    ],
)
def test_a_plugin_that_does_not_import_is_a_load_error_with_its_cause(
    make_plugin: MakePlugin, source: str, cause: type[BaseException]
) -> None:
    make_plugin("acme-tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": source})

    with pytest.raises(BackendLoadError, match=r"acme-tracking 1\.0") as caught:
        registry.load("acme")

    assert isinstance(caught.value.__cause__, cause)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("Acme = object()", "not a subclass"),
        ("class Acme: ...", "not a subclass"),
        ("class Acme(Backend):\n    spi = 1", "does not implement open_run"),
        (f"{USABLE}    capabilities = {{}}", "`capabilities` must be"),
        (f"{USABLE}    capabilities = Capabilities(kinds=frozenset({{Kind.GAP}}))", "without GAP"),
        (f"{USABLE}    capabilities = Capabilities(max_batch=0)", "max_batch"),
        (f"{USABLE}    capabilities = Capabilities(key_rule=KeyRule(chars='z-a'))", "KeyRule.chars"),
        (f"class Loose(msgspec.Struct): ...\n{USABLE}    Options = Loose", "forbid_unknown_fields"),
    ],
)
def test_a_class_that_is_no_usable_backend_is_a_load_error(make_plugin: MakePlugin, body: str, expected: str) -> None:
    imports = "import msgspec\nfrom trackhub.spi import Backend, Capabilities, KeyRule, Kind\n"
    source = f"{imports}{body}\n"
    make_plugin("acme-tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": source})

    with pytest.raises(BackendLoadError, match=expected):
        registry.load("acme")


def test_a_plugin_that_does_not_write_out_its_spi_is_incompatible(make_plugin: MakePlugin) -> None:
    source = "from trackhub.spi import Backend\nclass Acme(Backend):\n    open_run = print\n"
    make_plugin("acme-tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": source})

    with pytest.raises(IncompatibleBackendError, match="Write `spi = 1` into the class"):
        registry.load("acme")


def test_a_plugin_for_another_spi_is_incompatible(make_plugin: MakePlugin) -> None:
    make_plugin("acme-tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": GOOD + "\n        spi = 99\n"})

    with pytest.raises(IncompatibleBackendError, match="version 99"):
        registry.load("acme")


def test_a_backend_that_the_operator_does_not_allow_is_refused_before_it_is_imported(make_plugin: MakePlugin) -> None:
    make_plugin("acme-tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": GOOD})

    with pytest.raises(ConfigError, match="its operator allows: jsonl, mlflow"):
        registry.load("acme", allowed={"mlflow", "jsonl"})

    assert "acme_plugin" not in sys.modules


class AcmeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    project: str = "default"
    retries: int = 3
    interval_s: float = 1.0
    sync: bool = False
    tags: tuple[str, ...] = ()
    folder: Path | None = None
    api_key: Annotated[str | None, OptionMark.SECRET] = None
    license: Annotated[str, OptionMark.SECRET] = ""
    where: Annotated[str | None, OptionMark.HOST, OptionMark.PATH] = None
    logs: Annotated[Path, OptionMark.PATH] | None = None


class Acme(Backend[AcmeOptions]):
    spi = 1

    def open_run(self, info: RunInfo) -> BackendRun:
        raise NotImplementedError


def test_options_are_converted_from_the_strings_that_flags_give() -> None:
    given = {"project": "5", "retries": "5", "interval_s": "0.5", "sync": "true", "tags": ["a"], "folder": "x/y"}

    options = registry.build_options("acme", Acme, given)

    assert options == AcmeOptions(
        project="5", retries=5, interval_s=0.5, sync=True, tags=("a",), folder=Path("x/y"), api_key=None
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"projct": "x"}, r"acme\.projct: unknown option; its options: api_key, .*, where; did you mean 'project'\?"),
        ({"retries": "many"}, r"acme\.retries: expected `int`, got `str`"),
        ({"sync": "yes"}, r"acme\.sync: expected `bool`, got `str`; use true or false"),
        ({"tags": "a,b"}, r"acme\.tags: expected `array`, got `str`; a list is written as JSON"),
        ({"tags": ["a", 2]}, r"acme\.tags\[1\]: expected `str`, got `int`"),
    ],
)
def test_a_wrong_option_is_an_error_with_the_path_to_it(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidOptionError, match=expected):
        registry.build_options("acme", Acme, given)


def test_an_option_of_a_backend_without_options_is_an_error_that_says_so() -> None:
    with pytest.raises(InvalidOptionError, match="backend 'plain' has no options"):
        registry.build_options("plain", Backend, {"project": "x"})


def test_the_receiver_refuses_a_literal_secret_and_resolves_a_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACME_KEY", "hunter2")
    reference = {"api_key": "${secret:ACME_KEY}"}

    with pytest.raises(InvalidOptionError, match=r"acme\.api_key"):
        registry.build_options("acme", Acme, {"api_key": "hunter2"})
    resolved = registry.build_options("acme", Acme, reference)

    assert resolved == AcmeOptions(api_key="hunter2")
    assert "hunter2" not in repr(resolved)


def test_an_error_about_a_resolved_option_does_not_show_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_KEY", "hunter2")

    with pytest.raises(InvalidOptionError) as caught:
        registry.build_options("acme", Acme, {"retries": "${secret:ACME_KEY}"})

    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_options_are_those_of_the_type_in_brackets_also_for_a_subclass() -> None:
    class Special(Acme):
        pass

    class Plain(Backend[NoOptions]):
        pass

    assert (Acme.Options, Special.Options, Plain.Options) == (AcmeOptions, AcmeOptions, NoOptions)


def test_an_option_of_a_type_that_no_text_can_give_is_an_error_of_the_plugin() -> None:
    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        weight: complex = 0j

    class Acme(Backend[Options]):
        spi = 1

    with pytest.raises(BackendLoadError, match=r"'acme': .*type complex.*expected .*str"):
        registry.build_options("acme", Acme, {"weight": "1"})


def test_the_core_reads_which_options_hold_a_secret_a_host_or_a_path() -> None:
    marks = registry.option_marks(Acme)

    assert {name: set(found) for name, found in marks.items() if found} == {
        "api_key": {OptionMark.SECRET},
        "license": {OptionMark.SECRET},
        "where": {OptionMark.HOST, OptionMark.PATH},
        "logs": {OptionMark.PATH},
    }


def test_an_option_marked_as_a_secret_takes_references_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_LICENSE", "harmless")

    built = registry.build_options("acme", Acme, {"license": "${secret:ACME_LICENSE}"})

    assert isinstance(built, AcmeOptions)
    assert built.license == "harmless"
    for literal in ("harmless", "x-${secret:ACME_LICENSE}"):
        with pytest.raises(InvalidOptionError, match=r"acme\.license: a secret must not be written into a job"):
            registry.build_options("acme", Acme, {"license": literal})


def test_options_are_checked_where_a_job_is_written_and_references_stay(make_plugin: MakePlugin) -> None:
    source = """
        from typing import Annotated
        import msgspec
        from trackhub.spi import Backend, OptionMark

        class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
            key: Annotated[str, OptionMark.SECRET] = ""
            tags: list[str] = []

        class Acme(Backend[Options]):
            spi = 1
            open_run = print
    """
    make_plugin("acme-tracking", {"acme": "acme_plugin:Acme"}, {"acme_plugin": source})

    checked = registry.check_options("acme", {"key": "${secret:NOWHERE}", "tags": ("a", "b")})

    assert checked == {"key": "${secret:NOWHERE}", "tags": ["a", "b"]}
    with pytest.raises(InvalidOptionError, match=r"acme\.key: a secret must not"):
        registry.check_options("acme", {"key": "literal"})
    with pytest.raises(ConfigError, match="they must be what JSON can hold"):
        registry.check_options("acme", {"tags": [object()]})


def test_a_literal_secret_is_refused_also_for_a_backend_that_is_not_installed_here() -> None:
    with pytest.raises(InvalidOptionError, match=r"elsewhere\.api_key"):
        registry.check_options("elsewhere", {"api_key": "abc"})
    with pytest.raises(UnknownBackendError):
        registry.check_options("elsewhere", {"api_key": "${secret:ABC}"})


@pytest.mark.parametrize("name", ["mlflow", "mlflwo"])
def test_a_backend_of_ours_that_is_missing_is_found_in_a_clone_as_well(name: str) -> None:
    """None of the distributions is on a package index yet."""
    assert "flare-trackhub-mlflow" in registry._unknown(name, [])
    assert "in a clone: " in registry._unknown(name, [])
    assert "backends/mlflow)" in registry._unknown(name, [])
