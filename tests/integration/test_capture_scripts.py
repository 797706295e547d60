# SPDX-License-Identifier: Apache-2.0
"""Scripts with an unusual use of their loggers: each captured call is recorded once, and the script goes on as ever."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.integration.harness import read_tensorboard
from tests.integration.test_capture import ALL, _dropped, _of, _python, _records
from trackhub.records import Metrics, Params
from trackhub.spool.layout import SpoolInfo, create_spool

pytestmark = pytest.mark.long


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    create_spool(folder, SpoolInfo("site-1", "job", ("server",)))
    return folder


def _keys(spool: Path) -> Counter[str]:
    return Counter(key for payload, _ in _of(_records(spool), Metrics) for key in payload.values)


def test_two_writers_in_threads_and_a_last_call_when_the_process_ends(spool: Path) -> None:
    script = """
    import atexit, sys, threading
    sys.modules["nvflare"] = None  # the script does not use it, and it may not be installed
    from torch.utils.tensorboard import SummaryWriter

    first, second = SummaryWriter("first"), SummaryWriter("second")
    atexit.register(lambda: (first.add_scalar("last", 1.0, 1), first.close()))

    def log(writer, key):
        for i in range(500):
            writer.add_scalar(key, i / 7, i)

    threads = [threading.Thread(target=log, args=pair) for pair in ((first, "a"), (second, "b"))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    second.close()
    second.add_scalar("after", 1.0, 1)
    """

    _python(script, spool, ALL)

    assert _keys(spool) == {"a": 500, "b": 500, "last": 1, "after": 1}
    assert Counter(point.key for point in read_tensorboard(spool.parent / "work" / "first")) == {"a": 500, "last": 1}


def test_a_pool_of_forked_processes_logs_with_the_writer_of_their_parent(spool: Path) -> None:
    script = """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter("own")

    def work(n):
        writer.add_scalar("pool", float(n), n)

    writer.add_scalar("parent", 1.0, 1)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        list(pool.map(work, range(10)))
    writer.add_scalar("parent", 2.0, 2)
    """

    _python(script, spool, ALL)

    assert _keys(spool) == {"pool": 10, "parent": 2}


def test_what_mlflow_logs_by_itself_is_recorded_once(spool: Path) -> None:
    """Its autologging logs from threads of its own."""
    script = """
    import mlflow, numpy
    from sklearn.linear_model import LogisticRegression

    mlflow.set_tracking_uri("sqlite:///own.db")
    mlflow.sklearn.autolog(log_models=False, log_datasets=False)
    x = numpy.random.default_rng(0).random((50, 2))
    with mlflow.start_run() as run:
        LogisticRegression(C=0.5).fit(x, x[:, 0] > 0.5)
    print(*sorted(mlflow.MlflowClient().get_run(run.info.run_id).data.metrics))
    """

    done = _python(script, spool, ALL)

    records = _records(spool)
    keys = Counter(key for payload, _ in _of(records, Metrics) for key in payload.values)
    assert keys == Counter(done.stdout.split())
    assert [payload.values["C"] for payload, _ in _of(records, Params)] == ["0.5"]
    assert _dropped(spool) == {}
