# SPDX-License-Identifier: Apache-2.0
"""What trackhub assumes of FLARE beyond its documented interface.

A failure here means that FLARE has changed. Read FLARE's new code, and change ``trackhub/flare/flare_internals.py``.
"""

from __future__ import annotations

import inspect
import json
import os
import runpy
import subprocess
import sys
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nvflare
import pytest
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo
from nvflare.apis.workspace import Workspace
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.executors.client_api.external_process_backend import ExternalProcessBackend
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor
from nvflare.app_common.metrics_exchange.metrics_sender import MetricsSender
from nvflare.app_common.widgets.convert_to_fed_event import ConvertToFedEvent
from nvflare.app_common.widgets.metric_relay import MetricRelay
from nvflare.client import api as client_api
from nvflare.client import tracking
from nvflare.client.cell.api import CellClientAPI
from nvflare.client.in_process.api import InProcessClientAPI
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.job_config.api import FedJob
from nvflare.private.event import fire_event
from nvflare.private.fed.app.simulator import simulator_runner
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorClientRunner, SimulatorRunner
from nvflare.private.fed.client.client_run_manager import ClientRunManager
from nvflare.private.fed.client.client_runner import ClientRunner
from nvflare.private.fed.server.run_manager import RunManager
from nvflare.private.fed.server.server_engine import ServerEngine
from nvflare.private.fed.server.server_runner import ServerRunner
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants
from nvflare.private.fed.utils.fed_utils import create_job_processing_context_properties
from nvflare.recipe.spec import Recipe
from nvflare.utils.job_launcher_utils import add_custom_dir_to_path
from nvflare.widgets.fed_event import ClientFedEventRunner

from tests.integration.harness import SIMULATOR_MEND
from trackhub.flare import flare_internals
from trackhub.flare.trainer.record_flare_log_calls import LogCalls
from trackhub.job_and_run_info import RunStatus
from trackhub.operator_file import OperatorFile
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.spool.reading import SpoolReader
from trackhub.writer.writer import Writer


def test_flare_is_a_release_that_this_was_written_for() -> None:
    assert nvflare.__version__.startswith("2.9.")


def test_the_cell_takes_what_the_channel_passes() -> None:
    parameters = inspect.signature(Cell._send_request).parameters

    assert {"channel", "target", "topic", "request", "timeout", "optional"} <= set(parameters)
    assert "channel" in inspect.signature(Cell._register_request_cb).parameters


def test_engines_have_the_methods_and_attributes_that_are_used() -> None:
    for cls in (ClientRunManager, RunManager):
        assert callable(cls.add_handler)
        assert callable(cls.get_component)
    assert callable(ServerEngine.get_participating_clients)
    assert callable(ServerEngine.register_aux_message_handler)
    assert "self.run_manager" in inspect.getsource(ServerEngine)
    assert not hasattr(ServerEngine, "add_handler")


def test_an_engine_fires_events_at_the_list_of_handlers_that_it_has_then() -> None:
    for cls in (ClientRunManager, RunManager):
        assert "handlers=self.handlers" in inspect.getsource(cls.fire_event)
    first, second = FLComponent(), FLComponent()
    engine = _Engine([first])
    engine.add_handler = engine.handlers.append  # type: ignore[attr-defined]
    walked = engine.handlers

    flare_internals.add_first_handler(engine, second)

    assert engine.handlers == [second, first]
    assert walked == [first]


def test_all_of_flares_writers_end_in_the_log_functions_that_are_replaced() -> None:
    for method in (InProcessClientAPI.log, CellClientAPI.log):
        assert list(inspect.signature(method).parameters) == ["self", "key", "value", "data_type", "kwargs"]
    assert list(inspect.signature(MetricsSender.add).parameters) == ["self", "tag", "value", "data_type", "kwargs"]
    assert "context.add(" in inspect.getsource(tracking.log)
    assert list(inspect.signature(tracking.log).parameters) == ["key", "value", "data_type", "ctx", "kwargs"]
    assert "client_api.log(" in inspect.getsource(tracking.log)
    assert "local_ctx.api.log(" in inspect.getsource(client_api.log)
    for writer in (tracking.SummaryWriter, tracking.WandBWriter, tracking.MLflowWriter):
        assert inspect.getsource(writer).count("        log(") == inspect.getsource(writer).count("ctx=self.ctx")
    assert "self._cj_fqcn" in inspect.getsource(CellClientAPI.__init__)
    assert '"receiver_fqcn": receiver_fqcn' in inspect.getsource(MetricRelay._start)
    assert 'self.rank != "0" or not self.initialized or self.closed' in inspect.getsource(MetricsSender.add)


def test_an_external_trainer_gets_the_path_of_the_process_that_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/first", "/second"])
    env = {"PYTHONPATH": "/replaced"}

    add_custom_dir_to_path("/custom", env)

    assert env["PYTHONPATH"].split(os.pathsep) == ["/first", "/second", "/custom"]
    source = inspect.getsource(ExternalProcessBackend._launch_trainer)
    assert source.index("os.environ.copy()") < source.index("add_custom_dir_to_path") < source.index("subprocess.Popen")


def test_the_log_of_the_client_api_in_process_is_replaced_and_put_back(tmp_path: Path) -> None:
    before = InProcessClientAPI.log, tracking.log
    create_spool(tmp_path / "spool", SpoolInfo("site-1", "job", ("server",)))
    api = InProcessClientAPI.__new__(InProcessClientAPI)
    writer = tracking.SummaryWriter(SimpleNamespace(api=api))

    undo = flare_internals.replace_in_process_log(LogCalls(Writer(tmp_path / "spool"), pytest.fail))
    api.log("a", 1.0, AnalyticsDataType.SCALAR)
    writer.add_scalar("a", 2.0)
    writer.add_scalars("a", {"b": 3.0})
    undo()

    (count,) = SpoolReader(tmp_path / "spool", "server").counts().values()
    assert (count.logged, count.spooled) == (3, 3)
    assert before == (InProcessClientAPI.log, tracking.log)


def test_an_executor_keeps_its_shutdown_timeout_where_it_is_raised() -> None:
    executor = ClientAPIExecutor(execution_mode="external_process", command="python3 x.py", shutdown_timeout=0.0)

    assert executor._shutdown_timeout == 0
    assert executor.execution_mode == "external_process"


def test_setting_app_packages_replaces_the_earlier_ones() -> None:
    job = FedJob(name="x")

    job.set_app_packages(["a"])
    job.set_app_packages(["b"])
    flare_internals.reference_package(job, "c")

    assert job.job.app_packages == ["b", "c"]


def test_a_recipe_has_its_job_and_prepares_client_apps_on_demand() -> None:
    recipe = type("R", (Recipe,), {})(FedJob(name="x"))

    assert isinstance(flare_internals.job_of(recipe), FedJob)
    assert flare_internals.client_sites(recipe) == []
    assert recipe._client_apps_prepared


def test_a_client_that_answers_unsafe_job_makes_the_server_panic() -> None:
    assert ReturnCode.UNSAFE_JOB in ServerRunner.ABORT_RETURN_CODES
    ctx = _manager().new_context()

    flare_internals.stop_job(FLComponent(), ctx, "wrong")

    assert ctx.is_job_unsafe()
    source = inspect.getsource(ClientRunner._do_process_task)
    assert source.index("is_job_unsafe") < source.index("_do_task")


def test_a_client_ends_its_run_in_the_order_that_the_sender_relies_on() -> None:
    source = inspect.getsource(ClientRunner.end_run_events_sequence)

    order = ["RUN_ABORT_REQUESTED", "ABOUT_TO_END_RUN", "check_end_run_readiness", "EventType.END_RUN"]
    positions = [source.index(name) for name in order]
    assert positions == sorted(positions)


def test_the_server_tells_clients_to_end_before_it_asks_whether_components_are_ready() -> None:
    source = inspect.getsource(ServerRunner.run)

    order = ["ABOUT_TO_END_RUN", "ReservedTopic.END_RUN", "check_end_run_readiness", "EventType.END_RUN"]
    positions = [source.index(name) for name in order]
    assert positions == sorted(positions)


class _Engine:
    """As much of an engine as events need."""

    def __init__(self, handlers: list[FLComponent]) -> None:
        self.handlers = handlers
        self.sent: list[Shareable] = []
        self.contexts = _manager(self)

    def new_context(self) -> FLContext:
        return self.contexts.new_context()

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        fire_event(event_type, self.handlers, fl_ctx)


def _manager(engine: Any = None, **private: Any) -> FLContextManager:
    return FLContextManager(
        engine=engine, identity_name="site-1", job_id="j", public_stickers={},
        private_stickers={FLContextKey.PROCESS_TYPE: "CJ", **private},
    )  # fmt: skip


class _Taker(FLComponent):  # type: ignore[misc]  # FLARE has no types
    def __init__(self, *, keep: bool = False) -> None:
        super().__init__()
        self.keep = keep
        self.taken: list[Shareable] = []
        self.came_as_message: list[bool] = []

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if (
            event_type in flare_internals.STOCK_EVENTS
            and (event := flare_internals.take_stock_event(fl_ctx, keep=self.keep)) is not None
        ):
            self.taken.append(event)
            self.came_as_message.append(flare_internals.came_as_message(fl_ctx))


class _Runner(ClientFedEventRunner):  # type: ignore[misc]  # FLARE has no types
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Shareable] = []

    def fire_and_forget_request(
        self, request: Shareable, fl_ctx: FLContext, targets: Any = None, secure: Any = False
    ) -> None:
        self.sent.append(request)


@pytest.mark.parametrize("converter_first", [True, False])
@pytest.mark.parametrize("fed", [True, False])
def test_a_stock_event_is_taken_once_and_never_sent(converter_first: bool, fed: bool) -> None:
    taker, runner, convert = _Taker(), _Runner(), ConvertToFedEvent(["analytix_log_stats"])
    engine = _Engine([convert, taker, runner] if converter_first else [taker, convert, runner])
    dxo = create_analytic_dxo("loss", 1.5, AnalyticsDataType.SCALAR)
    name = "fed.analytix_log_stats" if fed else "analytix_log_stats"

    with engine.new_context() as ctx:
        send_analytic_dxo(FLComponent(), dxo, ctx, event_type=name, fire_fed_event=fed)

    assert len(taker.taken) == 1
    assert taker.came_as_message == [fed]
    assert runner.sent == []


@pytest.mark.parametrize("converter_first", [True, False])
@pytest.mark.parametrize("fed", [True, False])
def test_a_stock_event_that_is_copied_is_taken_once_and_sent_once(converter_first: bool, fed: bool) -> None:
    taker, runner, convert = _Taker(keep=True), _Runner(), ConvertToFedEvent(["analytix_log_stats"])
    engine = _Engine([convert, taker, runner] if converter_first else [taker, convert, runner])
    dxo = create_analytic_dxo("loss", 1.5, AnalyticsDataType.SCALAR)
    name = "fed.analytix_log_stats" if fed else "analytix_log_stats"

    with engine.new_context() as ctx:
        send_analytic_dxo(FLComponent(), dxo, ctx, event_type=name, fire_fed_event=fed)

    assert (len(taker.taken), len(runner.sent)) == (1, 1)


def test_without_take_over_the_same_event_is_sent() -> None:
    runner = _Runner()
    engine = _Engine([ConvertToFedEvent(["analytix_log_stats"]), runner])

    with engine.new_context() as ctx:
        send_analytic_dxo(FLComponent(), create_analytic_dxo("loss", 1.5, AnalyticsDataType.SCALAR), ctx)

    assert len(runner.sent) == 1


def test_the_round_of_a_task_is_in_its_header() -> None:
    task = Shareable()
    task.set_header(AppConstants.CURRENT_ROUND, 3)

    assert flare_internals.round_of_task(task) == 3
    assert flare_internals.round_of_task(Shareable()) is None
    assert AppConstants.CURRENT_ROUND == "current_round"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (ReturnCode.OK, RunStatus.FINISHED),
        (ReturnCode.EXECUTION_EXCEPTION, RunStatus.FAILED),
        (ReturnCode.TASK_ABORTED, RunStatus.ABORTED),
    ],
)
def test_the_status_of_a_task_is_in_its_result(code: str, status: RunStatus) -> None:
    result = Shareable()
    result.set_return_code(code)

    assert flare_internals.task_status(result) is status


def test_a_site_is_known_by_the_cell_from_which_a_message_comes() -> None:
    clients = {"site-1": "site-1", "site-10": "site-10", "a": "a", "a.b": "a.b", "deep": "relay.deep"}

    assert flare_internals.site_of("site-1.simulate_job", clients) == "site-1"
    assert flare_internals.site_of("site-10.job.trainer", clients) == "site-10"
    assert flare_internals.site_of("a.b.job", clients) == "a.b"
    assert flare_internals.site_of("relay.deep.job", clients) == "deep"
    assert flare_internals.site_of("relay.other.job", clients) is None
    assert flare_internals.site_of("server", clients) is None
    assert Client("site-1", "").get_fqcn() == "site-1"


def test_a_private_property_can_hide_the_run_abort_signal() -> None:
    ctx, triggered = _manager().new_context(), Signal()
    triggered.trigger(True)
    ctx.set_prop(FLContextKey.RUN_ABORT_SIGNAL, triggered, private=True, sticky=True)

    ctx.put(key=FLContextKey.RUN_ABORT_SIGNAL, value=Signal(), private=True, sticky=False)

    assert not ctx.get_run_abort_signal().triggered


def test_every_process_of_a_job_has_the_job_meta_in_its_context(tmp_path: Path) -> None:
    for cls in (ClientRunManager, RunManager):
        source = inspect.getsource(cls.__init__)
        assert "self.create_job_processing_context_properties(workspace, job_id)" in source
        assert "private_stickers=job_ctx_props" in source
    meta = {"name": "cifar10", "scope": ""}
    (tmp_path / "startup").mkdir()
    (tmp_path / "local").mkdir()
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "meta.json").write_text(json.dumps(meta))

    properties = create_job_processing_context_properties(Workspace(str(tmp_path)), "j")

    assert flare_internals.job_name(_manager(**properties).new_context()) == "cifar10"


@pytest.mark.parametrize(
    ("meta", "name"),
    [
        ({"name": "cifar10", "job_folder_name": "folder"}, "cifar10"),
        ({"name": "", "job_folder_name": "folder"}, "folder"),
        ({"name": 7}, "j"),
        ({}, "j"),
        (None, "j"),
    ],
)
def test_a_job_without_a_name_is_called_by_its_folder_or_id(meta: dict[str, Any] | None, name: str) -> None:
    context = _manager(**{FLContextKey.JOB_META: meta}).new_context()

    assert flare_internals.job_name(context) == name


def test_the_name_of_a_fed_job_is_in_the_meta_of_the_job(tmp_path: Path) -> None:
    FedJob(name="cifar10").export_job(str(tmp_path))

    assert json.loads((tmp_path / "cifar10" / "meta.json").read_text())["name"] == "cifar10"


def test_events_have_the_names_that_the_widgets_handle() -> None:
    assert flare_internals.STOCK_EVENTS == ("analytix_log_stats", "fed.analytix_log_stats")
    assert flare_internals.ROUND_STARTED == "_round_started"
    assert {"ABOUT_TO_START_RUN", "START_RUN", "SWAP_OUT", "CHECK_END_RUN_READINESS"} <= set(vars(EventType))


def test_the_simulator_empties_its_root_before_an_execution(tmp_path: Path) -> None:
    flare_internals.execution_id(tmp_path)
    runner = SimulatorRunner.__new__(SimulatorRunner)
    runner.simulator_root = str(tmp_path)
    runner.args = Namespace(workspace=str(tmp_path))

    runner._cleanup_workspace()

    assert not (tmp_path / ".trackhub").exists()


def test_all_processes_of_an_execution_mint_one_id(tmp_path: Path) -> None:
    code = "import sys, pathlib, trackhub.flare.flare_internals as c; print(c.execution_id(pathlib.Path(sys.argv[1])))"
    with ThreadPoolExecutor(16) as pool:
        ours = list(pool.map(flare_internals.execution_id, [tmp_path] * 64))

    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)

    assert {*ours, other.stdout.strip()} == {ours[0]}
    assert ours[0].startswith("sim-")
    assert [p.name for p in tmp_path.iterdir()] == [".trackhub"]


def _context(workspace: Path, job_id: str) -> FLContext:
    (workspace / "startup").mkdir(parents=True, exist_ok=True)
    (workspace / "local").mkdir(exist_ok=True)
    engine = SimpleNamespace(get_workspace=lambda: Workspace(str(workspace)))
    context = FLContext()
    context.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=False)
    context.set_prop(ReservedKey.RUN_NUM, job_id, private=False, sticky=True)
    return context


def test_only_the_simulator_has_no_operator_beside_the_submitter(tmp_path: Path) -> None:
    simulated = SimulatorConstants.JOB_NAME
    assert flare_internals.operator_file(_context(tmp_path / "sim", simulated)) is None
    assert flare_internals.operator_file(_context(tmp_path / "prod", "6f2c8a10-0000-4000-8000-000000000001"))

    for kit in ("fed_server.json", "fed_client.json"):
        context = _context(tmp_path / kit, simulated)
        (tmp_path / kit / "startup" / kit).touch()
        # A job of this name at a real site is no simulation, whoever chose the name.
        assert flare_internals.operator_file(context) == OperatorFile()


def test_the_operator_s_file_is_in_the_site_s_local_folder(tmp_path: Path) -> None:
    context = _context(tmp_path, "6f2c8a10-0000-4000-8000-000000000001")
    (tmp_path / "local" / "trackhub.toml").write_text('state_dir = "/srv/trackhub"')

    assert flare_internals.operator_file(context) == OperatorFile(state_dir="/srv/trackhub")


def test_two_clients_of_the_mended_simulator_are_told_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLARE's own threads share the dict. If this fails, FLARE has mended it: delete ``simulator_mend``."""
    monkeypatch.delattr(SimulatorClientRunner, "build_ctx", raising=False)
    shared = _names_told()
    monkeypatch.setattr(
        SimulatorClientRunner, "build_ctx", None, raising=False
    )  # so that the mend is undone afterwards
    runpy.run_path(str(SIMULATOR_MEND / "sitecustomize.py"))["mend"](simulator_runner)

    mended = _names_told()

    assert len(shared) == 1
    assert mended == {"site-1", "site-2"}
    assert 'self.build_ctx["client_name"] = client.client_name' in inspect.getsource(SimulatorClientRunner.do_one_task)


def _names_told() -> set[str]:
    """Return what two threads of a simulator tell their clients, if both come to it in the same moment."""
    runner = SimulatorClientRunner.__new__(SimulatorClientRunner)
    runner.build_ctx = {"client_name": "site-2"}
    both_wrote = threading.Barrier(2)

    def tell(name: str) -> str:
        runner.build_ctx["client_name"] = name
        both_wrote.wait(30)
        return str(runner.build_ctx["client_name"])

    with ThreadPoolExecutor(2) as threads:
        return set(threads.map(tell, ("site-1", "site-2")))
