# SPDX-License-Identifier: Apache-2.0
"""Each workflow that FLARE ships: every record carries the round in which its call was made, and the status is true.

The trainer logs the round that FLARE gave it with the task. A record is right if its ``round`` is that number. Where
FLARE gave none, the trainer logs -1, and the record has no round.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import TRAINER, JobResult, files_with, read_jsonl, run_script

_JOB = """
import sys
from pathlib import Path

import numpy as np
from nvflare.apis.dxo import DataKind
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator
from nvflare.app_common.ccwf import ccwf_job
from nvflare.app_common.ccwf.comps.np_file_model_persistor import NPFileModelPersistor
from nvflare.app_common.ccwf.comps.simple_model_shareable_generator import SimpleModelShareableGenerator
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator
from nvflare.app_common.np.np_model_locator import NPModelLocator
from nvflare.app_common.widgets.validation_json_generator import ValidationJsonGenerator
from nvflare.app_common.workflows.cross_site_eval import CrossSiteEval
from nvflare.app_common.workflows.cross_site_model_eval import CrossSiteModelEval
from nvflare.app_common.workflows.cyclic import Cyclic
from nvflare.app_common.workflows.cyclic_ctl import CyclicController
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_common.workflows.scaffold import Scaffold
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from parts import CustomSender, EndsByItself, Hostile, ServerLogger

from trackhub.flare.recipe import add_tracking

HERE = Path(__file__).parent
MODEL = [[0.0, 0.0], [0.0, 0.0]]


def runner(external):
    return ScriptRunner(
        str(HERE / "client.py"), launch_external_process=external, framework=FrameworkType.NUMPY, shutdown_timeout=20.0
    )


def client_controlled(workflow, external):
    job = ccwf_job.CCWFJob(name="job", min_clients=N)
    waits, server = {"min_responses_required": N, "wait_time_after_min_resps_received": 1.0}, {"num_rounds": 3}
    if workflow == "swarm that cuts off a slow site":
        waits = {"min_responses_required": N - 1, "wait_time_after_min_resps_received": 0.5,
                 "learn_task_check_interval": 0.5, "learn_task_abort_timeout": 5.0}
        server = {"num_rounds": 5, "starting_client": "site-1", "aggr_clients": ["site-1"]}
    common = {"executor": runner(external), "persistor": NPFileModelPersistor(),
              "shareable_generator": SimpleModelShareableGenerator()}
    if workflow == "cyclic by clients":
        job.add_cyclic(ccwf_job.CyclicServerConfig(num_rounds=3), ccwf_job.CyclicClientConfig(**common))
    else:
        job.add_swarm(
            ccwf_job.SwarmServerConfig(**server),
            ccwf_job.SwarmClientConfig(
                **common, aggregator=InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS),
                **waits,
            ),
        )
    if workflow == "swarm, then evaluation":
        job.add_cross_site_eval(ccwf_job.CrossSiteEvalConfig(eval_task_timeout=60), persistor_id="persistor")
        job.to_server(ValidationJsonGenerator())
    return job


def server_controlled(workflow, external):
    job = FedJob(name="job", min_clients=N)
    persistor = job.to_server(NPModelPersistor(model=MODEL), id="persistor")
    job.to_server(FullModelShareableGenerator(), id="generator")
    if workflow == "Cyclic":
        job.to_server(Cyclic(num_clients=N, num_rounds=3, persistor_id="persistor"))
    elif workflow == "CyclicController":
        job.to_server(CyclicController(
            num_rounds=3, task_assignment_timeout=0, persistor_id="persistor", shareable_generator_id="generator"))
    elif workflow == "scatter and gather":
        job.to_server(InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS), id="aggregator")
        job.to_server(ScatterAndGather(
            min_clients=N, num_rounds=3, start_round=0, wait_time_after_min_received=0, aggregator_id="aggregator",
            persistor_id="persistor", shareable_generator_id="generator"))
    elif workflow == "Scaffold":
        job.to_server(Scaffold(num_clients=N, num_rounds=3, persistor_id="persistor"))
    else:
        job.to_server(FedAvg(num_clients=N, num_rounds=3, persistor_id="persistor"))
    if workflow == "FedAvg, then evaluation":
        job.to_server(NPModelLocator(), id="locator")
        job.to_server(CrossSiteModelEval(model_locator_id="locator"))
        job.to_server(ValidationJsonGenerator())
    if workflow == "FedAvg, then CrossSiteEval":
        job.to_server(CrossSiteEval(server_models=[]))
    if workflow == "a controller that ends by itself":
        job.to_server(EndsByItself())
    job.to_clients(runner(external))
    if workflow == "a hostile client":
        job.to_clients(Hostile())
    return job


def fedopt(external):
    from net import Net
    from nvflare.app_opt.pt.recipes.fedopt import FedOptRecipe

    # FLARE's default for the optimizer is one that its server cannot read.
    return FedOptRecipe(name="job", model=Net(), min_clients=N, num_rounds=3,
                        optimizer_args={"path": "torch.optim.SGD", "args": {"lr": 1.0}, "config_type": "dict"},
                        train_script=str(HERE / "client.py"), launch_external_process=external)._job


if __name__ == "__main__":
    workflow, external, N = sys.argv[1], sys.argv[2] == "external", int(sys.argv[3])
    make = client_controlled if workflow.startswith(("swarm", "cyclic by")) else server_controlled
    job = fedopt(external) if workflow == "FedOpt" else make(workflow, external)
    job.to_server(ServerLogger(), id="before_the_receiver")
    sides = {"server": {"jsonl": {}, "tensorboard": {}}, "clients": {"jsonl": {}}}
    if sys.argv[4:] == ["flare_metrics"]:
        job.to_server(CustomSender(), id="a_sender")
        job.to_clients(CustomSender(), id="a_sender")
        sides["flare_metrics"] = ["clients", "server"]
    elif sys.argv[4:] == ["client only"]:
        job.to_clients(CustomSender(), id="a_sender")
        sides = {"clients": {"jsonl": {}}, "flare_metrics": ["clients"]}
    add_tracking(job, **sides, context=False)
    job.simulator_run(str(HERE / "workspace" / "job"), n_clients=N, threads=N)
"""

_PARTS = """
import time

from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.controller_spec import Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FedEventHeader, FLContextKey
from nvflare.apis.shareable import Shareable
from nvflare.apis.impl.controller import Controller
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.widgets.streaming import AnalyticsSender
from nvflare.widgets.fed_event import FED_EVENT_TOPIC
from nvflare.widgets.widget import Widget

from trackhub import Writer


class ServerLogger(Widget):
    '''Logs on the server when a round starts. The configuration names it before trackhub's receiver.'''

    def handle_event(self, event_type, fl_ctx):
        if event_type == AppEventType.ROUND_STARTED:
            Writer().log({"seen": fl_ctx.get_prop(AppConstants.CURRENT_ROUND)})
        elif event_type == EventType.END_WORKFLOW:
            Writer().log({"seen": -1})
        elif event_type == EventType.START_WORKFLOW and fl_ctx.get_prop(FLContextKey.EVENT_DATA) is not None:
            Writer().log({"made_up": 1})  # by a client


class CustomSender(AnalyticsSender):
    '''Sends analytics with an event type of its own, and with FLARE's one before the spool is there.'''

    def handle_event(self, event_type, fl_ctx):
        is_first = self.engine is None
        if event_type in (EventType.ABOUT_TO_START_RUN, EventType.START_RUN):
            self.engine = fl_ctx.get_engine()  # a server fires the second one only
            if is_first:
                self.event_type = "analytix_log_stats"
                self.add("planted" + "_early", 0.25, AnalyticsDataType.SCALAR, 3)
        elif event_type in (AppEventType.ROUND_STARTED, EventType.BEFORE_TASK_EXECUTION):
            self.event_type = "my_own_analytics"
            self.add("planted" + "_custom", 0.125, AnalyticsDataType.SCALAR, 3)


class Hostile(Widget):
    '''Sends the server events that only FLARE itself fires there, made-up ones, when the second round begins.'''

    def handle_event(self, event_type, fl_ctx):
        task = fl_ctx.get_prop(FLContextKey.TASK_DATA)
        if event_type == EventType.BEFORE_TASK_EXECUTION and task.get_header(AppConstants.CURRENT_ROUND) == 1:
            for name in (EventType.ABOUT_TO_END_RUN, EventType.END_RUN, EventType.START_WORKFLOW):
                event = Shareable()
                event.set_header(FedEventHeader.EVENT_TYPE, name)
                event.set_header(FedEventHeader.TIMESTAMP, time.time())
                fl_ctx.get_engine().send_aux_request(None, FED_EVENT_TOPIC, event, 5.0, fl_ctx)


class EndsByItself(Controller):
    '''Triggers the abort signal when it is done, as FLARE's controllers for XGBoost and Flower do.'''

    def start_controller(self, fl_ctx):
        pass

    def stop_controller(self, fl_ctx):
        pass

    def process_result_of_unknown_task(self, *args):
        pass

    def control_flow(self, abort_signal, fl_ctx):
        abort_signal.trigger(True)
"""

_NET = """
import torch


class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
"""

_TRAINER = """
import sys
from trackhub import Writer

writer = Writer()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    seen = -1 if model.current_round is None else model.current_round
    fact(lambda: writer.log({"seen": seen}), {"seen": seen})
    time.sleep(0.05 * int(SITE[-1]))  # sites of different speed
    fact(lambda: writer.log({"seen": seen}), {"seen": seen})
    if os.environ.get("TRACKHUB_TEST_TRAINER") in ("fails", f"{SITE} fails") and seen == 1:
        raise RuntimeError("this training script fails in round 1")
    params = {name: array + 1 for name, array in (model.params or {}).items()}
    meta = {"scaffold_c_diff": {name: np.asarray(array) * 0 for name, array in params.items()}}
    flare.send(flare.FLModel(params=params, params_type="FULL", metrics={"accuracy": 0.5}, meta=meta))
"""

_SLOW_TRAINER = """
from pathlib import Path
from trackhub import Writer

writer, others = Writer(), [Path(OUT, f"site-{i}.facts") for i in (1, 2)]
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    fact(lambda: writer.log({"seen": model.current_round}), {"seen": model.current_round})
    # The slow site goes on in round 0 until the others are in round 2, and a little longer.
    n_more = 20 if SITE == "site-3" else 0
    while n_more > 0:
        n_more -= all('["seen", 2,' in path.read_text() for path in others if path.exists())
        writer.log({"seen": model.current_round})
        time.sleep(0.1)
    params = {name: array + 1 for name, array in model.params.items()}
    flare.send(flare.FLModel(params=params, params_type="FULL", metrics={"accuracy": 0.5}))
"""

_EVALUATING_TRAINER = """
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics={"accuracy": 0.734512, "per": {"cat": 0.5}}))
    elif flare.is_submit_model():
        flare.send(flare.FLModel(params=model.params or {"w": np.zeros(2)}, params_type="FULL"))
    else:
        params = {name: array + 1 for name, array in model.params.items()}
        flare.send(flare.FLModel(params=params, params_type="FULL", metrics={"accuracy": 0.734512}))
"""


def _run(
    folder: Path,
    workflow: str,
    external: bool,
    n_clients: int,
    env: dict[str, str] | None = None,
    *,
    trainer: str = _TRAINER,
    mode: str = "",
) -> JobResult:
    (folder / "client.py").write_text(TRAINER + "import numpy as np\n" + textwrap.dedent(trainer))
    (folder / "parts.py").write_text(_PARTS)
    (folder / "net.py").write_text(_NET)
    (folder / "job.py").write_text(_JOB)
    args = ["job.py", workflow, "external" if external else "in process", str(n_clients), *([mode] if mode else [])]
    rc, log = run_script(args, folder, folder / "out", {"PYTHONPATH": str(folder), **(env or {})}, 240)
    return JobResult(rc, log, folder / "workspace" / "job", folder / "out")


def _seen_and_round(job: JobResult, site: str) -> list[tuple[int, int | None]]:
    return [(int(point.value), point.round) for point in job.jsonl_points("server", site)]


def _end(job: JobResult, site: str) -> str:
    """Return how the run of this site ended. Its own receiver and the server's must agree."""
    receivers = {"server"} if site == "federation" else {"server", site}
    ends = {read_jsonl(job.jsonl_file(receiver, site))[-1]["status"] for receiver in receivers}
    assert len(ends) == 1, ends
    status: str = ends.pop()
    return status


def _assert_rounds_are_those_of_the_calls(job: JobResult, n_clients: int) -> None:
    assert job.rc == 0, job.log[-6000:]
    for site in [f"site-{i + 1}" for i in range(n_clients)]:
        points = _seen_and_round(job, site)
        assert [seen for seen, _ in points] == [int(fact.value) for fact in job.facts(site)]
        assert [int(point.value) for point in job.tensorboard_points("server", site)] == [seen for seen, _ in points]
        assert points
        assert [(seen, number) for seen, number in points if seen != (-1 if number is None else number)] == []


@pytest.mark.parametrize(
    ("workflow", "external", "n_clients"),
    [
        ("swarm", False, 2),
        pytest.param("swarm", True, 2, marks=pytest.mark.long),
        pytest.param("swarm", False, 3, marks=pytest.mark.long),
        pytest.param("swarm", True, 3, marks=pytest.mark.long),
        pytest.param("cyclic by clients", False, 2, marks=pytest.mark.long),
        pytest.param("cyclic by clients", True, 3, marks=pytest.mark.long),
        pytest.param("swarm, then evaluation", False, 2, marks=pytest.mark.long),
        pytest.param("swarm, then evaluation", True, 3, marks=pytest.mark.long),
        pytest.param("CyclicController", False, 2, marks=pytest.mark.long),
        pytest.param("CyclicController", True, 3, marks=pytest.mark.long),
        pytest.param("Cyclic", False, 3, marks=pytest.mark.long),
        pytest.param("Cyclic", True, 2, marks=pytest.mark.long),
        pytest.param("scatter and gather", False, 3, marks=pytest.mark.long),
        pytest.param("scatter and gather", True, 2, marks=pytest.mark.long),
        pytest.param("FedAvg", False, 2, marks=pytest.mark.long),
        pytest.param("FedAvg", True, 3, marks=pytest.mark.long),
        pytest.param("FedAvg, then evaluation", False, 2, marks=pytest.mark.long),
        pytest.param("FedAvg, then evaluation", True, 3, marks=pytest.mark.long),
        pytest.param("FedAvg, then CrossSiteEval", False, 3, marks=pytest.mark.long),
        pytest.param("FedAvg, then CrossSiteEval", True, 2, marks=pytest.mark.long),
        pytest.param("FedOpt", False, 2, marks=pytest.mark.long),
        pytest.param("FedOpt", True, 3, marks=pytest.mark.long),
        pytest.param("Scaffold", False, 2, marks=pytest.mark.long),
        pytest.param("Scaffold", True, 3, marks=pytest.mark.long),
    ],
)
def test_a_record_has_the_round_of_its_call(tmp_path: Path, workflow: str, external: bool, n_clients: int) -> None:
    job = _run(tmp_path, workflow, external, n_clients)

    _assert_rounds_are_those_of_the_calls(job, n_clients)
    report: dict[str, Any] = job.report("server")
    assert {name: _end(job, name) for name in report["sites"]} == dict.fromkeys(report["sites"], "finished")


@pytest.mark.long
@pytest.mark.parametrize("external", [False, True], ids=["in process", "external"])
def test_a_site_that_its_workflow_cuts_off_gets_no_wrong_round(tmp_path: Path, external: bool) -> None:
    """FLARE hands over the next task while the script works on the old one."""
    job = _run(tmp_path, "swarm that cuts off a slow site", external, 3, trainer=_SLOW_TRAINER)

    assert "already running a task: aborting it" in job.log
    assert set(_seen_and_round(job, "site-3")) == {(0, 0), (0, None)}
    for site in ("site-1", "site-2"):
        assert _seen_and_round(job, site) == [(number, number) for number in range(5)]


def test_server_logs_have_the_workflow_round(tmp_path: Path) -> None:
    """A component that FLARE calls before the receiver sees the new round. After a workflow there is none.

    The last workflow triggers the abort signal when it is done. The job is finished, not aborted.
    """
    job = _run(tmp_path, "a controller that ends by itself", external=False, n_clients=2)

    assert _seen_and_round(job, "server") == [(0, 0), (1, 1), (2, 2), (-1, None), (-1, None)]
    assert {name: _end(job, name) for name in ("server", "site-1", "site-2")} == dict.fromkeys(
        ("server", "site-1", "site-2"), "finished"
    )


def _values(job: JobResult, receiver: str, site: str) -> list[tuple[str, float, int | None, int | None]]:
    return [(point.key, point.value, point.step, point.round) for point in job.jsonl_points(receiver, site)]


def _evaluations_in_flares_file(job: JobResult) -> list[tuple[str, float, None]]:
    """Return what FLARE itself says of cross-site evaluation, as the points that the server should have."""
    found = json.loads((job.run_dir("server") / "cross_site_val" / "cross_val_results.json").read_text())
    pairs = {(client, owner) for client, owners in found.items() for owner in owners}
    assert pairs >= {(a, b) for a in ("site-1", "site-2") for b in ("site-1", "site-2")}
    return [
        (f"cross_site/{client}/{owner}/{metric}", value, None)
        for client, owner in pairs
        for metric, value in (
            ("accuracy", found[client][owner]["accuracy"]), ("per/cat", found[client][owner]["per"]["cat"])
        )
    ]  # fmt: skip


_SENT = [("flare/accuracy", 0.734512, number, number) for number in range(3)]


@pytest.mark.long
@pytest.mark.parametrize("workflow", ["FedAvg, then evaluation", "FedAvg, then CrossSiteEval"])
@pytest.mark.parametrize("external", [False, True], ids=["in process", "external"])
def test_metrics_that_flare_carries_are_records(tmp_path: Path, workflow: str, external: bool) -> None:
    """Those of each model, of cross-site evaluation, of analytics events of another type, and early ones."""
    job = _run(tmp_path, workflow, external, 2, trainer=_EVALUATING_TRAINER, mode="flare_metrics")

    assert job.rc == 0, job.log[-6000:]
    for site in ("site-1", "site-2"):
        values = _values(job, "server", site)
        assert values == _values(job, site, site)
        assert values[0] == ("planted_early", 0.25, 3, None)
        assert [value for value in values if value[0] == "flare/accuracy"] == _SENT
        custom = [(value, step, number) for key, value, step, number in values if key == "planted_custom"]
        assert custom[:3] == [(0.125, 3, number) for number in range(3)]
        evaluated = {key: value for key, value, *_ in values if key.startswith("cross_site/")}
        assert {f"cross_site/{owner}/accuracy": 0.734512 for owner in ("site-1", "site-2")}.items() <= evaluated.items()
    seen = [value[:3] for value in _values(job, "server", "server") if value[0].startswith("cross_site/")]
    assert sorted(seen, key=str) == sorted(_evaluations_in_flares_file(job), key=str)
    server = [value[:3] for value in _values(job, "server", "server") if value[0].startswith("planted")]
    assert server == [("planted_early", 0.25, 3), *[("planted_custom", 0.125, 3)] * 3]
    averages = {point.key: point.value for point in job.jsonl_points("server", "federation")}
    assert averages["aggregated/accuracy"] == averages["flare/accuracy/mean"] == pytest.approx(0.734512)
    assert job.report("server")["balanced"]


@pytest.mark.long
def test_metrics_are_records_where_clients_control_the_workflow(tmp_path: Path) -> None:
    job = _run(tmp_path, "swarm, then evaluation", False, 2, trainer=_EVALUATING_TRAINER, mode="flare_metrics")

    assert job.rc == 0, job.log[-6000:]
    for site in ("site-1", "site-2"):
        values = _values(job, "server", site)
        assert values == _values(job, site, site)
        assert [value for value in values if value[0] == "flare/accuracy"] == _SENT
        evaluated = {key for key, *_ in values if key.startswith("cross_site/") and key.endswith("/accuracy")}
        assert evaluated >= {f"cross_site/{owner}/accuracy" for owner in ("site-1", "site-2")}
    seen = [value[:3] for value in _values(job, "server", "server") if value[0].startswith("cross_site/")]
    assert sorted(seen, key=str) == sorted(_evaluations_in_flares_file(job), key=str)


@pytest.mark.long
def test_in_client_only_mode_the_server_records_none_of_them(tmp_path: Path) -> None:
    """FLARE itself carries the metrics to the server, and writes them into its own file there."""
    job = _run(tmp_path, "FedAvg, then evaluation", False, 2, trainer=_EVALUATING_TRAINER, mode="client only")

    assert job.rc == 0, job.log[-6000:]
    for site in ("site-1", "site-2"):
        values = _values(job, site, site)
        assert [value for value in values if value[0] == "flare/accuracy"] == _SENT
        assert {value[0] for value in values} >= {"planted_early", "planted_custom", "cross_site/site-1/accuracy"}
    assert not (job.run_dir("server") / "trackhub").exists()
    assert list(files_with(job.workspace / "server", b"planted_early", b"planted_custom")) == []
    assert list(files_with(job.workspace / "server", b"flare/accuracy", b"cross_site/")) == []


def test_one_learner_that_raised_fails_the_job_at_all_sites(tmp_path: Path) -> None:
    """The server alone knows it. It tells the other sites, whose own receivers end their runs alike."""
    job = _run(tmp_path, "FedAvg", external=False, n_clients=2, env={"TRACKHUB_TEST_TRAINER": "site-2 fails"})

    assert {site: _end(job, site) for site in ("server", "site-1", "site-2")} == dict.fromkeys(
        ("server", "site-1", "site-2"), "failed"
    )
    assert {receiver: job.report(receiver)["status"] for receiver in ("server", "site-1", "site-2")} == dict.fromkeys(
        ("server", "site-1", "site-2"), "failed"
    )


@pytest.mark.long
def test_a_learner_that_raised_is_failed_in_a_swarm_too(tmp_path: Path) -> None:
    """FLARE ends the swarm job, and tells nobody but the server that it failed."""
    job = _run(tmp_path, "swarm", external=False, n_clients=2, env={"TRACKHUB_TEST_TRAINER": "fails"})

    assert {_end(job, site) for site in ("site-1", "site-2")} == {"failed"}


@pytest.mark.long
def test_a_site_that_raised_has_failed_where_the_workflow_ends_well(tmp_path: Path) -> None:
    """FLARE's cyclic controller ends without an error then, and the job counts as finished."""
    env = {"TRACKHUB_TEST_TRAINER": "site-2 fails"}
    job = _run(tmp_path, "CyclicController", external=False, n_clients=2, env=env)

    assert job.rc == 0, job.log[-6000:]
    assert [_end(job, site) for site in ("server", "site-1", "site-2")] == ["finished", "finished", "failed"]
    assert job.report("site-2")["status"] == "failed"


def test_a_client_cannot_end_the_servers_tracking(tmp_path: Path) -> None:
    """Any component of a client can send a federated event of any type. FLARE then fires it on the server.

    FLARE's own runner does take a FATAL_SYSTEM_ERROR that a client made up, and aborts the job.
    """
    job = _run(tmp_path, "a hostile client", external=False, n_clients=2)

    _assert_rounds_are_those_of_the_calls(job, 2)
    points = job.jsonl_points("server", "server")
    assert [point.key for point in points].count("made_up") == 2
    assert [(point.value, point.round) for point in points if point.key == "seen"][:3] == [(0, 0), (1, 1), (2, 2)]
