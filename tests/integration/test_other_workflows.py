# SPDX-License-Identifier: Apache-2.0
"""FLARE's workflows beside those of `test_workflows`: split learning, statistics, peer to peer, controllers at clients.

Each executor and script logs the round that the task's data names, and -1 where it names none. A record is right if its
``round`` is that number, or null for -1. Many of these workflows have no rounds.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import TRAINER, JobResult, read_jsonl, run_script

pytestmark = pytest.mark.long

_PARTS = """
import json
import os
import threading
import time

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.learner_spec import Learner
from nvflare.app_common.abstract.model_learner import ModelLearner
from nvflare.app_common.abstract.response_processor import ResponseProcessor
from nvflare.app_common.abstract.statistics_spec import DataType, Feature, Statistics
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants

from trackhub import Writer

_lock = threading.Lock()


def note(fl_ctx, data=None):
    '''Log the round of this task's data, twice with a pause that differs by site, and note the calls.'''
    current = None if data is None else data.get_header(AppConstants.CURRENT_ROUND)
    log(fl_ctx.get_identity_name(), -1 if current is None else current)


def log(site, seen):
    for _ in range(2):
        with _lock:  # for the order of the two files
            Writer().log({"seen": seen})
            with open(os.path.join(os.environ["TRACKHUB_TEST_OUT"], site + ".facts"), "a") as facts:
                facts.write(json.dumps(["seen", seen, None, 0, 0]) + "\\n")
        time.sleep(0.03 * int(site[-1]))


class Answers(Executor):
    '''Answers each task with its own data.'''

    def __init__(self, kind="WEIGHTS"):
        super().__init__()
        self.kind = kind

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        note(fl_ctx, shareable)
        if os.environ.get("TRACKHUB_TEST_TRAINER") == f"{fl_ctx.get_identity_name()} fails":
            raise RuntimeError("this executor fails")
        return DXO(self.kind, data={"numpy_key": np.zeros((2, 2))}, meta={"NUM_STEPS_CURRENT_ROUND": 1}).to_shareable()


class ScaffoldAnswers(Executor):
    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        note(fl_ctx, shareable)
        return DXO(DataKind.COLLECTION, data={
            AppConstants.MODEL_WEIGHTS: DXO(DataKind.WEIGHTS, data={"numpy_key": np.zeros((2, 2))}),
            AlgorithmConstants.SCAFFOLD_CTRL_DIFF: DXO(DataKind.WEIGHT_DIFF, data={"numpy_key": np.zeros((2, 2))}),
        }).to_shareable()


class SplitLearner(Learner):
    '''The second site asks the first one for each batch, by a message of its own, which no executor handles.'''

    def initialize(self, parts, fl_ctx):
        self.engine = fl_ctx.get_engine()
        self.site = fl_ctx.get_identity_name()
        self.engine.register_aux_message_handler(topic="batch", message_handle_func=self.on_batch)

    def on_batch(self, topic, request, fl_ctx):
        log(self.site, -1)
        return make_reply(ReturnCode.OK)

    def init_model(self, shareable, fl_ctx, abort_signal):
        note(fl_ctx, shareable)
        return make_reply(ReturnCode.OK)

    def train(self, shareable, fl_ctx, abort_signal):
        if self.site == "site-2":
            for _ in range(shareable.get_header(AppConstants.NUM_ROUNDS)):
                log(self.site, -1)
                self.engine.send_aux_request(["site-1"], "batch", Shareable(), 10.0, fl_ctx)
        return make_reply(ReturnCode.OK)


class SomeLearner(Learner):
    def train(self, data, fl_ctx, abort_signal):
        note(fl_ctx, data)
        return DXO(DataKind.WEIGHTS, data={"numpy_key": np.zeros((2, 2))}).to_shareable()


class SomeModelLearner(ModelLearner):
    def train(self, model):
        log(self.site_name, model.current_round)
        return model


class Accepts(ResponseProcessor):
    def create_task_data(self, task_name, fl_ctx):
        return Shareable()

    def process_client_response(self, client, task_name, response, fl_ctx):
        return response.get_return_code() == ReturnCode.OK

    def final_process(self, fl_ctx):
        return True


class Numbers(Statistics):
    def initialize(self, fl_ctx):
        self.site = fl_ctx.get_identity_name()

    def features(self):
        log(self.site, -1)
        return {"train": [Feature("age", DataType.FLOAT)]}

    def count(self, dataset_name, feature_name):
        log(self.site, -1)
        return 1000

    def sum(self, dataset_name, feature_name):
        return 10.0

    def mean(self, dataset_name, feature_name):
        return 0.01
"""

_CONSENSUS = """
from nvflare.app_opt.p2p.executors import ConsensusExecutor
from parts import log


class Consensus(ConsensusExecutor):
    def _exchange_values(self, fl_ctx, value, iteration):
        log(fl_ctx.get_identity_name(), -1)
        super()._exchange_values(fl_ctx, value, iteration)

    def _post_algorithm_run(self, *args, **kwargs):
        pass
"""

_JOB = """
import sys
from pathlib import Path

from nvflare.apis.dxo import DataKind
from nvflare.apis.job_def import ALL_SITES
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.job_config.api import FedJob
from nvflare.recipe import SimEnv
import parts

from trackhub.flare.recipe import add_tracking

HERE = Path(__file__).parent
MODEL = [[0.0, 0.0], [0.0, 0.0]]
SITES = []


def new_job(with_model=True):
    job = FedJob(name="job", min_clients=len(SITES))
    if with_model:
        job.to_server(NPModelPersistor(model=MODEL), id="persistor")
        job.to_server(FullModelShareableGenerator(), id="shareable_generator")
        job.to_server(InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS), id="aggregator")
    return job


def scatter(n_rounds):
    return ScatterAndGather(min_clients=len(SITES), num_rounds=n_rounds, start_round=0, wait_time_after_min_received=0,
                            aggregator_id="aggregator", persistor_id="persistor",
                            shareable_generator_id="shareable_generator")


def split_learning():
    from nvflare.app_common.executors.splitnn_learner_executor import SplitNNLearnerExecutor
    from nvflare.app_common.workflows.splitnn_workflow import SplitNNController

    job = new_job()
    job.to_server(SplitNNController(num_rounds=3, task_timeout=60))
    job.to_clients(parts.SplitLearner(), id="learner")
    job.to_clients(SplitNNLearnerExecutor(learner_id="learner"))
    return job


def scaffold_by_scatter_and_gather():
    from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
    from nvflare.app_common.workflows.scatter_and_gather_scaffold import ScatterAndGatherScaffold

    job = FedJob(name="job", min_clients=len(SITES))
    job.to_server(NPModelPersistor(model=MODEL), id="persistor")
    job.to_server(FullModelShareableGenerator(), id="shareable_generator")
    kinds = {AppConstants.MODEL_WEIGHTS: DataKind.WEIGHTS, AlgorithmConstants.SCAFFOLD_CTRL_DIFF: DataKind.WEIGHT_DIFF}
    job.to_server(InTimeAccumulateWeightedAggregator(expected_data_kind=kinds), id="aggregator")
    job.to_server(ScatterAndGatherScaffold(min_clients=len(SITES), num_rounds=3, wait_time_after_min_received=0))
    job.to_clients(parts.ScaffoldAnswers())
    return job


def learners():
    from nvflare.app_common.executors.learner_executor import LearnerExecutor

    job = new_job()
    job.to_server(scatter(3))
    job.to_clients(parts.SomeLearner(), id="learner")
    job.to_clients(LearnerExecutor(learner_id="learner"))
    return job


def model_learners():
    from nvflare.app_common.executors.model_learner_executor import ModelLearnerExecutor

    job = new_job()
    job.to_server(scatter(3))
    job.to_clients(parts.SomeModelLearner(), id="learner")
    job.to_clients(ModelLearnerExecutor(learner_id="learner"))
    return job


def rounds_then_broadcast():
    from nvflare.app_common.workflows.broadcast_and_process import BroadcastAndProcess

    job = new_job()
    job.to_server(scatter(2))
    job.to_server(BroadcastAndProcess(processor=parts.Accepts(), task_name="collect"))
    job.to_clients(parts.Answers(), tasks=["train"])
    job.to_clients(parts.Answers(), tasks=["collect"])
    return job


def statistics():
    from nvflare.recipe.fedstats import FedStatsRecipe

    return FedStatsRecipe(name="job", stats_output_path="statistics.json", sites=SITES, stats_generator=parts.Numbers(),
                          statistic_configs={"count": {}, "sum": {}, "mean": {}})._job


def peer_to_peer():
    from consensus import Consensus
    from nvflare.app_opt.p2p.controllers import DistOptController
    from nvflare.app_opt.p2p.types import Config, Neighbor, Network, Node

    job = new_job(with_model=False)
    nodes = [Node(id=site, neighbors=[Neighbor(id=other, weight=0.3) for other in SITES if other != site])
             for site in SITES]
    job.to_server(DistOptController(config=Config(network=Network(nodes=nodes), extra={"iterations": 3})))
    for site in SITES:
        job.to(Consensus(initial_value=1.0), site)
    return job


def controllers_at_clients():
    from nvflare.app_common.ccwf.client_controller_executor import ClientControllerExecutor
    from nvflare.app_common.ccwf.server_ctl import ServerSideController

    job = FedJob(name="job", min_clients=len(SITES))
    job.to_server(ServerSideController(num_rounds=1, starting_client="site-1"))
    job.to_clients(ClientControllerExecutor(controller_id_list=["controller"], task_name_prefix="wf",
                                            persistor_id="persistor"), tasks=["wf_*"])
    job.to_clients(parts.Answers(), tasks=["train"])
    job.to_clients(NPModelPersistor(model=MODEL), id="persistor")
    job.to_clients(FullModelShareableGenerator(), id="shareable_generator")
    job.to_clients(InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS), id="aggregator")
    job.to(scatter(3), ALL_SITES, id="controller")
    return job


def task(external):
    from nvflare.recipe.fed_task import FedTaskRecipe

    return FedTaskRecipe(name="job", min_clients=len(SITES), task_script=str(HERE / "client.py"),
                         launch_external_process=external)._job


def logistic_regression(external):
    from nvflare.app_common.np.recipes.lr.fedavg import FedAvgLrRecipe

    return FedAvgLrRecipe(name="job", min_clients=len(SITES), num_rounds=3, num_features=1,
                          train_script=str(HERE / "client.py"), launch_external_process=external)._job


def a_process_for_each_task():
    from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

    return NumpyFedAvgRecipe(name="job", model=MODEL, min_clients=len(SITES), num_rounds=3, launch_once=False,
                             train_script=str(HERE / "client.py"), launch_external_process=True)


if __name__ == "__main__":
    SITES += [f"site-{i + 1}" for i in range(int(sys.argv[2]))]
    make, _, mode = sys.argv[1].partition(", ")
    job = globals()[make.replace(" ", "_")](*([mode == "external"] if mode else []))
    add_tracking(job, server=["jsonl", "tensorboard"], clients=["jsonl"], context=False)
    if make == "a process for each task":
        job.execute(SimEnv(num_clients=len(SITES), workspace_root=str(HERE / "workspace")))
        sys.exit()
    n_clients = None if set(SITES) <= set(job.clients) else len(SITES)  # None if the job names its sites
    job.simulator_run(str(HERE / "workspace" / "job"), n_clients=n_clients, threads=len(SITES))
"""

_TRAINER = """
from trackhub import Writer

writer = Writer()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    seen = -1 if model.current_round is None else model.current_round
    fact(lambda: writer.log({"seen": seen}), {"seen": seen})
    time.sleep(0.05 * int(SITE[-1]))
    fact(lambda: writer.log({"seen": seen}), {"seen": seen})
    params = {"gradient": np.zeros((2, 1)), "hessian": np.eye(2), "numpy_key": np.zeros((2, 2))}
    flare.send(flare.FLModel(params=params, params_type="FULL", meta={"sample_size": 1}))
"""


def _run(folder: Path, workflow: str, n_clients: int, trainer: str = "") -> JobResult:
    files = {"job.py": _JOB, "parts.py": _PARTS, "consensus.py": _CONSENSUS}
    files["client.py"] = TRAINER + "import numpy as np\n" + _TRAINER
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    env = {"PYTHONPATH": str(folder), "TRACKHUB_TEST_TRAINER": trainer}
    rc, log = run_script(["job.py", workflow, str(n_clients)], folder, folder / "out", env, 200)
    return JobResult(rc, log, folder / "workspace" / "job", folder / "out")


def _status(job: JobResult, sites: list[str]) -> dict[str, str]:
    """Return the status that each receiver reports, and in which each run ended."""
    found: dict[str, Any] = {name: job.report(name)["status"] for name in ("server", *sites)}
    for receiver, site in (*(("server", site) for site in sites), *((site, site) for site in sites)):
        found[f"run of {site} at {receiver}"] = read_jsonl(job.jsonl_file(receiver, site))[-1]["status"]
    return found


@pytest.mark.parametrize(
    ("workflow", "n_clients", "n_calls"),
    [
        ("split learning", 2, 0),
        ("scaffold by scatter and gather", 2, 6),
        ("learners", 2, 6),
        ("model learners", 3, 6),
        ("rounds then broadcast", 2, 6),
        ("statistics", 3, 0),
        ("peer to peer", 3, 0),
        ("controllers at clients", 2, 6),
        ("controllers at clients", 3, 6),
        ("task, in process", 2, 2),
        ("task, external", 2, 2),
        ("logistic regression, in process", 2, 6),
        ("logistic regression, external", 3, 6),
        ("a process for each task", 2, 6),
    ],
)
def test_a_record_has_the_round_of_its_call(tmp_path: Path, workflow: str, n_clients: int, n_calls: int) -> None:
    job = _run(tmp_path, workflow, n_clients)

    assert job.rc == 0, job.log[-6000:]
    sites = [f"site-{i + 1}" for i in range(n_clients)]
    assert set(_status(job, sites).values()) == {"finished"}, job.log[-6000:]
    for site in sites:
        facts = [int(fact.value) for fact in job.facts(site)]
        assert facts
        assert len(facts) == n_calls or not n_calls
        for receiver in ("server", site):
            points = [(int(point.value), point.round) for point in job.jsonl_points(receiver, site)]
            assert sorted(seen for seen, _ in points) == sorted(facts)
            assert [(seen, number) for seen, number in points if seen != (-1 if number is None else number)] == []
        drawn = job.tensorboard_points("server", site)
        assert sorted(int(point.value) for point in drawn) == sorted(facts)
    assert job.report("server")["balanced"]
