# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json
import math
import struct
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image as Pillow

from trackhub.delivery.lane.fit_keys_to_backend import key_fitter
from trackhub.spi import (
    Artifact,
    Blob,
    Entry,
    Histogram,
    Image,
    Kind,
    Metrics,
    Params,
    Payload,
    Table,
    Tags,
    Text,
    WriteReport,
)

if TYPE_CHECKING:
    from backends.mlflow.tests.conftest import Rig

MakeEntry = Callable[..., Entry]
T0_MS = 1_700_000_000_000
LARGEST = sys.float_info.max


def encoded(form: str, size: tuple[int, int] = (300, 20)) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", size, (200, 30, 30)).save(buffer, form)
    return buffer.getvalue()


def test_metrics_keep_key_step_value_and_time(rig: Rig, entry: MakeEntry) -> None:
    run = rig.open()

    assert (
        run.write([entry(0, Metrics({"train/loss": 0.1, "Zürich: a b": 2.0}), 7), entry(1, Metrics({"x": 3.0}))])
        is None
    )

    assert rig.database.points(rig.database.site_run().id) == [
        ("Zürich: a b", 7, 2.0, T0_MS),
        ("train/loss", 7, 0.1, T0_MS),
        ("x", 1, 3.0, T0_MS + 125),
    ]


def test_times_are_cut_to_milliseconds(rig: Rig, entry: MakeEntry) -> None:
    times = [1_700_000_000.1239, 1_700_000_000.001, 1_700_000_000.123]
    rig.open().write([entry(n, Metrics({"x": 0.0}), time=time) for n, time in enumerate(times)])

    assert [ms - T0_MS for _, _, _, ms in rig.database.points(rig.database.site_run().id)] == [123, 1, 123]


def test_late_and_repeated_steps_are_kept(rig: Rig, entry: MakeEntry) -> None:
    steps = [10, 5, 20, 7, 7]
    rig.open().write([entry(n, Metrics({"x": float(n)}), step) for n, step in enumerate(steps)])

    points = rig.database.points(rig.database.site_run().id)
    assert sorted((value, step) for _, step, value, _ in points) == list(enumerate(steps))


def test_numbers_keep_their_value_save_infinity(rig: Rig, entry: MakeEntry) -> None:
    values = [1e308, 5e-324, -0.0, float(2**53 + 2), math.nan, math.inf, -math.inf]
    rig.open().write([entry(n, Metrics({"x": value})) for n, value in enumerate(values)])

    stored = [value for _, _, value, _ in sorted(rig.database.points(rig.database.site_run().id), key=lambda p: p[1])]
    assert stored == [1e308, 5e-324, -0.0, float(2**53 + 2), "NaN", LARGEST, -LARGEST]


def test_the_largest_step_is_kept(rig: Rig, entry: MakeEntry) -> None:
    rig.open().write([entry(0, Metrics({"x": 0.0}), 2**63 - 1)])

    assert rig.database.points(rig.database.site_run().id)[0][1] == 2**63 - 1


@pytest.mark.parametrize("value", [0.5, math.nan, math.inf, 0.0])
def test_points_that_agree_in_all_that_mlflow_compares_stay_apart(rig: Rig, entry: MakeEntry, value: float) -> None:
    batch = [entry(n, Metrics({"x": value}), 3, 1_700_000_000.0) for n in range(4)]
    run = rig.open()

    for _ in range(2):
        run.write(batch[:2])
        run.write(batch[1:])
        run.write(batch)

    points = rig.database.points(rig.database.site_run().id)
    assert sorted(ms - T0_MS for _, _, _, ms in points) == [0, 1, 2, 3]


def test_a_record_of_many_metrics_is_stored_whole(rig: Rig, entry: MakeEntry) -> None:
    metrics = {f"m{n}": float(n) for n in range(2500)}

    rig.open().write([entry(0, Metrics(metrics), 1)])

    points = rig.database.points(rig.database.site_run().id)
    assert {key: value for key, _, value, _ in points} == metrics


def test_keys_that_mlflow_takes_for_one_path_stay_apart(rig: Rig, entry: MakeEntry) -> None:
    keys = ["a/b", "a//b", "/a/b", "a/b/", "./a/b", "a/./b", "a/c/../b", "..", "../a/b"]
    fit = key_fitter(rig.backend.capabilities.key_rule)

    report = rig.open().write([entry(0, Metrics({fit(key): float(n) for n, key in enumerate(keys)}))])

    assert report is None
    points = rig.database.points(rig.database.site_run().id)
    assert sorted(value for _, _, value, _ in points) == [float(n) for n in range(len(keys))]
    assert "a/b" in {key for key, *_ in points}


def test_params_are_flat_text(rig: Rig, entry: MakeEntry) -> None:
    values = {"lr": 0.1, "opt": {"name": "sgd", "betas": [0.9, 0.99], "no,comma": None}, "empty": {}, "on": True}

    rig.open().write([entry(0, Params(values))])

    assert rig.database.params(rig.database.site_run().id) == {
        "lr": "0.1",
        "opt.name": "sgd",
        "opt.betas": "[0.9, 0.99]",
        "opt.no_x002C_comma": "None",
        "empty": "{}",
        "on": "True",
    }


def test_nested_keys_that_mlflow_takes_for_one_path_stay_apart(rig: Rig, entry: MakeEntry) -> None:
    keys = [
        "b",
        "/b",
        "b/",
        "./b",
        "..",
        ".",
        "",
        "x//y",
        "x/y",
        "x/../y",
        "B",
        "b ",
        "--b",
        "mlflow.runName",
        "k" * 300,
    ]

    report = rig.open().write([entry(0, Params({"a": {key: n for n, key in enumerate(keys)}}))])

    assert report is None
    stored = rig.database.params(rig.database.site_run().id)
    assert sorted(stored.values(), key=int) == [str(n) for n in range(len(keys))]
    assert (stored["a.b"], stored["a.x/y"], stored["a.--b"]) == ("0", "8", "12")


def test_params_that_flatten_to_one_name_stay_two(rig: Rig, entry: MakeEntry) -> None:
    run = rig.open()
    batch = [entry(0, Params({"a.b": 1})), entry(1, Params({"a": {"b": 1}})), entry(2, Params({"a.b": 1}))]

    assert run.write(batch) is None
    assert run.write(batch) is None

    stored = rig.database.params(rig.database.site_run().id)
    assert len(stored) == 2
    assert stored["a.b"] == "1"


def test_more_params_and_tags_than_one_request_takes(rig: Rig, entry: MakeEntry) -> None:
    params = {f"p{n}": "ü" * 6000 for n in range(250)}

    rig.open().write([entry(0, Params(params)), entry(1, Tags({f"t{n}": "x" for n in range(150)}))])

    assert rig.database.params(rig.database.site_run().id) == params
    assert len(rig.database.tags(rig.database.site_run().id)) > 150


def test_values_too_long_for_mlflow_are_kept_whole_as_artifacts(rig: Rig, entry: MakeEntry) -> None:
    run = rig.open()
    batch = [entry(0, Params({"net/layers": "x" * 6001})), entry(1, Tags({"log": "y" * 8001}))]

    assert run.write(batch) is None
    assert run.write([entry(2, Params({"net/layers": "x" * 6001}))]) is None

    row = rig.database.site_run()
    for shown, content in [
        (rig.database.params(row.id)["net/layers"], b"x" * 6001),
        (rig.database.tags(row.id)["log"], b"y" * 8001),
    ]:
        path = shown.rpartition("whole in artifact ")[2].rstrip(")")
        assert len(shown) < 400
        assert rig.artifacts()[path] == content


def test_the_last_value_of_a_tag_holds(rig: Rig, entry: MakeEntry) -> None:
    run = rig.open()
    batch = [entry(n, Tags({"phase": str(n), "note": ""})) for n in range(2)]

    run.write(batch)
    run.write(batch)

    tags = rig.database.tags(rig.database.site_run().id)
    assert (tags["phase"], tags["note"]) == ("1", "")


def test_a_site_cannot_pass_for_another_by_its_tags(rig: Rig, entry: MakeEntry) -> None:
    run = rig.open()
    before = rig.database.tags(rig.database.site_run().id)

    forged = [*before, *map(str.upper, before)]
    fit = key_fitter(rig.backend.capabilities.key_rules[Kind.TAGS])

    run.write([entry(0, Tags({fit(key): "forged" for key in forged}))])

    after = rig.database.tags(rig.database.site_run().id)
    assert after.items() >= before.items()
    assert not {key.lower() for key in after.keys() - before.keys()} & {key.lower() for key in before}
    assert rig.database.site_run().name == "site-1 · job-1"


def test_text_histograms_and_tables_become_artifacts_to_look_at(rig: Rig, entry: MakeEntry) -> None:
    rows: list[list[Any]] = [[1, "a"], [math.nan, None], [True, 0.5]]
    run = rig.open()

    run.write(
        [
            entry(0, Text("val/note", "# Größe"), 3),
            entry(1, Histogram("weights", [0.0, 1.0, 3.0], [4.0, 2.0]), 3),
            entry(2, Table("confusion", ["n", "what"], rows), 3),
        ]
    )

    found = rig.artifacts()
    assert found["text/val~note/step-00000003-p0.md"].decode() == "# Größe"
    histogram = json.loads(found["histograms/weights/step-00000003-p1.json"])
    assert (histogram["edges"], histogram["counts"]) == ([0.0, 1.0, 3.0], [4.0, 2.0])
    picture = ElementTree.fromstring(found["histograms/weights/step-00000003-p1.svg"])
    assert len(picture.findall(".//{*}rect/{*}title")) == 2
    path = "tables/confusion/step-00000003-p2.json"
    assert json.loads(found[path]) == {"columns": ["n", "what"], "data": [[1, "a"], ["NaN", None], [True, 0.5]]}
    listed = json.loads(rig.database.tags(rig.database.site_run().id)["mlflow.loggedArtifacts"])
    assert listed == [{"path": path, "type": "table"}]


def test_the_list_of_tables_stops_at_what_a_tag_holds(make_rig: Callable[..., Rig], entry: MakeEntry) -> None:
    batch = [entry(n, Table("t", ["a"], [[n]])) for n in range(150)]
    make_rig().open().write(batch)

    rig = make_rig()
    assert rig.open(resume_from=100).write(batch[100:]) is None

    tag = rig.database.tags(rig.database.site_run().id)["mlflow.loggedArtifacts"]
    assert 7900 < len(tag) <= 8000
    assert len(rig.artifacts()) == 150


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_images_are_where_mlflows_charts_look_for_them(rig: Rig, entry: MakeEntry, form: str) -> None:
    content = encoded(form)
    image = Image("val/grid", rig.blob("blob", content), 300, 20, "first")

    rig.open().write([entry(0, image, 12)])

    found = rig.artifacts()
    (png,) = [path for path in found if path.endswith(".png")]
    stem = png.removesuffix(".png")
    assert stem.startswith(f"images/val~grid+step+12+timestamp+{T0_MS}+")
    assert set(found) == {png, f"{stem}+compressed.webp", f"{stem}.txt"}
    assert found[f"{stem}.txt"] == b"first"
    if form == "PNG":
        assert found[png] == content
    with Pillow.open(io.BytesIO(found[png])) as stored, Pillow.open(io.BytesIO(content)) as logged:
        assert (stored.format, stored.tobytes()) == ("PNG", logged.tobytes())
    with Pillow.open(io.BytesIO(found[f"{stem}+compressed.webp"])) as thumbnail:
        assert thumbnail.size == (256, 17)
    assert rig.database.tags(rig.database.site_run().id)["mlflow.loggedImages"] == "True"


def test_the_thumbnail_of_an_image_of_16_bits_has_its_greys(rig: Rig, entry: MakeEntry) -> None:
    ramp = Pillow.frombytes("I;16", (256, 1), b"".join(struct.pack("<H", grey * 257) for grey in range(256)))
    buffer = io.BytesIO()
    ramp.save(buffer, "PNG")

    rig.open().write([entry(0, Image("x", rig.blob("blob", buffer.getvalue()), 256, 1))])

    (thumbnail,) = (content for path, content in rig.artifacts().items() if path.endswith(".webp"))
    with Pillow.open(io.BytesIO(thumbnail)) as shown:
        greys = shown.convert("L").tobytes()
    assert [greys[x] for x in (0, 64, 128, 192, 255)] == pytest.approx(
        [0, 64, 128, 192, 255], abs=6
    )  # WebP loses a little


@pytest.mark.parametrize(("form", "suffix"), [("PNG", ".png"), ("JPEG", ".jpg")])
def test_a_huge_image_is_stored_as_it_is(
    rig: Rig, entry: MakeEntry, monkeypatch: pytest.MonkeyPatch, form: str, suffix: str
) -> None:
    monkeypatch.setattr("trackhub_mlflow.media_and_table_files._MAX_DECODED_PIXELS", 100)
    content = encoded(form)

    assert rig.open().write([entry(0, Image("x", rig.blob("blob", content), 300, 20))]) is None

    ((path, stored),) = rig.artifacts().items()
    assert path.endswith(suffix)
    assert stored == content


def test_what_is_no_image_or_not_there_is_rejected_alone(rig: Rig, entry: MakeEntry) -> None:
    missing = Blob("gone", 3, "0" * 64, "image/png")
    batch: list[Payload] = [
        Metrics({"x": 1.0}),
        Image("bad", rig.blob("bad", b"no image"), 1, 1),
        Image("gone", missing, 1, 1),
        Artifact("gone.bin", missing, "gone.bin"),
        Metrics({"x": 2.0}),
    ]

    report = rig.open().write([entry(n, payload) for n, payload in enumerate(batch)])

    assert isinstance(report, WriteReport)
    assert [(r.position, r.reason) for r in report.rejected] == [
        (1, "invalid_image"),
        (2, "blob_missing"),
        (3, "blob_missing"),
    ]
    assert len(rig.database.points(rig.database.site_run().id)) == 2


def test_artifacts_lie_under_their_keys(rig: Rig, entry: MakeEntry) -> None:
    run = rig.open()

    run.write(
        [
            entry(0, Artifact("config.yaml", rig.blob("a", b"0"), "config.yaml"), 0),
            entry(1, Artifact("model/best.pt", rig.blob("b", b"1"), "best.pt"), 0),
            entry(2, Artifact("model/best.pt", rig.blob("c", b"2"), "best.pt"), 4),
        ]
    )

    assert rig.artifacts() == {"config.yaml": b"0", "model/best.pt": b"1", "model/best.step-4.pt": b"2"}


def test_no_artifact_takes_anothers_place(make_rig: Callable[..., Rig], entry: MakeEntry) -> None:
    """Keys may be equal or differ in case alone, or need a folder where a file is; a restart changes nothing."""
    keys = ["m.pt", "m.pt", "M.pt", "m.pt/part", "sub/x", "sub", "m.pt", "Sub/y"]
    contents = [b"a", b"b", b"c", b"d", b"e", b"f", b"a", b"g"]

    def batch(rig: Rig) -> list[Entry]:
        blobs = [rig.blob(f"b{n}", content) for n, content in enumerate(contents)]
        return [entry(n, Artifact(key, blob, "x"), 0) for n, (key, blob) in enumerate(zip(keys, blobs, strict=True))]

    first = make_rig()
    first.open().write(batch(first))
    stored = first.artifacts()
    for resume_from in (0, 1, 4):
        rig = make_rig()
        rig.open(resume_from=resume_from).write(batch(rig)[resume_from:])

    assert stored == {
        "m.pt": b"a",
        "m.p1.pt": b"b",
        "M.p2.pt": b"c",
        "m.pt~part.p3": b"d",
        "sub/x": b"e",
        "sub.p5": b"f",
        "Sub/y": b"g",
    }
    assert first.artifacts() == stored


def test_redelivery_after_a_crash_changes_nothing(make_rig: Callable[..., Rig], entry: MakeEntry) -> None:
    def batch(rig: Rig) -> list[Entry]:
        payloads: list[Payload] = [
            Metrics({"x": 1.0, "nan": math.nan, "inf": math.inf}),
            Params({"lr": 0.1, "nested": {"a": [1]}}),
            Tags({"phase": "one"}),
            Tags({"phase": "two"}),
            Text("note", "hello"),
            Image("grid", rig.blob("image", encoded("JPEG")), 300, 20, "caption"),
            Histogram("h", [0.0, 1.0], [1.0]),
            Table("t", ["a"], [[1]]),
            Artifact("a.bin", rig.blob("artifact", b"content"), "a.bin"),
        ]
        return [entry(n, payload) for n, payload in enumerate(payloads)]

    def state(rig: Rig) -> object:
        run_id = rig.database.site_run().id
        return (
            rig.database.points(run_id),
            rig.database.params(run_id),
            rig.database.tags(run_id),
            rig.artifacts(),
            [(run.id, run.name) for run in rig.database.runs()],
        )

    first = make_rig()
    first.open().write(batch(first))
    before = state(first)
    for resume_from in (0, 4):
        rig = make_rig()
        assert rig.open(resume_from=resume_from).write(batch(rig)[resume_from:]) is None

    assert state(first) == before
