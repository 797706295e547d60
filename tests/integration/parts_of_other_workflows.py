# SPDX-License-Identifier: Apache-2.0
"""The sources of the modules that the jobs of `test_other_workflows` consist of: executors, learners, devices, a model.

Each text becomes a file beside the job. Each part logs with the same ``note`` or ``log``.
"""

__all__ = ["CONSENSUS", "ENCRYPTION", "FEATURES", "NET", "PARTS"]

PARTS = """
import json
import os
import threading
import time

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.learner_spec import Learner
from nvflare.app_common.abstract.model_learner import ModelLearner
from nvflare.app_common.abstract.response_processor import ResponseProcessor
from nvflare.app_common.abstract.statistics_spec import DataType, Feature, Statistics
from nvflare.app_common.abstract.task_handler import TaskHandler
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants, PSIConst
from nvflare.app_common.psi.psi_spec import PSI
from nvflare.app_common.psi.psi_writer_spec import PSIWriter
from nvflare.edge.constants import CookieKey
from nvflare.edge.simulation.device_task_processor import DeviceTaskProcessor

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


class Items(PSI):
    def load_items(self):
        site = self.fl_ctx.get_identity_name()
        log(site, -1)
        return [f"item-{i}" for i in range(int(site[-1]), 9)]

    def save(self, intersection):
        log(self.fl_ctx.get_identity_name(), -1)
        super().save(intersection)


class KeepsIntersection(PSIWriter):
    def save(self, intersection, overwrite_existing, fl_ctx):
        path = os.path.join(os.environ["TRACKHUB_TEST_OUT"], fl_ctx.get_identity_name() + ".intersection")
        with open(path, "w") as file:
            json.dump(sorted(intersection), file)


class PlainIntersection(TaskHandler):
    '''Intersects in the open: the messages of FLARE's workflow, without the library that encrypts them.'''

    def __init__(self):
        super().__init__("items", PSI)

    def execute_task(self, task_name, shareable, fl_ctx, abort_signal):
        log(fl_ctx.get_identity_name(), -1)
        stage, mine = shareable[PSIConst.TASK_KEY], self._items()
        if stage == PSIConst.TASK_PREPARE:
            return {PSIConst.ITEMS_SIZE: len(mine)}
        if stage == PSIConst.TASK_SETUP:
            sizes = shareable.get(PSIConst.ITEMS_SIZE_SET)
            return {PSIConst.SETUP_MSG: mine if sizes is None else {str(size): mine for size in sizes}}
        if stage == PSIConst.TASK_REQUEST:
            return {PSIConst.REQUEST_MSG: mine}
        if stage == PSIConst.TASK_RESPONSE:
            others = shareable.get(PSIConst.REQUEST_MSG_SET)
            if others is None:
                return {PSIConst.RESPONSE_MSG: sorted({*mine} & {*shareable[PSIConst.REQUEST_MSG]})}
            return {PSIConst.RESPONSE_MSG: {name: sorted({*mine} & {*items}) for name, items in others.items()}}
        self.local_comp.save(shareable[PSIConst.RESPONSE_MSG])
        return {PSIConst.ITEMS_SIZE: len(self._items())}

    def _items(self):
        found = self.local_comp.get_intersection()
        return self.local_comp.load_items() if found is None else found


class Device(DeviceTaskProcessor):
    '''Trains at a simulated device. It logs nothing with the last model: FLARE ends the job without waiting for it.'''

    def setup(self, job):
        pass

    def shutdown(self):
        pass

    def process_task(self, task):
        if task.cookie[CookieKey.MODEL_VERSION] < 3:
            log(os.environ["TRACKHUB_TEST_SITE"], 0)
        shapes = {"weight": (1, 2), "bias": (1,)}
        update = {name: np.ones(shape, "float32") for name, shape in shapes.items()}
        return DXO(DataKind.WEIGHT_DIFF, data={"dict": update}).to_dict()


class TellsSite(Executor):
    '''Tells the devices of this client's process which site they belong to.'''

    def handle_event(self, event_type, fl_ctx):
        if event_type == EventType.ABOUT_TO_START_RUN:
            os.environ["TRACKHUB_TEST_SITE"] = fl_ctx.get_identity_name()

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        raise RuntimeError("nobody asks for this")
"""

FEATURES = """
import numpy as np
from nvflare.app_opt.feature_election.executor import FeatureElectionExecutor
from parts import note


class Elects(FeatureElectionExecutor):
    def __init__(self):
        super().__init__(fs_method="lasso")
        rng = np.random.default_rng(0)
        x = rng.random((40, 4))
        self.set_data(x, (x[:, 0] > 0.5).astype(int))

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        note(fl_ctx, shareable)
        return super().execute(task_name, shareable, fl_ctx, abort_signal)
"""

CONSENSUS = """
from nvflare.app_opt.p2p.executors import ConsensusExecutor
from parts import log


class Consensus(ConsensusExecutor):
    def _exchange_values(self, fl_ctx, value, iteration):
        log(fl_ctx.get_identity_name(), -1)
        super()._exchange_values(fl_ctx, value, iteration)

    def _post_algorithm_run(self, *args, **kwargs):
        pass
"""

ENCRYPTION = """
from nvflare.apis.fl_component import FLComponent
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_opt.he import decomposers
from nvflare.fuel.sec.security_content_service import SecurityContentService


class Keys(FLComponent):
    '''Gives FLARE the keys, which provisioning puts into the startup kits of a real federation.'''

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        SecurityContentService.security_content_manager = None  # of the simulator's startup kit, which has no keys
        SecurityContentService.initialize(folder)
        decomposers.register()


class KeepsNothing(NPModelPersistor):
    '''FLARE's persistor for numpy cannot store encrypted weights.'''

    def save_model(self, model_learnable, fl_ctx):
        pass
"""

NET = """
import torch


class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 1)
"""
