# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
import math
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trackhub.builtin.jsonl import JsonlBackend, JsonlOptions, JsonlRun
from trackhub.spi import (
    Artifact,
    BackendContext,
    Blob,
    ConfigError,
    Entry,
    Histogram,
    Image,
    JobInfo,
    Metrics,
    Params,
    Payload,
    PermanentError,
    RunInfo,
    RunStatus,
    Side,
    Summary,
    Table,
    Tags,
    Text,
    TransientError,
)


class Rig:
    def __init__(self, root: Path, side: Side = Side.SERVER, path: str | None = None) -> None:
        self.workdir = root / "jsonl"
        self.blobs = root / "blobs"
        self.side = side
        self.workdir.mkdir(parents=True)
        self.blobs.mkdir()
        self.backend = JsonlBackend(JsonlOptions(path), BackendContext(self.workdir, JobInfo("job-1"), side))

    def info(self, site: str = "site-1", job: str = "job-1") -> RunInfo:
        return RunInfo(JobInfo(job), site, self.side, created=1000.0, resume_from=0, blob_dir=self.blobs)

    def open(self, site: str = "site-1", job: str = "job-1") -> JsonlRun:
        return self.backend.open_run(self.info(site, job))

    def path(self, site: str = "site-1", job: str = "job-1") -> Path:
        return self.workdir / job / f"{site}.jsonl"

    def blob(self, name: str, content: bytes, media_type: str) -> Blob:
        (self.blobs / name).write_bytes(content)
        return Blob(name, len(content), hashlib.sha256(content).hexdigest(), media_type)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "run")


def entry(position: int, payload: Payload, step: int | None = None, round: int | None = None) -> Entry:
    return Entry(position, 1764000000.125 + position, step, round, payload, "stream", position)


def lines(path: Path) -> list[dict[str, Any]]:
    """Read the file with a parser that refuses what is not JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The kernel then does what it does on a full disk: it writes what fits, and fails when nothing does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_person_reads_of_the_job_lies_beside_its_runs(rig: Rig) -> None:
    job = JobInfo("job-1", "lr-0.1", "why: *a try*", ("a", "b"))
    for site in ("site-1", "site-2"):
        rig.backend.open_run(RunInfo(job, site, rig.side, 1000.0, 0, rig.blobs)).finish(RunStatus.FINISHED)

    (file,) = rig.workdir.rglob("job.json")
    assert file.parent.name == job.unique_name
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "id": "job-1",
        "name": "lr-0.1",
        "notes": "why: *a try*",
        "tags": ["a", "b"],
    }
    assert not list(file.parent.glob("job.json.*"))


def test_a_line_holds_all_of_a_record(rig: Rig) -> None:
    rig.open().write([entry(0, Metrics({"loss": 0.1, "Güte/漢字": -1e308}), step=2**63 - 1, round=3)])

    assert lines(rig.path()) == [
        {
            "position": 0,
            "time": 1764000000.125,
            "step": 2**63 - 1,
            "round": 3,
            "stream": "stream",
            "seq": 0,
            "kind": "metrics",
            "values": {"loss": 0.1, "Güte/漢字": -1e308},
        }
    ]
    assert "漢字" in rig.path().read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("payload", "fields"),
    [
        (
            Params({"lr": 0.1, "n": None, "l": [True, {"a": 1}]}),
            {"values": {"lr": 0.1, "n": None, "l": [True, {"a": 1}]}},
        ),
        (Summary({"best": 0.5, "$a": math.nan}), {"values": {"best": 0.5, "$$a": {"$float": "NaN"}}}),
        (Tags({"a": "b"}), {"values": {"a": "b"}}),
        (Text("note", "two\nlines \u2028 ü"), {"key": "note", "text": "two\nlines \u2028 ü"}),
        (Histogram("h", [0.0, 0.5, 1.0], [3.0, 0.0]), {"key": "h", "edges": [0.0, 0.5, 1.0], "counts": [3.0, 0.0]}),
        (Table("t", ["a"], [[1], [None]]), {"key": "t", "columns": ["a"], "rows": [[1], [None]]}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_is_stored_with_its_fields(rig: Rig, payload: Payload, fields: dict[str, Any]) -> None:
    rig.open().write([entry(0, payload)])

    (line,) = lines(rig.path())
    assert line["kind"] == type(payload).__name__.lower()
    assert {name: line[name] for name in fields} == fields
    assert (line["step"], line["round"]) == (None, None)


def test_images_and_artifacts_are_copied_beside(rig: Rig) -> None:
    image, model = b"\x89PNG image", bytes(1000)
    batch = [
        entry(0, Image("samples", rig.blob("s-0", image, "image/png"), 4, 3, "cat")),
        entry(1, Artifact("models/best", rig.blob("s-1", model, "application/octet-stream"), "../best.pt", "model")),
    ]

    rig.open().write(batch)

    picture, artifact = lines(rig.path())
    assert (picture["key"], picture["width"], picture["height"], picture["caption"]) == ("samples", 4, 3, "cat")
    assert (picture["file"], picture["size"]) == ("site-1.files/0.png", len(image))
    assert (rig.path().parent / picture["file"]).read_bytes() == image
    assert (artifact["file"], artifact["filename"], artifact["artifact_type"]) == (
        "site-1.files/1.pt",
        "../best.pt",
        "model",
    )
    assert (rig.path().parent / artifact["file"]).read_bytes() == model
    assert artifact["sha256"] == hashlib.sha256(model).hexdigest()


def test_a_missing_blob_is_permanent(rig: Rig) -> None:
    blob = Blob("gone", 1, "", "image/png")

    with pytest.raises(PermanentError, match="'samples' is missing"):
        rig.open().write([entry(0, Image("samples", blob, 1, 1))])

    assert not rig.path().exists()


def test_numbers_that_json_lacks_are_strings_among_numbers(rig: Rig) -> None:
    rig.open().write([entry(0, Metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "$d": 1.0}))])

    assert lines(rig.path())[0]["values"] == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "$d": 1.0}


def test_numbers_that_json_lacks_are_never_taken_for_a_users_string(rig: Rig) -> None:
    params = {"nan": math.nan, "text": "NaN", "nested": {"$float": "NaN", "inf": [-math.inf]}}

    rig.open().write([entry(0, Params(params)), entry(1, Table("t", ["c"], [[math.nan], ["NaN"]]))])

    stored, table = lines(rig.path())
    assert stored["values"] == {
        "nan": {"$float": "NaN"},
        "text": "NaN",
        "nested": {"$$float": "NaN", "inf": [{"$float": "-Infinity"}]},
    }
    assert table["rows"] == [[{"$float": "NaN"}], ["NaN"]]


def test_a_reopened_run_goes_on_after_its_last_record(rig: Rig) -> None:
    run = rig.open()
    assert run.next_position() == 0
    run.write([entry(0, Metrics({"x": 0.0})), entry(7, Metrics({"x": 7.0}))])

    again = rig.open()
    assert again.next_position() == 8
    again.write([entry(8, Metrics({"x": 8.0}))])

    assert [line["position"] for line in lines(rig.path())] == [0, 7, 8]


def test_the_last_line_says_how_the_run_ended_and_does_not_hinder_going_on(rig: Rig) -> None:
    run = rig.open()
    run.write([entry(0, Metrics({"x": 0.0}))])
    run.finish(RunStatus.ABORTED)

    again = rig.open()
    assert again.next_position() == 1
    again.write([entry(1, Metrics({"x": 1.0}))])
    again.finish(RunStatus.FINISHED)

    assert [(line["position"], line["kind"], line.get("status")) for line in lines(rig.path())] == [
        (0, "metrics", None),
        (0, "end", "aborted"),
        (1, "metrics", None),
        (1, "end", "finished"),
    ]


def test_a_run_without_records_can_be_finished_and_reopened(rig: Rig) -> None:
    rig.open().finish(RunStatus.FAILED)

    assert rig.open().next_position() == 0


def test_wherever_a_crash_cut_the_file_every_record_ends_up_in_it_once(rig: Rig) -> None:
    batch = [entry(p, Text("note", "ü" * (p % 7))) for p in range(30)]
    rig.open().write(batch)
    whole = rig.path().read_bytes()
    cuts = {0, 1, len(whole) - 1, len(whole), *random.Random(20).sample(range(len(whole)), 50)}

    for cut in cuts:
        rig.path().write_bytes(whole[:cut])
        run = rig.open()
        assert run.next_position() == whole[:cut].count(b"\n")
        if rest := batch[run.next_position() :]:
            run.write(rest)
        assert rig.path().read_bytes() == whole, f"cut at {cut}"


def test_after_a_full_disk_the_same_batch_can_be_written_again(rig: Rig) -> None:
    run = rig.open()
    run.write([entry(0, Metrics({"x": 0.0}))])
    size = rig.path().stat().st_size
    batch = [entry(p, Metrics({"x": float(p)})) for p in range(1, 10)]

    for limit in (size + 2 * size + 20, size):
        with files_no_larger_than(limit), pytest.raises(TransientError, match="cannot write to"):
            run.write(batch)
    run.write(batch)

    assert [line["position"] for line in lines(rig.path())] == list(range(10))


def test_a_file_that_holds_something_else_is_not_touched(rig: Rig) -> None:
    rig.path().parent.mkdir()
    rig.path().write_text("a diary\n")

    with pytest.raises(PermanentError, match="not a record"):
        rig.open()

    assert rig.path().read_text() == "a diary\n"


def test_each_run_has_a_file_of_its_own(rig: Rig) -> None:
    for value, (site, job) in enumerate([("site-1", "job-1"), ("site-2", "job-1"), ("site-1", "job-2")]):
        rig.open(site, job).write([entry(0, Metrics({"x": float(value)}))])

    assert lines(rig.path("site-2"))[0]["values"] == {"x": 1.0}
    assert lines(rig.path("site-1", "job-2"))[0]["values"] == {"x": 2.0}
    assert sorted(path.name for path in rig.workdir.rglob("*.jsonl")) == [
        "site-1.jsonl",
        "site-1.jsonl",
        "site-2.jsonl",
    ]


@pytest.mark.parametrize("site", ["../x", "..", "/etc", "a/b", "a%2Fb", ".", "", "s" * 400, "Zürich"])
def test_no_site_name_leads_out_of_the_jobs_folder(rig: Rig, site: str) -> None:
    rig.open(site).write([entry(0, Metrics({"x": 0.0}))])
    rig.open("a_b").write([entry(0, Metrics({"x": 0.0}))])

    found = list(rig.workdir.parent.parent.rglob("*.jsonl"))
    assert len(found) == 2
    assert {path.parent for path in found} == {rig.workdir / "job-1"}


def test_server_and_client_with_one_folder_do_not_meet(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    for name, side in (("server", Side.SERVER), ("client", Side.CLIENT)):
        Rig(tmp_path / name, side, str(shared)).open().write([entry(0, Metrics({"x": 0.0}))])

    found = {str(path.relative_to(shared)) for path in shared.rglob("*.jsonl")}
    assert found == {"job-1/site-1.jsonl", "job-1@client/site-1.jsonl"}


def test_a_relative_path_lies_in_the_run_folder(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "run", Side.CLIENT, "records")

    rig.open().write([entry(0, Metrics({"x": 0.0}))])

    path = tmp_path / "run" / "records" / "job-1" / "site-1.jsonl"
    assert len(lines(path)) == 1
    results = rig.backend.results(rig.info())
    assert results.path == "records/job-1/site-1.jsonl"


def test_a_folder_that_cannot_be_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rig = Rig(tmp_path / "run", path=str(tmp_path / "file" / "records"))

    with pytest.raises(ConfigError, match="`path`"):
        rig.backend.preflight()
    with pytest.raises(TransientError, match="cannot open"):
        rig.open()


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="folder"):
        msgspec.convert({"folder": "x"}, JsonlOptions)


def test_a_payload_of_a_class_that_it_does_not_know_can_never_be_stored(rig: Rig) -> None:
    class Video(msgspec.Struct):
        key: str

    run = rig.open()
    with pytest.raises(PermanentError, match="does not know payloads of the type Video"):
        run.write([entry(0, Metrics({"loss": 0.5})), entry(1, Video("clip"))])  # type: ignore[arg-type]

    assert not rig.path().exists()
    run.write([entry(0, Metrics({"loss": 0.5}))])
    assert [line["position"] for line in lines(rig.path())] == [0]
