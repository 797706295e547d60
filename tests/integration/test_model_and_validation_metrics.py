# SPDX-License-Identifier: Apache-2.0
"""What FLARE carries becomes records. What cannot be one neither raises nor floods the log.

``test_workflows.py`` has the jobs.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import EventScope, FedEventHeader, FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.utils.analytix_utils import create_analytic_dxo
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants, ValidateType
from nvflare.app_common.workflows.cross_site_eval import CrossSiteEval

from tests.unit.readers_and_bad_backends import read_spool
from trackhub.errors import ConfigError
from trackhub.flare.model_and_validation_metrics import ClientMetrics, ServerMetrics
from trackhub.flare.recipe import tracking_components
from trackhub.flare.records_from_flare_writers import StockRecords
from trackhub.flare.sender_widget import TrackhubSender
from trackhub.records import Metrics
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.spool.reading import SpoolReader


class Rig(StockRecords):
    """Stock records of a site, with what they warned of and wrote."""

    def __init__(self, folder: Path) -> None:
        super().__init__(FLComponent())
        self.folder = folder / "spool"
        create_spool(self.folder, SpoolInfo("site-1", "job-1", ("server",)))
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)

    def logged(self) -> list[tuple[dict[str, float], int | None]]:
        records = [record for records in read_spool(self.folder).values() for record in records]
        return [(r.payload.values, r.step) for r in records if isinstance(r.payload, Metrics)]


class Engine:
    def __init__(self) -> None:
        self.handlers: list[FLComponent] = []

    def add_handler(self, handler: FLComponent) -> None:
        self.handlers.append(handler)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(tmp_path)
    rig.open(rig.folder)
    return rig


def task(**headers: Any) -> Shareable:
    found = Shareable()
    for name, value in headers.items():
        found.set_header(getattr(AppConstants, name), value)
    return found


def metrics(values: Any) -> Shareable:
    shareable: Shareable = DXO(DataKind.METRICS, values).to_shareable()
    return shareable


def model(values: Any, **meta: Any) -> Shareable:
    shareable: Shareable = DXO(DataKind.WEIGHTS, {"w": 1.0}, {MetaKey.INITIAL_METRICS: values, **meta}).to_shareable()
    return shareable


def event(dxo: DXO | None, scope: str = EventScope.LOCAL) -> FLContext:
    context = FLContext()
    data = Shareable() if dxo is None else dxo.to_shareable()
    context.set_prop(FLContextKey.EVENT_DATA, data, private=True, sticky=False)
    context.set_prop(FLContextKey.EVENT_SCOPE, scope, private=True, sticky=False)
    return context


def analytics(key: str) -> DXO:
    return create_analytic_dxo(tag=key, value=0.5, data_type=AnalyticsDataType.SCALAR, global_step=3)


def test_metrics_of_a_model_are_recorded_with_its_round_as_step(rig: Rig) -> None:
    carried = ClientMetrics(rig)
    carried.take_result(task(CURRENT_ROUND=2), model({"acc": 0.5, "per": {"a": 1, "bad": object()}}))
    carried.take_result(task(CURRENT_ROUND=3), metrics({"acc": 0.25}))
    carried.take_result(task(), model(0.75))
    carried.take_result(task(), model(None))
    carried.take_result(task(), model({}))

    assert rig.logged() == [
        ({"flare/acc": 0.5, "flare/per/a": 1.0}, 2),
        ({"flare/acc": 0.25}, 3),
        ({"flare/metric": 0.75}, None),
    ]
    assert rig.warned == []


@pytest.mark.parametrize(
    ("given", "owner"),
    [
        (task(MODEL_OWNER="site-2"), "site-2"),
        (task(VALIDATE_TYPE=ValidateType.MODEL_VALIDATE), "global"),
        (DXO(DataKind.WEIGHTS, {"w": 1.0}, {AppConstants.MODEL_OWNER: "best"}).to_shareable(), "best"),
    ],
)
def test_an_evaluation_is_recorded_under_the_owner_of_the_model(rig: Rig, given: Shareable, owner: str) -> None:
    ClientMetrics(rig).take_result(given, metrics({"acc": 0.5}))

    assert rig.logged() == [({f"cross_site/{owner}/acc": 0.5}, None)]


@pytest.mark.parametrize("result", [None, 5, Shareable(), make_reply(ReturnCode.EXECUTION_EXCEPTION), model(None)])
def test_a_result_without_metrics_is_left_alone(rig: Rig, result: Any) -> None:
    ClientMetrics(rig).take_result(None, result)

    assert (rig.logged(), rig.warned) == ([], [])


def test_a_malformed_result_is_named_once_and_raises_nothing(rig: Rig) -> None:
    carried, broken = ClientMetrics(rig), metrics({"acc": 0.5})
    del broken["DXO"]
    for _ in range(3):
        carried.take_result(task(), broken)

    assert rig.logged() == []
    assert len(rig.warned) == 1


def test_the_server_records_what_it_gets_of_each_client(rig: Rig) -> None:
    """A relay hands over the results of its clients together. A bad one of them costs itself."""
    engine = Engine()
    watch = ServerMetrics(engine, rig)
    parts = {"site-3": DXO(DataKind.METRICS, {"acc": 0.25}), "site-4": DXO(DataKind.COLLECTION, {"x": "no DXO"})}
    for site, result in (("site-1", metrics({"acc": 0.5})), ("relay", DXO(DataKind.COLLECTION, parts).to_shareable()),
                         ("site-5", make_reply(ReturnCode.TASK_ABORTED))):  # fmt: skip
        context = event(None)
        for name, value in (("DATA_CLIENT", site), ("MODEL_OWNER", "best"), ("VALIDATION_RESULT", result)):
            context.set_prop(getattr(AppConstants, name), value, private=True, sticky=False)
        watch.handle_event("_validation_result_received", context)
        context.set_prop(FLContextKey.EVENT_SCOPE, EventScope.FEDERATION, private=True, sticky=False)
        watch.handle_event("_validation_result_received", context)  # a client may make such an event up

    assert engine.handlers == [watch]
    assert rig.logged() == [
        ({"cross_site/site-1/best/acc": 0.5}, None),
        ({"cross_site/relay.site-3/best/acc": 0.25}, None),
    ]
    assert len(rig.warned) == 1


def submission(
    name: str, props: dict[str, Any], *, received: float | None = None, result: Shareable | None = None
) -> FLContext:
    """Return the context of a result that the server gets, with FLARE's own entry of its task."""
    given = Task(name, Shareable(), props=props)
    client_task = ClientTask(Client("site-1", ""), given)
    client_task.result_received_time = received
    communicator = SimpleNamespace(process_task_check=lambda task_id, fl_ctx: client_task)
    controller = SimpleNamespace(communicator=communicator)
    context = FLContext()
    runner = SimpleNamespace(current_wf=SimpleNamespace(controller=controller))
    context.set_prop(FLContextKey.RUNNER, runner, private=True, sticky=False)
    context.set_prop(FLContextKey.TASK_RESULT, result or metrics({"acc": 0.5}), private=True, sticky=False)
    return context


def test_an_evaluation_without_an_event_is_taken_from_its_task_once(rig: Rig) -> None:
    watch, of_best = ServerMetrics(Engine(), rig), {AppConstants.META_DATA: {AppConstants.MODEL_OWNER: "best"}}
    for context in (
        submission("validate", of_best),
        submission("validate", of_best, received=1.0),  # FLARE drops a second result of one task
        submission("validate", of_best, result=make_reply(ReturnCode.EXECUTION_EXCEPTION)),
        submission("train", of_best),
        submission("validate", {AppConstants.META_DATA: {}}),
        submission("validate", {AppConstants.MODEL_OWNER: "best"}),  # CrossSiteModelEval, which fires an event
    ):
        watch.handle_event(EventType.BEFORE_PROCESS_SUBMISSION, context)

    assert rig.logged() == [({"cross_site/site-1/best/acc": 0.5}, None)]
    assert rig.warned == []


def test_cross_site_eval_keeps_the_owner_of_a_model_with_the_task() -> None:
    model = FLModel(params={}, meta={AppConstants.MODEL_OWNER: "site-1"})

    task = CrossSiteEval.__new__(CrossSiteEval)._prepare_task(model, AppConstants.TASK_VALIDATION, 0, print)

    assert task.get_prop(AppConstants.META_DATA)[AppConstants.MODEL_OWNER] == "site-1"
    assert "task_name=AppConstants.TASK_VALIDATION" in inspect.getsource(CrossSiteEval._send_validation_task)


def test_an_event_of_another_type_is_recorded_once_and_goes_on(rig: Rig) -> None:
    context = event(analytics("mine"))
    rig.take_custom("my_own", context)
    rig.take_custom("my_own", context)  # FLARE's next event in this context finds the data again
    rig.take_custom("my_own", event(None))
    rig.take_custom("my_own", event(DXO(DataKind.WEIGHTS, {"w": 1.0})))
    rig.take_custom(EventType.BEFORE_PULL_TASK, event(analytics("another")))  # FLARE's events carry none

    assert rig.logged() == [({"mine": 0.5}, 3)]
    assert context.get_prop(FLContextKey.EVENT_DATA).get_header(FedEventHeader.DIRECTION, "out") == "out"


@pytest.mark.parametrize("level", ["log_info", "log_warning", "log_error", "log_exception", "log_critical"])
def test_a_line_that_flare_logs_is_no_record_and_stays_at_the_site(rig: Rig, level: str) -> None:
    """FLARE fires its own log lines as analytics events, too. They can hold paths, names and values."""
    context = event(None)
    getattr(FLComponent(), level)(context, "a planted path", fire_event=True)
    assert context.get_prop(FLContextKey.EVENT_DATA) is not None

    rig.take_custom("my_own", context)

    assert read_spool(rig.folder) == {}


def test_records_that_come_before_the_spool_are_kept_or_counted(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    for number in range(1003):
        rig.take(event(analytics(f"early/{number}")))
    rig.open(rig.folder)
    rig.take(event(analytics("later")))

    assert [key for values, _ in rig.logged() for key in values] == [*(f"early/{n}" for n in range(1000)), "later"]
    rig.close()
    (count,) = SpoolReader(rig.folder, "server").counts().values()
    assert (count.logged, count.dropped) == (1004, {"unconvertible": 3})


@pytest.mark.parametrize("value", ["clients", ["client"], [1], 5, {"clients": True}])
def test_other_sides_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="flare_metrics: expected a list"):
        tracking_components(server=["jsonl"], flare_metrics=value)


def test_the_server_records_nothing_in_client_only_mode_or_past_a_policy() -> None:
    with pytest.raises(ConfigError, match="on the client side only"):
        tracking_components(clients=["jsonl"], flare_metrics=["server"])
    with pytest.raises(ConfigError, match="past the policy"):
        TrackhubSender(flare_metrics=["clients", "server"], policy={"deny": ["*"]})
    TrackhubSender(flare_metrics=["clients"], policy={"deny": ["*"]})
