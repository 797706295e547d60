# SPDX-License-Identifier: Apache-2.0
"""FLARE's workflows beside those of `test_workflows`: split learning, statistics, peer to peer, edge devices, others.

Each executor and script logs the round that the task's data names, and -1 where it names none. A record is right if its
``round`` is that number, or null for -1. Many of these workflows have no rounds.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import TRAINER, JobResult, read_jsonl, run_script
from tests.integration.parts_of_other_workflows import CONSENSUS, ENCRYPTION, FEATURES, NET, PARTS

pytestmark = pytest.mark.long

TRAINERS = Path(__file__).parents[2] / ".venv-trainers"

_JOB = """
import json
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
from nvflare.recipe.spec import Recipe
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


def hierarchical_statistics():
    from nvflare.app_common.executors.statistics.statistics_executor import StatisticsExecutor
    from nvflare.app_common.statistics.json_stats_file_persistor import JsonStatsFileWriter
    from nvflare.app_common.workflows.hierarchical_statistics_controller import HierarchicalStatisticsController
    from nvflare.job_config.file_source import FileSource

    groups = [{"Name": f"group of {site}", "Sites": [site]} for site in SITES]
    (HERE / "hierarchy.json").write_text(json.dumps({"Groups": groups}))
    job = new_job(with_model=False)
    job.to_server(HierarchicalStatisticsController(
        statistic_configs={"count": {}, "sum": {}, "mean": {}}, writer_id="writer", hierarchy_config="hierarchy.json"))
    encoder = "nvflare.app_common.utils.json_utils.ObjectEncoder"
    job.to_server(JsonStatsFileWriter(output_path="statistics.json", json_encoder_path=encoder), id="writer")
    job.to_server(FileSource(str(HERE / "hierarchy.json"), app_folder_type="config"))
    job.to_clients(parts.Numbers(), id="numbers")
    job.to_clients(StatisticsExecutor(generator_id="numbers"), tasks=["fed_stats_pre_run", "fed_stats"])
    return job


def private_set_intersection():
    from nvflare.app_common.psi.dh_psi.dh_psi_controller import DhPSIController
    from nvflare.app_common.psi.psi_executor import PSIExecutor

    job = new_job(with_model=False)
    job.to_server(DhPSIController())
    job.to_clients(PSIExecutor(psi_algo_id="algorithm"), tasks=["PSI"])
    job.to_clients(parts.PlainIntersection(), id="algorithm")
    job.to_clients(parts.Items(psi_writer_id="writer"), id="items")
    job.to_clients(parts.KeepsIntersection(), id="writer")
    return job


def feature_election():
    from features import Elects
    from nvflare.app_opt.feature_election.controller import FeatureElectionController

    job = new_job(with_model=False)
    controller = FeatureElectionController(min_clients=len(SITES), num_rounds=1, wait_time_after_min_received=0)
    controller.num_rounds = 1  # FLARE writes it into the job only if it has this name
    job.to_server(controller)
    job.to_clients(Elects(), tasks=["feature_election"])
    return job


def etl_between_rounds():
    from nvflare.app_common.workflows.etl_controller import ETLController

    job = new_job()
    job.to_server(ETLController(persistor_id="persistor"))
    job.to_server(scatter(2))
    job.to_clients(parts.Answers(), tasks=["train"])
    job.to_clients(parts.Answers(), tasks=["etl"])
    return job


def weights_from_clients():
    from nvflare.app_common.workflows.initialize_global_weights import InitializeGlobalWeights

    job = new_job()
    job.to_server(InitializeGlobalWeights(task_name="get_weights"))
    job.to_server(scatter(2))
    job.to_clients(parts.Answers(), tasks=["train"])
    job.to_clients(parts.Answers(), tasks=["get_weights"])
    return job


def edge_devices():
    from net import Net
    from nvflare.edge.tools.edge_fed_buff_recipe import (
        DeviceManagerConfig, EdgeFedBuffRecipe, ModelManagerConfig, SimulationConfig,
    )

    recipe = EdgeFedBuffRecipe(
        job_name="job", model=Net(),
        model_manager_config=ModelManagerConfig(max_model_version=3, num_updates_for_model=2, global_lr=1.0),
        device_manager_config=DeviceManagerConfig(device_selection_size=2, min_hole_to_fill=2),
        simulation_config=SimulationConfig(task_processor=parts.Device(), num_devices=1, num_workers=1),
    )
    recipe._job.to_clients(parts.TellsSite(), tasks=["nothing"])
    return recipe._job


def encrypted_weights():
    import tenseal
    from encryption import KeepsNothing, Keys
    from nvflare import FilterType
    from nvflare.app_opt.he.intime_accumulate_model_aggregator import HEInTimeAccumulateWeightedAggregator
    from nvflare.app_opt.he.model_decryptor import HEModelDecryptor
    from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
    from nvflare.app_opt.he.model_shareable_generator import HEModelShareableGenerator

    keys = HERE / "keys"
    keys.mkdir()
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40])
    context.global_scale = 2**40
    (keys / "client_context.tenseal").write_bytes(context.serialize(save_secret_key=True))
    context.make_context_public()
    (keys / "server_context.tenseal").write_bytes(context.serialize())
    job = FedJob(name="job", min_clients=len(SITES))
    job.to_server(KeepsNothing(model=MODEL), id="persistor")
    job.to_server(HEModelShareableGenerator(), id="shareable_generator")
    job.to_server(HEInTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS), id="aggregator")
    job.to_server(scatter(3))
    job.to_server(Keys(str(keys)), id="keys")
    job.to_clients(Keys(str(keys)), id="keys")
    job.to_clients(parts.Answers(), tasks=["train"])
    job.to_clients(HEModelDecryptor(), tasks=["train"], filter_type=FilterType.TASK_DATA)
    job.to_clients(HEModelEncryptor(weigh_by_local_iter=True), tasks=["train"], filter_type=FilterType.TASK_RESULT)
    return job


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


def permitted(recipe):
    # FLARE's own list of permitted classes lacks those of scikit-learn. An app with code of its own is free of it.
    recipe._job.to_server(str(HERE / "parts.py"))
    return recipe


def k_means(external):
    from nvflare.app_opt.sklearn.recipes.kmeans import KMeansFedAvgRecipe

    recipe = KMeansFedAvgRecipe(name="job", min_clients=len(SITES), num_rounds=3, n_clusters=2, train_args="k-means",
                              train_script=str(HERE / "client.py"), launch_external_process=external)
    return permitted(recipe)


def support_vectors(external):
    from nvflare.app_opt.sklearn.recipes.svm import SVMFedAvgRecipe

    recipe = SVMFedAvgRecipe(name="job", min_clients=len(SITES), train_args="support-vectors",
                           train_script=str(HERE / "client.py"), launch_external_process=external)
    return permitted(recipe)


def linear_model(external):
    from nvflare.app_opt.sklearn.recipes.fedavg import SklearnFedAvgRecipe

    recipe = SklearnFedAvgRecipe(name="job", min_clients=len(SITES), num_rounds=3, model_params={"n_classes": 2},
                               train_script=str(HERE / "client.py"), launch_external_process=external)
    return permitted(recipe)


def evaluation_of_a_checkpoint(external):
    import torch
    from net import Net
    from nvflare.app_opt.pt.recipes.fedeval import FedEvalRecipe

    torch.save(Net().state_dict(), HERE / "model.pt")
    return FedEvalRecipe(name="job", model=Net(), eval_ckpt=str(HERE / "model.pt"), min_clients=len(SITES),
                         eval_script=str(HERE / "client.py"), launch_external_process=external)


def a_process_for_each_task():
    from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

    return NumpyFedAvgRecipe(name="job", model=MODEL, min_clients=len(SITES), num_rounds=3, launch_once=False,
                             train_script=str(HERE / "client.py"), launch_external_process=True)


if __name__ == "__main__":
    SITES += [f"site-{i + 1}" for i in range(int(sys.argv[2]))]
    make, _, mode = sys.argv[1].partition(", ")
    job = globals()[make.replace(" ", "_")](*([mode == "external"] if mode else []))
    add_tracking(job, server=["jsonl", "tensorboard"], clients=["jsonl"], context=False)
    if isinstance(job, Recipe):
        job.execute(SimEnv(num_clients=len(SITES), workspace_root=str(HERE / "workspace")))
        sys.exit()
    n_clients = None if set(SITES) <= set(job.clients) else len(SITES)  # None if the job names its sites
    job.simulator_run(str(HERE / "workspace" / "job"), n_clients=n_clients, threads=len(SITES))
"""

_TRAINER = """
from trackhub import Writer

writer = Writer()
MORE = {
    "k-means": {"center": np.array([[0.0, 1.0], [1.0, 0.0]]), "count": np.array([3, 4])},
    "support-vectors": {"support_x": np.array([[0.0, 1.0], [1.0, 0.0]]), "support_y": np.array([0, 1])},
}.get(sys.argv[-1], {})
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    seen = -1 if model.current_round is None else model.current_round
    fact(lambda: writer.log({"seen": seen}), {"seen": seen})
    time.sleep(0.05 * int(SITE[-1]))
    fact(lambda: writer.log({"seen": seen}), {"seen": seen})
    params = {"gradient": np.zeros((2, 1)), "hessian": np.eye(2), "numpy_key": np.zeros((2, 2)), **MORE}
    flare.send(flare.FLModel(params=params, params_type="FULL", meta={"sample_size": 1}))
"""


def _run(folder: Path, workflow: str, n_clients: int, trainer: str = "", python: str = sys.executable) -> JobResult:
    files = {"job.py": _JOB, "parts.py": PARTS, "consensus.py": CONSENSUS, "features.py": FEATURES, "net.py": NET}
    files["encryption.py"] = ENCRYPTION
    files["client.py"] = TRAINER + "import sys\nimport numpy as np\n" + _TRAINER
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    env = {"PYTHONPATH": str(folder), "TRACKHUB_TEST_TRAINER": trainer}
    rc, log = run_script(["job.py", workflow, str(n_clients)], folder, folder / "out", env, 200, python=python)
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
        ("hierarchical statistics", 3, 0),
        ("private set intersection", 2, 0),
        ("feature election", 2, 0),
        ("etl between rounds", 2, 6),
        ("weights from clients", 2, 6),
        ("edge devices", 2, 4),
        ("k means, in process", 2, 6),
        ("k means, external", 3, 6),
        ("support vectors, in process", 2, 4),
        ("linear model, external", 2, 6),
        ("evaluation of a checkpoint, in process", 2, 2),
        ("evaluation of a checkpoint, external", 2, 2),
    ],
)
def test_a_record_has_the_round_of_its_call(tmp_path: Path, workflow: str, n_clients: int, n_calls: int) -> None:
    _assert_rounds_are_those_of_the_calls(_run(tmp_path, workflow, n_clients), n_clients, n_calls)


@pytest.mark.skipif(not any(TRAINERS.glob("lib/*/site-packages/tenseal")), reason="`make trainers` installs tenseal")
def test_a_record_has_the_round_of_its_call_where_weights_are_encrypted(tmp_path: Path) -> None:
    job = _run(tmp_path, "encrypted weights", 2, python=str(TRAINERS / "bin" / "python"))

    _assert_rounds_are_those_of_the_calls(job, 2, 6)
    assert "Running HE Encryption algorithm" in job.log


def _assert_rounds_are_those_of_the_calls(job: JobResult, n_clients: int, n_calls: int) -> None:
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
