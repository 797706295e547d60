# SPDX-License-Identifier: Apache-2.0
"""The adapters take the calls of FLARE's own writers and of the SDKs, and log what those would."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.readers_and_bad_backends import read_spool
from trackhub import registry
from trackhub.errors import ConfigError, InvalidOptionError, RecordError
from trackhub.records import Artifact, Histogram, Image, Metrics, Params, Payload, Summary, Table, Tags, Text
from trackhub.spool.announce_spool import SPOOL_ENV, spool_env
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.spool.reading import SpoolReader
from trackhub.writer import adapters, convert_figures_and_tables

NAMES = ["SummaryWriter", "WandBWriter", "MLflowWriter"]


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spool as a FLARE client announces it to its trainer."""
    create_spool(tmp_path / "spool", SpoolInfo("site-1", "job-1", ("server",)))
    monkeypatch.setenv(SPOOL_ENV, spool_env(tmp_path / "spool", "site-1", "job-1"))
    return tmp_path / "spool"


def sdk_methods(name: str) -> Iterator[tuple[str, inspect.Signature]]:
    """Yield the methods that FLARE's writer and the SDK have, and their signatures."""
    from nvflare.client import tracking

    owners: list[Any] = [getattr(tracking, name)]
    if name == "SummaryWriter":
        from torch.utils import tensorboard

        owners.append(tensorboard.SummaryWriter)
    elif name == "WandBWriter":
        from wandb.sdk.wandb_run import Run

        owners.append(Run)
    for owner in owners:
        for method, function in inspect.getmembers(owner, inspect.isfunction):
            if method[0] != "_" or (method == "__init__" and name != "WandBWriter"):
                found = inspect.signature(function)
                yield method, found.replace(parameters=list(found.parameters.values())[1:])
    if name == "MLflowWriter":
        import mlflow

        for method, fluent in inspect.getmembers(mlflow, callable):
            if method.startswith(("log_", "set_tag", "set_exp", "set_tracking")) or method in {"start_run", "end_run"}:
                yield method, inspect.signature(fluent)


def calls_of(signature: inspect.Signature) -> Iterator[tuple[list[object], dict[str, object]]]:
    """Yield a call with every argument by position, and one with every argument by name."""
    given = [p for p in signature.parameters.values() if p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]
    by_name = {p.name: object() for p in given if p.kind is p.KEYWORD_ONLY}
    yield [object() for p in given if p.kind is not p.KEYWORD_ONLY], by_name
    yield [], {p.name: object() for p in given}


@pytest.mark.parametrize("name", NAMES)
def test_no_call_of_an_sdk_raises(spool: Path, name: str) -> None:
    """Whatever the arguments are. Each here is an object that nothing can store."""
    methods = list(sdk_methods(name))
    for method, signature in methods:
        for args, kwargs in calls_of(signature):
            if method == "__init__":
                getattr(adapters, name)(*args, **kwargs)
            else:
                with getattr(adapters, name)() as writer:
                    getattr(writer, method)(*args, **kwargs)

    assert len(methods) > 20


class HalfReadable(Mapping[str, int]):
    """A mapping with a value that cannot be read, such as a configuration of OmegaConf that lacks one."""

    def __getitem__(self, key: str) -> int:
        if key == "missing":
            raise ValueError(key)
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter(["lr", "missing"])

    def __len__(self) -> int:
        return 2


class RaisesForEveryAttribute:
    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class WithoutModule:
    __module__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("make", [lambda: None, list, dict, HalfReadable, RaisesForEveryAttribute, WithoutModule])
@pytest.mark.parametrize("strict", [False, True])
def test_an_odd_key_or_value_is_counted_or_if_strict_an_error(
    spool: Path, make: Callable[[], Any], strict: bool
) -> None:
    value = make()
    summary, mlflow, wandb = (getattr(adapters, name)(strict=strict) for name in NAMES[::2] + NAMES[1:2])
    calls: list[Callable[[], Any]] = [
        lambda: summary.add_scalar(value, value),
        lambda: summary.add_scalars(value, {"a": 1}),
        lambda: summary.add_figure(value, object()),
        lambda: mlflow.log_metric(value, value),
        lambda: mlflow.log_param(value, 1),
        lambda: mlflow.set_tag(value, 1),
        lambda: mlflow.log_image(value, value),
        lambda: wandb.log_artifact(value),
    ]
    for call in calls:
        if strict:
            with pytest.raises(RecordError):
                call()
        else:
            call()

    assert sum(drops(spool).values()) == (0 if strict else len(calls))


@pytest.mark.parametrize("make", [lambda: None, list, RaisesForEveryAttribute, WithoutModule])
def test_config_and_summary_of_wandb_count_what_is_no_mapping(spool: Path, make: Callable[[], Any]) -> None:
    value = make()
    writer = adapters.WandBWriter()

    for values in (writer.config, writer.summary):
        values.update(value)
        values.setdefaults(value)

    assert sum(drops(spool).values()) == 4


def test_config_of_wandb_takes_the_values_that_can_be_read(spool: Path) -> None:
    writer = adapters.WandBWriter(config=HalfReadable())
    writer.summary.setdefaults(HalfReadable())

    assert writer.config["lr"] == 1
    assert payloads(spool) == [(Params({"lr": 1}), None), (Summary({"lr": 1}), None)]


def drops(spool: Path) -> dict[str, int]:
    """Return how many records were dropped, by reason."""
    found: Counter[str] = Counter()
    for count in SpoolReader(spool, "server").counts().values():
        found.update(count.dropped)
    return dict(found)


@pytest.mark.parametrize(
    ("name", "method"),
    [("SummaryWriter", "add_video"), ("SummaryWriter", "add_mesh"), ("SummaryWriter", "add_of_tomorrow"),
     ("WandBWriter", "watch"), ("WandBWriter", "log_code"), ("MLflowWriter", "log_trace")],
)  # fmt: skip
def test_what_no_record_can_hold_is_counted_with_one_warning(
    spool: Path, caplog: pytest.LogCaptureFixture, name: str, method: str
) -> None:
    with getattr(adapters, name)() as writer:
        getattr(writer, method)("a", b=1)
        getattr(writer, method)()

    assert drops(spool) == {"unconvertible": 2}
    assert [record.getMessage().count(f"{name}.{method}:") for record in caplog.records] == [1]
    with pytest.raises(RecordError, match=method):
        getattr(getattr(adapters, name)(strict=True), method)()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_the_sdk_lacks_is_no_method(spool: Path, name: str) -> None:
    with getattr(adapters, name)() as writer:
        assert not hasattr(writer, "no_such_method")
        assert not hasattr(writer, "_repr_html_")


def payloads(spool: Path) -> list[tuple[Payload, int | None]]:
    """Return what was logged: first the records without files."""
    records = [record for records in read_spool(spool).values() for record in records]
    records.sort(key=lambda record: isinstance(record.payload, Image | Artifact))
    return [(record.payload, record.step) for record in records]


def test_the_calls_of_flares_wandb_example_work(spool: Path) -> None:
    writer = adapters.WandBWriter()
    writer.log({"train_loss": 0.25}, 3)
    writer.log({"a": 1, "b": np.float32(0.5).item()})
    writer.log({})
    writer.finish()

    assert payloads(spool) == [(Metrics({"train_loss": 0.25}), 3), (Metrics({"a": 1.0, "b": 0.5}), None)]


def test_the_calls_of_tensorboard_work(spool: Path, tmp_path: Path) -> None:
    with adapters.SummaryWriter() as writer:
        writer.add_scalar("loss", 0.5, 7)
        writer.add_scalar(tag="loss", scalar=0.25, global_step=8, new_style=True)
        writer.add_scalars("acc", {"train": 0.5, "val": 0.25}, 9)
        writer.add_text("note", "*hi*")
        writer.add_image("x", np.zeros((3, 4, 5), np.uint8), 1)
        writer.add_histogram("w", [0.0, 1.0], 2, bins="tensorflow")
        writer.flush()

    found = payloads(spool)
    assert found[:4] == [
        (Metrics({"loss": 0.5}), 7),
        (Metrics({"loss": 0.25}), 8),
        (Metrics({"acc/train": 0.5, "acc/val": 0.25}), 9),
        (Text("note", "*hi*"), None),
    ]
    histogram, image = found[4][0], found[5][0]
    assert isinstance(image, Image)
    assert (image.width, image.height) == (5, 4)
    assert isinstance(histogram, Histogram)
    assert (len(histogram.counts), sum(histogram.counts)) == (30, 2)


def test_tensors_are_images_with_the_axes_that_torch_takes_also_in_bfloat16(spool: Path) -> None:
    torch = pytest.importorskip("torch")
    with adapters.SummaryWriter() as writer:
        writer.add_image("narrow", torch.rand(3, 8, 4), 1)
        writer.add_image("last", torch.rand(8, 6, 3), 1)
        writer.add_image("named", torch.rand(3, 8, 6).bfloat16(), 1, dataformats="CHW")
        writer.add_images("batch", torch.rand(2, 3, 8, 4).bfloat16(), 1)
        writer.add_pr_curve("curve", torch.tensor([0, 1]), torch.tensor([0.1, 0.9]).bfloat16(), 1)

    found = [payload for payload, _ in payloads(spool)]
    sizes = {image.key: (image.width, image.height) for image in found if isinstance(image, Image)}
    assert sizes == {"narrow": (4, 8), "last": (6, 8), "named": (6, 8), "batch": (8, 8)}
    assert [table.key for table in found if isinstance(table, Table)] == ["curve"]


def test_the_calls_of_torch_work(spool: Path, tmp_path: Path) -> None:
    from matplotlib import pyplot

    pyplot.close("all")  # of other tests
    writer = adapters.SummaryWriter("runs/a", comment="c", flush_secs=10, filename_suffix=".x")
    writer.add_scalar(tag="loss", scalar_value=0.5, global_step=1, walltime=12.0)
    writer.add_scalars(main_tag="acc", tag_scalar_dict={"val": 0.25}, global_step=1)
    writer.add_hparams({"lr": 0.1, "net": "big"}, {"hparam/acc": 0.75}, run_name="x", global_step=4)
    writer.add_histogram_raw("h", 0.0, 3.0, 3, 6.0, 14.0, [1.0, 2.0, 4.0], [1, 0, 2], 5)
    writer.add_pr_curve("pr", np.array([0, 1, 1]), np.array([0.2, 0.4, 0.9]), 6, num_thresholds=3)
    writer.add_pr_curve_raw("raw", [2], [1], [0], [0], [0.5], [1.0], 7)
    writer.add_image("hwc", np.zeros((3, 7, 1), np.uint8), 8, dataformats="HWC")
    batch = np.linspace(0.0, 1.0, 9 * 3 * 2 * 5).reshape(9, 3, 2, 5)
    writer.add_images("batch", batch, 9)
    writer.add_figure("figure", figure(), 10)
    writer.add_figure("figures", [figure(), figure()], 11)
    assert writer.get_logdir() == ""
    writer.close()

    assert pyplot.get_fignums() == []

    found = payloads(spool)
    assert found[:4] == [
        (Metrics({"loss": 0.5}), 1),
        (Metrics({"acc/val": 0.25}), 1),
        (Params({"lr": 0.1, "net": "big"}), None),
        (Metrics({"hparam/acc": 0.75}), 4),
    ]
    histogram, curve, raw = (payload for payload, _ in found[4:7])
    assert histogram == Histogram("h", [0.0, 1.0, 2.0, 4.0], [1.0, 0.0, 2.0])
    assert isinstance(curve, Table)
    assert curve.columns == ["threshold", "tp", "fp", "tn", "fn", "precision", "recall"]
    assert curve.rows == [
        [0.0, 2.0, 1.0, 0.0, 0.0, pytest.approx(2 / 3), 1.0],
        [0.5, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5],
        [1.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0],
    ]
    assert raw == Table("raw", ["tp", "fp", "tn", "fn", "precision", "recall"], [[2, 1, 0, 0, 0.5, 1.0]])
    images = [payload for payload, _ in found[7:]]
    assert [(i.key, i.width, i.height) for i in images if isinstance(i, Image)] == [
        ("hwc", 7, 3), ("batch", 8 * 5, 2 * 2), ("figure", 60, 40), ("figures/0", 60, 40), ("figures/1", 60, 40)
    ]  # fmt: skip
    assert drops(spool) == {}


def test_a_batch_of_images_is_the_grid_that_torch_makes() -> None:
    from torch.utils.tensorboard._utils import convert_to_HWC

    batch = np.arange(11 * 3 * 4 * 5, dtype=np.uint8).reshape(11, 3, 4, 5)
    assert np.array_equal(convert_figures_and_tables.as_torch_grid(batch), convert_to_HWC(batch, "NCHW"))
    assert np.array_equal(
        convert_figures_and_tables.as_torch_grid(batch[:3].transpose(0, 2, 3, 1), "NHWC"),
        convert_to_HWC(batch[:3], "NCHW"),
    )


RANDOM = np.random.default_rng(7)
SCORES: dict[str, tuple[Any, Any, int, Any]] = {
    "weights": (RANDOM.integers(0, 2, 200), RANDOM.random(200), 100, RANDOM.random(200)),
    "low scores": (RANDOM.random(200) > 0.5, RANDOM.random(200) * 0.5, 127, None),
    "scores on a threshold": (RANDOM.random(200) > 0.5, np.round(RANDOM.random(200), 1), 11, None),
    "float32": (RANDOM.random(200) > 0.5, np.round(RANDOM.random(200), 2).astype(np.float32), 101, None),
    "labels that are probable": (RANDOM.random(50), RANDOM.random(50), 11, None),
    "nothing positive": (np.zeros(50, bool), RANDOM.random(50), 11, None),
}


@pytest.mark.parametrize("what", SCORES)
def test_a_pr_curve_is_the_one_that_torch_computes(what: str) -> None:
    from torch.utils.tensorboard.summary import compute_curve

    labels, predictions, count, weights = SCORES[what]
    _, rows = convert_figures_and_tables.pr_curve(labels, predictions, count, weights)
    np.testing.assert_allclose(np.array(rows).T[1:], compute_curve(labels, predictions, count, weights), atol=1e-12)


def figure() -> Any:
    """Return a figure of pyplot, which keeps it open until somebody closes it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot.figure(figsize=(6, 4), dpi=10)


def test_the_calls_of_wandb_work(spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "a.bin").write_bytes(b"weights")
    artifact = wandb.Artifact("weights", type="model")
    artifact.add_file(str(tmp_path / "a.bin"))
    writer = adapters.WandBWriter(project="p", config={"lr": 0.1}, tags=["quick"])
    writer.config.update({"depth": 3}, allow_val_change=True)
    writer.config.seed = 7
    writer.config["net"] = "big"
    writer.log(data={"loss": 0.5}, step=2, commit=False)
    writer.log_artifact(str(tmp_path / "a.bin"), name="b.bin", type="dataset", aliases=["latest"])
    writer.log_artifact(artifact)
    writer.log_model(str(tmp_path / "a.bin"), "best.bin")
    writer.define_metric("loss", summary="min")
    writer.finish(exit_code=0)

    found = payloads(spool)
    assert (dict(writer.config), writer.config.lr) == ({"lr": 0.1, "depth": 3, "seed": 7, "net": "big"}, 0.1)
    assert found[:6] == [
        (Params({"lr": 0.1}), None),
        (Tags({"quick": "true"}), None),
        (Params({"depth": 3}), None),
        (Params({"seed": 7}), None),
        (Params({"net": "big"}), None),
        (Metrics({"loss": 0.5}), 2),
    ]
    artifacts = [payload for payload, _ in found[6:] if isinstance(payload, Artifact)]
    assert [(a.key, a.artifact_type) for a in artifacts] == [
        ("b.bin", "dataset"), ("weights/a.bin", "model"), ("best.bin", "model")
    ]  # fmt: skip


def test_the_calls_of_mlflows_fluent_api_work(spool: Path, tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "folder" / "inner" / "b.txt").write_text("b")
    mlflow = adapters.MLflowWriter()
    mlflow.set_tracking_uri("http://nowhere.invalid")
    mlflow.set_experiment("e")
    with mlflow.start_run(run_name="r"):
        assert mlflow.log_param("lr", 0.1, synchronous=True) == 0.1
        mlflow.log_params(params={"depth": 3}, run_id="x")
        mlflow.log_metric("loss", 0.5, step=1, timestamp=5)
        mlflow.log_text(text="hello", artifact_file="a.txt")
        mlflow.log_dict({"b": [1, 2]}, "b.json")
        mlflow.log_table(data={"x": [1, 2], "y": ["a", "b"]}, artifact_file="t.json")
        mlflow.set_tag(key="n", value=5)
        mlflow.log_figure(drawn := figure(), "f.png")
        mlflow.log_image(np.zeros((3, 4), np.uint8), key="i", step=3)
        mlflow.log_artifacts(tmp_path / "folder", "out")
    mlflow.end_run()
    drawn.clear()

    found = payloads(spool)
    assert found[:7] == [
        (Params({"lr": 0.1}), None),
        (Params({"depth": 3}), None),
        (Metrics({"loss": 0.5}), 1),
        (Text("a.txt", "hello"), None),
        (Text("b.json", '{\n  "b": [\n    1,\n    2\n  ]\n}'), None),
        (Table("t.json", ["x", "y"], [[1, "a"], [2, "b"]]), None),
        (Tags({"n": "5"}), None),
    ]
    keys = [payload.key for payload, _ in found[7:] if isinstance(payload, Image | Artifact)]
    assert keys == ["f.png", "i", "out/a.txt", "out/inner/b.txt"]


def test_the_calls_of_mlflow_work(spool: Path, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    with adapters.MLflowWriter() as writer:
        writer.log_param("lr", 0.1)
        writer.log_params({"path": tmp_path, "object": NAMES.index, "layers": [1, 2, tmp_path]})
        writer.log_metric("loss", 0.5, step=1)
        writer.log_metrics({"a": 1.0, "b": 2.0}, 2)
        writer.log_text("hello", "notes/a.txt")
        writer.set_tag("n", 5)
        writer.set_tags({"who": "me", "none": None})
        writer.log_artifact(tmp_path / "model.bin", "models")

    found = payloads(spool)
    assert found[:7] == [
        (Params({"lr": 0.1}), None),
        (Params({"path": str(tmp_path), "object": str(NAMES.index), "layers": [1, 2, str(tmp_path)]}), None),
        (Metrics({"loss": 0.5}), 1),
        (Metrics({"a": 1.0, "b": 2.0}), 2),
        (Text("notes/a.txt", "hello"), None),
        (Tags({"n": "5"}), None),
        (Tags({"who": "me", "none": "None"}), None),
    ]
    assert isinstance(found[7][0], Artifact)
    assert found[7][0].key == "models/model.bin"


@pytest.mark.parametrize(
    "call",
    [
        lambda strict: adapters.WandBWriter(strict=strict).log({"": 1.0}),
        lambda strict: adapters.WandBWriter(strict=strict).log(None),
        lambda strict: adapters.SummaryWriter(strict=strict).add_scalar("x", "a"),
        lambda strict: adapters.SummaryWriter(strict=strict).add_scalars("x", {"y": None}),
        lambda strict: adapters.SummaryWriter(strict=strict).add_histogram("x", None),
        lambda strict: adapters.MLflowWriter(strict=strict).log_metric("x", 1.0, -1),
        lambda strict: adapters.MLflowWriter(strict=strict).log_params(5),  # type: ignore[arg-type]
        lambda strict: adapters.MLflowWriter(strict=strict).log_artifact(None, "folder"),  # type: ignore[arg-type]
    ],
    ids=["key", "mapping", "value", "scalars", "histogram", "step", "params", "path"],
)
def test_a_bad_call_is_counted_or_if_strict_an_error(spool: Path, call: Callable[[bool], Any]) -> None:
    with pytest.raises(RecordError):
        call(True)
    call(False)
    (count,) = SpoolReader(spool, "server").counts().values()
    assert count.logged == sum(count.dropped.values()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_outside_a_job_the_error_of_a_strict_one_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPOOL_ENV, raising=False)
    with pytest.raises(ConfigError, match="add_tracking"):
        getattr(adapters, name)(strict=True)


def test_nothing_of_flare_or_of_the_sdks_is_imported() -> None:
    code = "import sys, trackhub.writer.adapters; print(*{m.partition('.')[0] for m in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"nvflare", "wandb", "mlflow", "tensorboard", "torch", "numpy", "sqlite3"} & set(modules)


def test_an_option_of_flares_own_receivers_says_where_it_went() -> None:
    """Every argument of these receivers is an option here as well, or is named with its place."""
    from nvflare.app_opt.tracking.mlflow.mlflow_receiver import MLflowReceiver
    from nvflare.app_opt.tracking.tb.tb_receiver import TBAnalyticsReceiver
    from nvflare.app_opt.tracking.wandb.wandb_receiver import WandBReceiver

    receivers = {"mlflow": MLflowReceiver, "tensorboard": TBAnalyticsReceiver, "wandb": WandBReceiver}
    for backend, receiver in receivers.items():
        known = set(registry.option_marks(registry.load(backend)))
        for old in set(inspect.signature(receiver.__init__).parameters) - {"self", "events"} - known:
            with pytest.raises(InvalidOptionError, match=f"{backend}.{old}: unknown option. .*`"):
                registry.check_options(backend, {old: "x"})
