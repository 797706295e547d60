# SPDX-License-Identifier: Apache-2.0
"""The contract's groups on what is stored: kinds, names, steps, times, numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from trackhub.records import Kind, Metrics, Params, Tags
from trackhub.spi import ANY_KEY, Capabilities
from trackhub.testing.checks.base import ContractBase, Kit
from trackhub.testing.comparison import counted, differences
from trackhub.testing.expectation import expect, kind_of
from trackhub.testing.log_calls import (
    BASE_TIME,
    Call,
    artifact,
    histogram,
    image,
    metric,
    series,
    table,
    text,
)
from trackhub.testing.scenarios import Gallery, scenario

__all__ = ["Kinds", "Names", "Numbers", "Steps"]

_KINDS = [kind for kind in Kind if kind is not Kind.GAP]


@scenario("kind metrics")
def _metrics() -> Sequence[Call]:
    together = Metrics({"train/loss": 0.5, "train/accuracy": 0.75, "lr": 0.125})
    many = Metrics({f"layer-{i}/norm": i / 4 for i in range(150)})
    return [Call(together, 0), Call(together, 1), Call(many, 2), metric("lr", 0.0625, 3)]


@scenario("kind params")
def _params() -> Sequence[Call]:
    values = {"optimizer": "adam", "lr": 0.001, "epochs": 5, "nesterov": True, "dropout": None, "betas": [0.9, 0.999]}
    nested = {"model": {"name": "cnn", "layers": [32, 64], "bias": False}, "note": "é ✓ " + "n" * 400}
    return [metric("loss", 1.0, 0), Call(Params(values)), Call(Params(nested)), metric("loss", 0.5, 1)]


@scenario("kind tags")
def _tags() -> Sequence[Call]:
    return [Call(Tags({"team": "vision", "stage": "draft"})), Call(Tags({"stage": "final", "note": "é ✓, a=b"}))]


@scenario("kind text")
def _text() -> Sequence[Call]:
    return [text("log", "first\nsecond *line* <b> & é ✓", 1), text("log", "later", 2), text("other", "x" * 5000, 3)]


@scenario("kind image")
def _image() -> Sequence[Call]:
    return [image("samples", 1, shade=10, caption="a cat"), image("samples", 2, shade=90), image("more", 2, shade=200)]


@scenario("kind histogram")
def _histogram() -> Sequence[Call]:
    return [histogram("weights", 1), histogram("weights", 2, counts=(0.0, 3.0, 0.0, 5.0)), histogram("bias", 2)]


@scenario("kind table")
def _table() -> Sequence[Call]:
    return [table("predictions", 1), table("predictions", 2), table("errors", 2)]


@scenario("kind artifact")
def _artifact() -> Sequence[Call]:
    return [
        artifact("model/best", bytes(range(256)) * 5000, artifact_type="model"),
        artifact("notes", "é\n".encode(), filename="a note.txt"),
    ]


@scenario("params that change")
def _changing_params() -> Sequence[Call]:
    return [Call(Params({"lr": 0.5, "epochs": 3})), Call(Params({"lr": 0.25})), Call(Params({"lr": 0.125, "seed": 1}))]


@scenario("content that is missing")
def _missing() -> Sequence[Call]:
    return [metric("loss", 1.0, 0), image("samples", 1, shade=5), artifact("file", b"abc"), metric("loss", 0.5, 2)]


@scenario("one key in every kind")
def _one_key() -> Sequence[Call]:
    key = "loss"
    calls = [metric(key, 0.5, 1), text(key, "words", 1), image(key, 1, shade=7), histogram(key, 1), table(key, 1)]
    return [*calls, artifact(key, b"bytes"), Call(Params({key: "mse"})), Call(Tags({key: "t"})), metric(key, 0.25, 2)]


@scenario("names with difficult characters")
def _difficult() -> Sequence[Call]:
    names = [
        "a/b/c", "a b", "a.b", "a:b", "a=b", "a,b", "a\\b", "a'b", 'a"b', "a%b", "a%2Fb", "a#b", "a?b", "a&b", "a*b",
        "a|b", "a<b>", "a{b}", "a[0]", "a(b)", "a`b", "a$b", "a@b", "a!b", "a~b", "a^b", "a+b", "a;b", "-a", ".a", "a.",
        "..", "../a", "/a", "a/", "a//b", " a", "a ", "_", "__", "_step", "_timestamp", "_x002F_",
        "CON", "nan", "0", "system/cpu", "epoch", "step", "time",
    ]  # fmt: skip
    return [metric(name, 0.5 + number, 1) for number, name in enumerate(names)]


@scenario("names in many scripts")
def _scripts() -> Sequence[Call]:
    names = ["é", "e\u0301", "損失", "потеря", "خسارة", "🙂", "\U0001d6fd/\U0001d6fe", "ß", "ss", "İ", "K", "\u212a"]
    return [metric(name, 0.5 + number, 1) for number, name in enumerate(names)]


@scenario("names that are long")
def _long() -> Sequence[Call]:
    lengths = (100, 249, 250, 251, 255, 256, 500, 999, 1000)
    names = [letter * n for n in lengths for letter in "ab"] + ["c" * 990 + end for end in ("1", "2", "/3")]
    return [metric(name, 0.5 + number, 1) for number, name in enumerate(names)]


_ALIKE = ["a/b", "a_b", "a.b", "a b", "a-b", "a:b", "A/b", "a/B", "a_x002F_b", "a%2Fb", "a/b_", "a/_b", "a__b", "ab"]


@scenario("names that look alike")
def _alike() -> Sequence[Call]:
    return [metric(name, 0.5 + number, step) for step in (1, 2) for number, name in enumerate(_ALIKE)]


@scenario("names of params and tags that look alike")
def _alike_params() -> Sequence[Call]:
    numbered = {name: number for number, name in enumerate(_ALIKE)}
    return [Call(Params(dict(numbered))), Call(Tags({name: str(number) for name, number in numbered.items()}))]


@scenario("a site: é/../ x%2F 損失")
def _odd_site() -> Sequence[Call]:
    return series("loss", range(3))


@scenario("steps in order")
def _order() -> Sequence[Call]:
    return [call for step in range(60) for call in (metric("loss", step / 8, step), metric("accuracy", step / 4, step))]


@scenario("steps that are equal")
def _equal() -> Sequence[Call]:
    return series("loss", [0, 0, 1, 1, 1, 2, 2]) + series("val/loss", [0] * 5)


@scenario("steps with gaps")
def _gaps() -> Sequence[Call]:
    return series("loss", [0, 7, 1000, 10**6, 2**31, 2**40, 2**53 + 2]) + series("late/start", [500, 501])


@scenario("the largest step")
def _largest() -> Sequence[Call]:
    return series("loss", [1, 2**63 - 1])


@scenario("steps that are late")
def _late() -> Sequence[Call]:
    return [
        *series("train/loss", range(20, 40)),
        *series("val/accuracy", [0, 1, 2]),
        *series("train/loss", [10, 30, 5], scale=0.5),
        Call(Metrics({"train/loss": 9.0, "test/loss": 8.0}), 12),
    ]


@scenario("steps that are not given")
def _none() -> Sequence[Call]:
    calls = [metric(key, number / 8) for number in range(6) for key in ("loss", "accuracy")]
    return [*calls, Call(Metrics({"loss": 3.0, "lr": 4.0})), Call(Metrics({"loss": 5.0, "lr": 6.0}))]


@scenario("times")
def _times() -> Sequence[Call]:
    times = [0.0, 0.001, 1.5, 0.123456, 0.9994, 86_400.5, -3600.25, 7.0]
    return [metric("loss", number / 8, number, BASE_TIME + time) for number, time in enumerate(times)]


@scenario("numbers that are not finite")
def _nonfinite() -> Sequence[Call]:
    values = [1.0, math.nan, math.inf, -math.inf, 2.0]
    mixed = Metrics({"good": 1.5, "bad": math.nan, "worse": -math.inf})
    return [metric("loss", value, step) for step, value in enumerate(values)] + [Call(mixed, 9)]


@scenario("numbers at the limits")
def _limits() -> Sequence[Call]:
    values = [0.0, -0.0, 1e308, -1e308, 1.7976931348623157e308, 5e-324, 1e-45, 3.5e38, 0.1, 1 / 3, math.pi]
    values += [float(2**63 - 1), float(-(2**63)), 2.0**53 + 1, 16777217.0, 123456.789012345]
    return [metric("loss", value, step) for step, value in enumerate(values)]


class Kinds(ContractBase):
    """What can be logged at all."""

    @pytest.mark.parametrize("kind", _KINDS, ids=lambda kind: kind.name.lower())
    def test_kind_as_declared(self, gallery: Gallery, kit: Kit, kind: Kind) -> None:
        """A claimed kind is stored with its key, step, time and content; another is rejected, and is not there."""
        shown = gallery[f"kind {kind.name.lower()}"]
        shown.check()
        if kind not in shown.can.kinds:
            calls = [call for call in shown.calls if kind_of(call.payload) is kind]
            _must_not_be_able(self, kit, calls, shown.can, f"stores {kind.name} but does not claim it in kinds", kind)

    def test_changing_params_as_declared(self, gallery: Gallery, kit: Kit) -> None:
        """A param has its last value; where that is not claimed, its first, and the change is counted."""
        shown = gallery["params that change"]
        shown.check()
        if not shown.can.changing_params and Kind.PARAMS in shown.can.kinds:
            _must_not_be_able(self, kit, shown.calls, shown.can, "changes params but does not claim changing_params")

    def test_one_key_serves_every_kind(self, gallery: Gallery) -> None:
        """A metric, a text, an image and so on may have the same key; each of them is there."""
        gallery["one key in every kind"].check()

    def test_missing_content_is_not_passed_over(self, kit: Kit) -> None:
        """If the bytes of an image or artifact are gone, that record is rejected and its neighbours are stored."""
        rig = kit.rig(deliver=False).start()
        rig.log("site-1", _missing())
        rig.finish()
        for path in sorted(rig.info("site-1").blob_dir.iterdir()):
            path.unlink()
        again = kit.keep(rig.again()).start()
        again.finish()
        claimed = len({Kind.IMAGE, Kind.ARTIFACT} & again.can.kinds)
        run = again.run("site-1")
        unsupported = run.rejected.pop("unsupported_kind", 0)
        assert unsupported == 2 - claimed
        assert sum(run.rejected.values()) == claimed, f"its content is gone, yet the report says {run}"
        assert run.pending == 0
        found = again.read("site-1")
        lost = [*(found.images or []), *(found.artifacts or [])]
        assert not lost, f"something is stored in place of content that was gone: {lost}"
        numbers = [(kind, call) for kind, call in again.logged["site-1"] if isinstance(call.payload, Metrics)]
        problems = differences("points", expect(numbers, again.can, self).held, found, self)
        assert not problems, f"records beside the one whose content was gone are not stored: {problems}"


class Names(ContractBase):
    """What a key may be called."""

    def test_names_with_difficult_characters(self, gallery: Gallery) -> None:
        """Separators, quotes, blanks, dots and reserved words in a key harm nothing."""
        _stay_apart(gallery, "names with difficult characters")

    def test_names_in_many_scripts(self, gallery: Gallery) -> None:
        """Keys may be in any script, and two spellings that only look the same stay two."""
        _stay_apart(gallery, "names in many scripts")

    def test_long_names_stay_apart(self, gallery: Gallery) -> None:
        """Keys of up to 1000 characters are stored, and those that differ only at their end stay two."""
        _stay_apart(gallery, "names that are long")

    def test_names_that_look_alike_stay_apart(self, gallery: Gallery) -> None:
        """Two keys never become one by being cleaned."""
        _stay_apart(gallery, "names that look alike")

    def test_names_of_params_and_tags_stay_apart(self, gallery: Gallery) -> None:
        """Nor do the names of params or tags."""
        gallery["names of params and tags that look alike"].check()

    def test_site_with_a_difficult_name(self, gallery: Gallery) -> None:
        """A site's name may hold anything; the run is found by it, and lies where it should."""
        gallery["a site: é/../ x%2F 損失"].check()


class Steps(ContractBase):
    """What a step and a time may be."""

    def test_order_is_kept(self, gallery: Gallery) -> None:
        """A metric's points are shown in the order in which they were logged."""
        shown = gallery["steps in order"]
        found = shown.check()
        for key in {point.key for point in shown.expected.held.points}:
            want = [point.value for point in shown.expected.held.points if point.key == key]
            have = [point.value for point in found.points if point.key == key]
            assert have == want, f"the points of {key!r} are not in the order of the log calls: {have[:12]}…"

    def test_equal_steps_are_all_kept(self, gallery: Gallery) -> None:
        """Several values of one metric at one step are all stored."""
        gallery["steps that are equal"].check()

    def test_steps_with_gaps(self, gallery: Gallery) -> None:
        """Steps may start anywhere, leave any gap, and be beyond 32 and 53 bits."""
        gallery["steps with gaps"].check()

    def test_largest_step(self, gallery: Gallery) -> None:
        """The largest step is that of int64."""
        gallery["the largest step"].check()

    def test_late_steps_as_declared(self, gallery: Gallery, kit: Kit) -> None:
        """A step lower than an earlier one is stored; where that is not claimed, it is rejected and counted."""
        shown = gallery["steps that are late"]
        shown.check()
        if not shown.can.late_steps:
            _must_not_be_able(self, kit, shown.calls, shown.can, "stores late steps but does not claim late_steps")

    def test_optional_step_as_declared(self, gallery: Gallery) -> None:
        """Without a step, a point has none; where that is not claimed, it has its ordinal. None collapse onto one."""
        gallery["steps that are not given"].check()

    def test_times_are_those_of_the_log_calls(self, gallery: Gallery) -> None:
        """The stored time is that of the log call, not that of the delivery, and need not rise."""
        gallery["times"].check()


class Numbers(ContractBase):
    """What a value may be."""

    def test_nonfinite_as_declared(self, gallery: Gallery, kit: Kit) -> None:
        """NaN and infinities are stored; where that is not claimed, they are taken out and counted."""
        shown = gallery["numbers that are not finite"]
        shown.check()
        if not shown.can.nonfinite:
            _must_not_be_able(self, kit, shown.calls, shown.can, "stores NaN and infinities but does not claim it")

    def test_extreme_numbers(self, gallery: Gallery) -> None:
        """Numbers at the limits of float64 and int64 have their declared canonical form."""
        gallery["numbers at the limits"].check()


def _stay_apart(gallery: Gallery, name: str) -> None:
    shown = gallery[name]
    found = shown.check()
    keys = {key for call in shown.calls if isinstance(call.payload, Metrics) for key in call.payload.values}
    stored = {point.key for point in found.points}
    assert len(stored) == len(keys), f"{len(keys)} names became {len(stored)}"


def _must_not_be_able(
    hooks: ContractBase, kit: Kit, calls: Sequence[Call], can: Capabilities, problem: str, kind: Kind | None = None
) -> None:
    """Check that what is not claimed is really not there: written past the core, it must fail or come out wrong."""
    strong = Capabilities(
        kinds=frozenset(_KINDS),
        redelivery=can.redelivery,
        nonfinite=True,
        late_steps=True,
        optional_step=True,
        changing_params=True,
        key_rule=ANY_KEY,
    )
    usable = [call for call in calls if kind is not None or kind_of(call.payload) in can.kinds]
    wanted = expect([("main", call) for call in usable], strong, hooks).held
    try:
        found = kit.without_core([usable])
    except Exception:  # noqa: BLE001 - any refusal will do
        return
    fields = ["points", "params"] if kind is None else [_field(kind)]
    shows = any(
        getattr(wanted, field) and getattr(found, field) is not None and _same(field, wanted, found) for field in fields
    )
    assert not shows, f"the backend {problem}: claim what it has"


def _field(kind: Kind) -> str:
    return {Kind.METRICS: "points", Kind.PARAMS: "params", Kind.TAGS: "tags"}.get(kind, f"{kind.name.lower()}s")


def _same(field: str, wanted: object, found: object) -> bool:
    want, have = getattr(wanted, field), getattr(found, field)
    return bool(want == have if isinstance(want, dict) else counted(want) == counted(have))
