# SPDX-License-Identifier: Apache-2.0
"""Checks of what the store holds of a record: its kind and content, its step and time, its numbers.

Each check judges a scenario, which is in this module, too. Keys are checked in `keys_stay_apart`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from trackhub.records import Kind, Metrics, Params, Summary, Tags
from trackhub.spi import ANY_KEY, Capabilities
from trackhub.testing.checks.fixtures import ContractFixtures, Kit
from trackhub.testing.comparison import counted, differences
from trackhub.testing.expectation import expect, kind_of
from trackhub.testing.sample_calls_and_requests import (
    BASE_TIME,
    LOGGED_KINDS,
    Call,
    artifact,
    histogram,
    image,
    metric,
    series,
    table,
    text,
)
from trackhub.testing.scenario_delivery import DeliveredScenarios, scenario

__all__ = ["KindChecks", "NumberChecks", "StepChecks"]


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


@scenario("kind summary")
def _summary() -> Sequence[Call]:
    first = {"best/accuracy": 0.75, "best/epoch": 3, "reason": "early é ✓", "converged": False, "rank": 1}
    last = {"best/accuracy": 0.875, "converged": True, "sizes": [1, 2]}
    return [metric("loss", 1.0, 0), Call(Summary(first)), Call(Summary(last)), metric("best/accuracy", 0.5, 1)]


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


def _with_content() -> Sequence[Call]:
    return [metric("loss", 1.0, 0), image("samples", 1, shade=5), artifact("file", b"abc"), metric("loss", 0.5, 2)]


@scenario("one key in every kind")
def _one_key() -> Sequence[Call]:
    key = "loss"
    calls = [metric(key, 0.5, 1), text(key, "words", 1), image(key, 1, shade=7), histogram(key, 1), table(key, 1)]
    calls += [artifact(key, b"bytes"), Call(Params({key: "mse"})), Call(Tags({key: "t"})), Call(Summary({key: 9}))]
    return [*calls, metric(key, 0.25, 2)]


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


class KindChecks(ContractFixtures):
    """Each kind of record is stored if it is claimed, and rejected if not."""

    @pytest.mark.parametrize("kind", LOGGED_KINDS, ids=lambda kind: kind.name.lower())
    def test_kind_as_declared(self, scenarios: DeliveredScenarios, kit: Kit, kind: Kind) -> None:
        """A claimed kind is stored with its key, step, time and content. Any other kind is rejected, not stored."""
        delivered = scenarios[f"kind {kind.name.lower()}"]
        delivered.check()
        if kind not in delivered.can.kinds:
            calls = [call for call in delivered.calls if kind_of(call) is kind]
            _must_not_be_able(self, kit, calls, delivered.can, f"stores {kind.name}. Claim it in kinds", kind)

    def test_changing_params_as_declared(self, scenarios: DeliveredScenarios, kit: Kit) -> None:
        """A param has its last value. Without ``changing_params``, it has its first, and the change is counted."""
        delivered = scenarios["params that change"]
        delivered.check()
        if not delivered.can.changing_params and Kind.PARAMS in delivered.can.kinds:
            _must_not_be_able(self, kit, delivered.calls, delivered.can, "changes params. Claim changing_params")

    def test_one_key_serves_every_kind(self, scenarios: DeliveredScenarios) -> None:
        """A metric, a text, an image and so on may have the same key. Each of them is there."""
        scenarios["one key in every kind"].check()

    def test_record_without_its_content_is_rejected(self, kit: Kit) -> None:
        """If the bytes of an image or artifact are gone, that record is rejected, and its neighbours are stored."""
        rig = kit.rig(deliver=False).start()
        rig.log("site-1", _with_content())
        rig.finish()
        for path in sorted(rig.info("site-1").blob_dir.iterdir()):
            path.unlink()
        again = kit.again(rig)
        again.finish()
        claimed = len({Kind.IMAGE, Kind.ARTIFACT} & again.can.kinds)
        run = again.run("site-1")
        unsupported = run.rejected.pop("unsupported_kind", 0)
        assert unsupported == 2 - claimed
        assert sum(run.rejected.values()) == claimed, f"the content of a record is gone, but the report says {run}"
        assert run.pending == 0
        found = again.read("site-1")
        lost = [*(found.images or []), *(found.artifacts or [])]
        assert not lost, f"the store holds something in place of content that was gone: {lost}"
        numbers = [(stream, call) for stream, call in again.logged["site-1"] if isinstance(call.payload, Metrics)]
        problems = differences("points", expect(numbers, again.can, self).held, found, self)
        assert not problems, f"neighbours of a record whose content was gone are not stored: {problems}"


class StepChecks(ContractFixtures):
    """Steps and times are stored as they were logged."""

    def test_order_is_kept(self, scenarios: DeliveredScenarios) -> None:
        """The store shows a metric's points in the order in which they were logged."""
        delivered = scenarios["steps in order"]
        found = delivered.check()
        for key in {point.key for point in delivered.expected.held.points}:
            want = [point.value for point in delivered.expected.held.points if point.key == key]
            have = [point.value for point in found.points if point.key == key]
            assert have == want, f"the points of {key!r} are not in the order of the log calls: {have[:12]}..."

    def test_equal_steps_are_all_kept(self, scenarios: DeliveredScenarios) -> None:
        """All values of one metric at one step are stored."""
        scenarios["steps that are equal"].check()

    def test_steps_with_gaps(self, scenarios: DeliveredScenarios) -> None:
        """Steps may start anywhere, leave any gap, and be beyond 32 and 53 bits."""
        scenarios["steps with gaps"].check()

    def test_largest_step(self, scenarios: DeliveredScenarios) -> None:
        """The largest step is that of int64."""
        scenarios["the largest step"].check()

    def test_late_steps_as_declared(self, scenarios: DeliveredScenarios, kit: Kit) -> None:
        """A step lower than an earlier one is stored. Without ``late_steps``, it is rejected and counted."""
        delivered = scenarios["steps that are late"]
        delivered.check()
        if not delivered.can.late_steps:
            _must_not_be_able(self, kit, delivered.calls, delivered.can, "stores late steps. Claim late_steps")

    def test_optional_step_as_declared(self, scenarios: DeliveredScenarios) -> None:
        """A point that was logged without a step has none. Without ``optional_step``, such points are numbered."""
        scenarios["steps that are not given"].check()

    def test_times_are_those_of_the_log_calls(self, scenarios: DeliveredScenarios) -> None:
        """The stored time is that of the log call, not that of the delivery. Times need not rise."""
        scenarios["times"].check()


class NumberChecks(ContractFixtures):
    """Values are stored as the contract class declares."""

    def test_nonfinite_as_declared(self, scenarios: DeliveredScenarios, kit: Kit) -> None:
        """NaN and infinities are stored. Without ``nonfinite``, they are taken out and counted."""
        delivered = scenarios["numbers that are not finite"]
        delivered.check()
        if not delivered.can.nonfinite:
            _must_not_be_able(self, kit, delivered.calls, delivered.can, "stores NaN and infinities. Claim nonfinite")

    def test_extreme_numbers(self, scenarios: DeliveredScenarios) -> None:
        """Numbers at the limits of float64 and int64 have their declared canonical form."""
        scenarios["numbers at the limits"].check()


def _must_not_be_able(
    hooks: ContractFixtures, kit: Kit, calls: Sequence[Call], can: Capabilities, problem: str, kind: Kind | None = None
) -> None:
    """Check that the backend really cannot do what it does not claim.

    It gets the calls without the core, and must then fail or store something else.

    Args:
        hooks: the contract class.
        kit: hands the calls to the backend.
        calls: what to log.
        can: what the backend claims.
        problem: for the message: what the backend does although it does not claim it, and what to claim.
        kind: the kind that is not claimed; None if it is another ability.
    """
    strong = Capabilities(
        kinds=frozenset(LOGGED_KINDS),
        redelivery=can.redelivery,
        nonfinite=True,
        late_steps=True,
        optional_step=True,
        changing_params=True,
        key_rule=ANY_KEY,
    )
    usable = [call for call in calls if kind is not None or kind_of(call) in can.kinds]
    wanted = expect([("main", call) for call in usable], strong, hooks).held
    try:
        found = kit.without_core(usable)
    except Exception:  # noqa: BLE001 - any refusal will do
        return
    fields = ["points", "params"] if kind is None else [_field(kind)]
    shows = any(
        getattr(wanted, field) and getattr(found, field) is not None and _same(field, wanted, found) for field in fields
    )
    assert not shows, f"the backend does more than it claims: it {problem}"


def _field(kind: Kind) -> str:
    names = {Kind.METRICS: "points", Kind.PARAMS: "params", Kind.TAGS: "tags", Kind.SUMMARY: "summary"}
    return names.get(kind, f"{kind.name.lower()}s")


def _same(field: str, wanted: object, found: object) -> bool:
    want, have = getattr(wanted, field), getattr(found, field)
    return bool(want == have if isinstance(want, dict) else counted(want) == counted(have))
