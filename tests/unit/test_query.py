# SPDX-License-Identifier: Apache-2.0
"""Reading jobs back from their journals, and exporting them: each value once, whatever state the journals are in."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import trackhub
from tests.unit.readers_and_bad_backends import batch_of, metric, mounted
from trackhub.delivery.journal.journal import Journal
from trackhub.query import StoredRecord, read_jobs
from trackhub.query.export import export
from trackhub.records import Image, Kind, Metrics, Params, Record, Summary, Tags

A, B = "a" * 32, "b" * 32
PARAMS = {"lr": 0.1, "opt": {"name": "sgd", "betas": [0.9, 0.99]}, "note": 'x,"y"\nz', "none": None, "bad": math.nan}


def journal_at(path: Path, job: str = "job-1", side: str = "server") -> Journal:
    return Journal.open(path / "trackhub" / "trackhub.db", job=job, side=side)


def add(journal: Journal, site: str, records: Sequence[Record], stream: str = A) -> None:
    journal.append(journal.add_site(site, 1000.0), batch_of(records, stream=stream), {})


def steps(records: list[StoredRecord]) -> list[int | None]:
    return [found.record.step for found in records]


def all_of(path: Path, site: str = "site-1") -> list[StoredRecord]:
    with read_jobs(path) as jobs:
        (job,) = jobs
        return list(job.records(site))


def cli(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trackhub.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of a script, with values of most kinds."""
    with trackhub.local(["jsonl"], folder=tmp_path / "runs", job="j", name="first") as writer:
        writer.log_params(PARAMS)
        writer.log_params({"lr": 0.2})
        writer.set_tags({"team": "a"})
        writer.summarize({"best": {"acc": 0.1, "at": 1}, "verdict": "good"})
        for step in range(5):
            writer.set_round(step // 2)
            writer.log({"loss": 1 / (step + 1), "acc": step / 10}, step)
        writer.set_round(None)
        writer.log({"odd": math.nan})
        writer.log({"odd": -math.inf})
        writer.log_image("pic", [[0.0, 1.0]])
        writer.summarize({"best": {"acc": 0.4, "at": 4}, "bad": math.nan})
    return writer.folder


def expected(run: Path) -> list[tuple[str, int | None, int | None, float, float]]:
    """Return the metrics as the backend has them: key, round, step, value, time."""
    lines = [json.loads(line) for path in run.glob("jsonl/*/*.jsonl") for line in path.read_text().splitlines()]
    return [
        (key, line.get("round"), line.get("step"), float(value), line["time"])
        for line in lines
        if line["kind"] == "metrics"
        for key, value in line["values"].items()
    ]


def same(a: list[Any], b: list[Any]) -> bool:
    return repr(a) == repr(b)  # NaN included


def test_the_loaded_table_has_the_values_that_the_backend_has(run: Path) -> None:
    frame = trackhub.load(run)

    assert list(frame.columns) == ["job", "name", "site", "round", "step", "key", "value", "time"]
    assert set(map(tuple, frame[["job", "name", "site"]].to_numpy())) == {("j", "first", "local")}
    rows = trackhub.load(run, arrow=True).to_pylist()
    assert [(row["key"], row["round"], row["step"]) for row in rows] == [line[:3] for line in expected(run)]
    assert frame["step"].dropna().tolist() == [line[2] for line in expected(run) if line[2] is not None]
    assert same(frame["value"].tolist(), [line[3] for line in expected(run)])
    assert frame["time"].tolist() == [line[4] for line in expected(run)]
    assert frame.attrs["trackhub.problems"] == []


def test_final_values_are_a_table_and_a_file_of_their_own(run: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "jsonl", "parquet"):
        assert export(run, tmp_path / f"out.{suffix}").rows[tmp_path / f"out.summary.{suffix}"] == 4

    with (tmp_path / "out.summary.csv").open(newline="") as file:
        as_csv = {row["key"]: row["value"] for row in csv.DictReader(file)}
    lines = [json.loads(line) for line in (tmp_path / "out.summary.jsonl").read_text().splitlines()]
    as_parquet = {row["key"]: row["value"] for row in pq.read_table(tmp_path / "out.summary.parquet").to_pylist()}
    frame = trackhub.load(run, "summary")
    texts = {"best/acc": "0.4", "best/at": "4", "verdict": "good", "bad": "NaN"}
    assert as_csv == as_parquet == dict(zip(frame["key"], frame["value"], strict=True)) == texts
    assert {line["key"]: line["value"] for line in lines} == {
        "best/acc": 0.4, "best/at": 4, "verdict": "good", "bad": "NaN",
    }  # fmt: skip
    assert trackhub.load(run, "params")["key"].isin(texts).sum() == 1  # "bad" is a param, too


def test_the_files_of_an_export_hold_the_same_in_each_format(run: Path, tmp_path: Path) -> None:
    for suffix in ("csv", "jsonl"):
        assert export(run, tmp_path / f"out.{suffix}").rows[tmp_path / f"out.{suffix}"] == 12
    done = cli("export", run, "--to", tmp_path / "out.parquet")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "out.parquet: 12 rows" in done.stdout

    with (tmp_path / "out.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    as_csv = [(r["key"], r["round"], r["step"], float(r["value"]), float(r["time"])) for r in table]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    as_json = [(r["key"], r["round"], r["step"], float(r["value"]), r["time"]) for r in lines]
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    as_parquet = [(r["key"], r["round"], r["step"], r["value"], r["time"]) for r in rows]
    assert same(as_json, expected(run))
    assert same(as_parquet, expected(run))
    blank = [(k, "" if r is None else str(r), "" if s is None else str(s), v, t) for k, r, s, v, t in expected(run)]
    assert same(as_csv, blank)
    assert [line["value"] for line in lines[-2:]] == ["NaN", "-Infinity"]


def test_params_and_tags_are_in_files_of_their_own_and_the_last_value_holds(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out.csv")
    export(run, tmp_path / "out.jsonl")

    with (tmp_path / "out.params.csv").open(newline="") as file:
        texts = {row["key"]: row["value"] for row in csv.DictReader(file)}
    lines = [json.loads(line) for line in (tmp_path / "out.params.jsonl").read_text().splitlines()]
    assert texts == {
        "lr": "0.2", "opt/name": "sgd", "opt/betas": "[0.9,0.99]", "note": "x,\"y\"\nz", "none": "null", "bad": "NaN",
    }  # fmt: skip
    assert {line["key"]: line["value"] for line in lines} == {
        "lr": 0.2, "opt/name": "sgd", "opt/betas": [0.9, 0.99], "note": "x,\"y\"\nz", "none": None, "bad": "NaN",
    }  # fmt: skip
    assert trackhub.load(run, "tags")[["key", "value"]].to_numpy().tolist() == [["team", "a"]]
    assert trackhub.load(run, "params", arrow=True).column("value").to_pylist() == list(texts.values())


def test_no_text_of_a_site_is_a_formula_in_csv(tmp_path: Path) -> None:
    evil = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", '=HYPERLINK("http://evil","x")', "-inf", "-0.5", "- a", "\uff1d1+1"]
    with trackhub.local(["jsonl"], folder=tmp_path / "runs", job="=cmd|'/C calc'!A0") as writer:
        writer.log(dict.fromkeys(evil, -0.5), 1)
        writer.set_tags({f"tag{i}": text for i, text in enumerate(evil)})

    export(writer.folder, tmp_path / "out.csv")
    export(writer.folder, tmp_path / "out.jsonl")

    cells = []
    for table in ("out.csv", "out.tags.csv"):
        with (tmp_path / table).open(newline="") as file:
            cells += [cell for row in csv.reader(file) for cell in row]
    assert {cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\uff1d")} == {"-0.5"}
    assert {"'=1+1", "'@SUM(A1)", "'- a"} <= set(cells)
    lines = [json.loads(line) for line in (tmp_path / "out.tags.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines] == evil


def test_several_jobs_in_a_folder_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with trackhub.local(["jsonl"], folder=tmp_path, job=name, name="same") as writer:
            writer.log({"loss": 1.0}, 3)

    assert trackhub.load(tmp_path)["job"].tolist() == ["a", "b"]
    assert set(trackhub.load(tmp_path)["name"]) == {"same"}


def test_a_record_that_server_and_client_have_is_read_once(tmp_path: Path) -> None:
    """The client's journal reached further. What only one of the two has is read from that one."""
    server, client = journal_at(tmp_path / "server"), journal_at(tmp_path / "site-1", side="client")
    add(server, "site-1", [metric(i, step=i) for i in range(4)])
    add(server, "site-1", [metric(i, step=100 + i) for i in range(3)], B)
    add(server, "site-2", [metric(i, step=i) for i in range(2)])
    add(client, "site-1", [metric(i, step=i) for i in range(6)])
    add(client, "site-1", [metric(i, step=100 + i) for i in range(2)], B)
    server.close()
    client.close()

    assert sorted(steps(all_of(tmp_path)), key=int) == [0, 1, 2, 3, 4, 5, 100, 101, 102]  # type: ignore[arg-type]
    assert steps(all_of(tmp_path, "site-2")) == [0, 1]
    with read_jobs(tmp_path) as jobs:
        assert list(jobs[0].reports) == ["server", "site-1"]


def test_a_running_job_is_read_as_it_is_and_says_that_it_runs(tmp_path: Path) -> None:
    journal = journal_at(tmp_path)
    add(journal, "site-1", [metric(0, step=0)])

    with read_jobs(tmp_path) as jobs:
        add(journal, "site-1", [metric(1, step=1)])
        found = list(jobs[0].records("site-1"))
        problems = jobs.problems()
    journal.close()
    assert steps(found) == [0]
    assert "The job still runs. This is what had arrived when it was read." in problems


def damaged(path: Path, rows: int = 40) -> Path:
    """Return a journal with a page in its middle that is no page any more."""
    journal = journal_at(path)
    for row in range(rows):
        add(journal, "site-1", [metric(row * 100 + i, step=row * 100 + i) for i in range(100)])
    journal.close()
    file = path / "trackhub" / "trackhub.db"
    (root,) = sqlite3.connect(file).execute("SELECT rootpage FROM sqlite_schema WHERE name = 'batches'").fetchone()
    with file.open("r+b") as data:
        data.seek((root - 1) * 4096)
        data.write(bytes(4096))
    return file


def test_a_damaged_journal_gives_what_can_be_read_and_says_so(tmp_path: Path) -> None:
    file = damaged(tmp_path)
    before = file.read_bytes()

    with read_jobs(tmp_path) as jobs:
        found = list(jobs[0].records("site-1"))
        problems = " ".join(jobs.problems())

    assert steps(found) == list(range(4000))  # the page led to the rows, which are whole
    assert f"The journal {file} is damaged" in problems
    assert "replay" in problems
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir() if "damaged" in p.name] == []


def test_records_with_a_changed_bit_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    journal = journal_at(tmp_path)
    add(journal, "site-1", [metric(i, step=i) for i in range(10)])
    journal.close()
    file = tmp_path / "trackhub" / "trackhub.db"
    db = sqlite3.connect(file)
    (frames,) = db.execute("SELECT frames FROM batches").fetchone()
    middle = len(frames) // 2
    db.execute("UPDATE batches SET frames = ?", (frames[:middle] + bytes([frames[middle] ^ 1]) + frames[middle + 1 :],))
    db.commit()
    db.close()

    with read_jobs(file) as jobs:
        found = list(jobs[0].records("site-1"))
        problems = jobs.problems()

    assert len(found) == 9
    assert "1 records of site-1 cannot be read." in problems


def test_a_journal_of_which_nothing_is_left_is_named_and_others_are_read(run: Path, tmp_path: Path) -> None:
    bad = tmp_path / "runs" / "bad" / "trackhub.db"
    bad.parent.mkdir()
    bad.write_bytes(b"\0" * 8192)

    done = cli("export", tmp_path / "runs", "--to", tmp_path / "out.csv")
    alone = cli("export", bad, "--to", tmp_path / "none.csv")

    assert (done.returncode, str(bad) in done.stderr) == (0, True)
    assert "12 rows" in done.stdout
    assert (alone.returncode, alone.stderr.startswith("trackhub: cannot read the journal")) == (1, True), alone.stderr
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize(("command", "option", "name"), [("export", "--to", "a.csv"), ("report", "-o", "r.html")])
def test_a_read_only_disk_is_an_error_in_one_line(
    run: Path, tmp_path: Path, command: str, option: str, name: str
) -> None:
    with mounted(tmp_path / "disk", ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path / "disk")]) as disk:
        done = cli(command, run, option, disk / name)

    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert f"cannot write {disk / name}" in done.stderr


@pytest.mark.parametrize(
    ("to", "message"),
    [("out.xlsx", "ends in .csv, .jsonl, .parquet"), ("no/where.csv", "cannot write")],
)
def test_a_target_that_cannot_be_is_an_error_in_one_line(run: Path, tmp_path: Path, to: str, message: str) -> None:
    done = cli("export", run, "--to", tmp_path / to)

    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert message in done.stderr


def test_a_folder_without_a_journal_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(trackhub.ConfigError, match="download the job first"):
        trackhub.load(tmp_path)
    with pytest.raises(trackhub.ConfigError, match="'metric' is not one of metrics, params, tags"):
        trackhub.load(tmp_path, "metric")  # type: ignore[arg-type]


def test_records_of_all_kinds_are_read_with_their_files_also_from_a_copy(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.move(run, copy)

    with read_jobs(copy) as jobs:
        (job,) = jobs
        found = [r.record.payload for r in job.records("local")]
        (image,) = (payload for payload in found if isinstance(payload, Image))
        path = job.blob_path("local", image.blob)
        only = list(job.records("local", {Kind.TAGS}))

    assert {type(payload) for payload in found} == {Metrics, Params, Tags, Image, Summary}
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [r.record.payload for r in only] == [Tags({"team": "a"})]
