# SPDX-License-Identifier: Apache-2.0
"""``trackhub status`` reads journals and spools, of running and of finished jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trackhub
from tests.conftest import MakePlugin
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.tables_and_rows import Progress
from trackhub.delivery.report import read_report
from trackhub.delivery.report_text import format_report
from trackhub.delivery.wire import Batch, Final, SiteCounts
from trackhub.runnable_commands import command_for, runnable
from trackhub.spool.layout import SpoolInfo, create_spool, create_spool_anywhere
from trackhub.spool.reading import SpoolReader
from trackhub.writer.writer import Writer


def status(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trackhub.cli", "status", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def document(*args: str | Path) -> dict[str, Any]:
    done = status(*args, "--json")
    assert (done.returncode in (0, 1), done.stderr) == (True, "")  # 1 if the document says that something is wrong
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A site that logged 10 records. The receiver has 6 of them. Its one lane delivered 4 and rejected 1."""
    spool = tmp_path / "site-1" / "spool"
    create_spool(spool, SpoolInfo("site-1", "job-1", ("server",)))
    with Writer(spool) as writer:
        for step in range(10):
            writer.log({"loss": 1.0}, step)
    reader = SpoolReader(spool, "server")
    batch = reader.next_batch(6, 1 << 20)
    assert batch is not None
    journal = Journal.open(tmp_path / "server" / "trackhub" / "trackhub.db", job="job-1", side="server")
    site = journal.add_site("site-1", 0.0)
    journal.add_site("site-2", 0.0)
    journal.append(site, Batch(batch.stream, batch.first_seq, batch.next_seq, batch.records, batch.frames), {})
    journal.note_counts(site, Final(SiteCounts(logged=12, dropped={"spool_full": 2}, acked=6, spooled=4)))
    progress = Progress(confirmed=4, rejected={"nonfinite": 1}, last_error="no route to host\nand more")
    journal.save_run("acme", site, 1, 1, progress)
    reader.settle(batch)
    journal.close()
    return tmp_path


def test_the_journals_and_spools_under_a_folder_are_found_and_read(job: Path) -> None:
    found = document(job)

    (journal,), (spool,) = found["journals"], found["spools"]
    assert found["version"] == 1
    assert (journal["job"], journal["side"], journal["adds_up"], journal["undelivered"]) == (
        "job-1",
        "server",
        True,
        5,
    )
    assert (journal["status"], journal["balanced"]) == ("killed", False)
    site = journal["sites"]["site-1"]
    assert (site["logged"], site["dropped"], site["received"], site["journaled"]) == (12, {"spool_full": 2}, 6, 6)
    run = journal["lanes"]["acme"]["site-1"]
    assert (run["confirmed"], run["rejected"], run["pending"]) == (4, {"nonfinite": 1}, 1)
    assert (spool["site"], spool["job"], spool["open"]) == ("site-1", "job-1", True)
    assert spool["receivers"]["server"] == {
        "streams": 1, "logged": 10, "withheld": 0, "dropped": {}, "refused": {}, "acked": 6, "spooled": 4,
        "unreadable": 0, "altered": {}, "complete": True, "withheld_by_rule": {}, "altered_by_rule": {},
    }  # fmt: skip


def test_a_journal_or_a_spool_can_be_named_itself(job: Path) -> None:
    journal = document(job / "server" / "trackhub" / "trackhub.db")
    spool = document(job / "site-1" / "spool")

    assert (len(journal["journals"]), len(journal["spools"])) == (1, 0)
    assert (len(spool["journals"]), len(spool["spools"])) == (0, 1)


def test_a_site_that_never_reported_has_unknown_counts_not_zero(job: Path) -> None:
    site = document(job)["journals"][0]["sites"]["site-2"]

    assert (site["logged"], site["spooled"], site["received"]) == (None, None, 0)


def test_the_table_shows_counts_with_their_reasons_and_the_last_error(job: Path) -> None:
    done = status(job)

    assert done.returncode == 1
    row = next(line for line in done.stdout.splitlines() if "acme" in line and "site-1" in line)
    assert row.split()[0] == "site-1"
    for part in ("12", "2 (spool_full 2)", "1 (nonfinite 1)", "no route to host"):
        assert part in row


def test_a_job_is_shown_by_its_name_beside_its_id(tmp_path: Path) -> None:
    create_spool(tmp_path / "spool", SpoolInfo("site-1", "job-1", ("server",), name="cifar10"))
    journal = Journal.open(tmp_path / "trackhub.db", job="job-1", side="server")
    journal.set_meta("job_info", '{"id": "job-1", "name": "cifar10"}')
    journal.close()

    found, shown = document(tmp_path), status(tmp_path).stdout

    assert [(part["job"], part["job_name"]) for part in (*found["journals"], *found["spools"])] == [
        ("job-1", "cifar10")
    ] * 2
    assert f"{tmp_path / 'trackhub.db'}: job cifar10 (job-1), server side" in shown
    assert f"{tmp_path / 'spool'}: spool of site site-1, job cifar10 (job-1), open" in shown


def test_a_spool_without_a_record_is_one_line(tmp_path: Path) -> None:
    create_spool(tmp_path / "spool", SpoolInfo("server", "job-1", ("server",)))

    assert status(tmp_path).stdout == f"{tmp_path / 'spool'}: spool of site server, job job-1, open, without a record\n"


def test_what_the_client_alone_confirmed_is_shown_as_a_part_of_confirmed(job: Path) -> None:
    journal = Journal.open(job / "server" / "trackhub" / "trackhub.db", job="job-1", side="server")
    journal.save_run("acme", 1, 1, 1, Progress(confirmed=4, client_confirmed=3))
    journal.close()

    run = document(job)["journals"][0]["lanes"]["acme"]["site-1"]

    assert (run["confirmed"], run["client_confirmed"]) == (4, 3)
    assert "4 (3 by the SDK alone)" in status(job).stdout


OPENER = """
    import shlex

    from trackhub.spi import Backend, BackendRun, Capabilities, ConfirmedBy, Results

    class Run(BackendRun):
        def write(self, batch):
            pass
        def finish(self, status):
            pass

    class Opener(Backend):
        spi = 1
        capabilities = Capabilities(confirmed_by=ConfirmedBy.WRITE)
        def open_run(self, info):
            return Run()
        def results(self, info):
            return Results(command="acme show " + shlex.quote(self.context.shown(self.context.workdir)))
"""


@pytest.fixture
def moved(tmp_path: Path, make_plugin: MakePlugin) -> tuple[Path, str]:
    """The folder of a finished job, which was moved after the job, and the job's name in files."""
    make_plugin("acme-opener", {"opener": "acme_opener:Opener"}, {"acme_opener": OPENER})
    with trackhub.local(["jsonl", "opener"], folder=tmp_path / "runs", job="job-1", name="cifar10") as writer:
        writer.log({"loss": 1.0}, 0)
    (tmp_path / "elsewhere").mkdir()
    return Path(shutil.move(writer.folder, tmp_path / "elsewhere" / "my job")), writer.folder.name


def openings(folder: Path, name: str) -> list[str]:
    """Return how to open the results of the job in this folder."""
    return [
        f"  jsonl: {folder / 'jsonl' / name / 'local.jsonl'}",
        f"  opener: cd '{folder}' && acme show opener",
    ]


def test_status_opens_results_where_the_job_folder_lies_now(moved: tuple[Path, str]) -> None:
    folder, name = moved

    lanes, shown = document(folder)["journals"][0]["lanes"], status(folder).stdout

    assert lanes["jsonl"]["local"]["results"]["path"] == str(folder / "jsonl" / name / "local.jsonl")
    assert Path(lanes["jsonl"]["local"]["results"]["path"]).is_file()
    assert lanes["opener"]["local"]["results"]["command"] == f"cd '{folder}' && acme show opener"
    assert shown.partition("Open the results\n")[2].splitlines()[:2] == openings(*moved)


def test_replay_and_the_report_open_results_where_the_folder_lies_now(moved: tuple[Path, str]) -> None:
    folder, _ = moved
    read = format_report(read_report(folder / "trackhub" / "delivery.json"))

    command = [sys.executable, "-m", "trackhub.cli", "replay", str(folder), "--backend", "jsonl"]
    replayed = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert replayed.returncode == 0, replayed.stderr
    for text in (read, replayed.stdout):
        assert "job cifar10 (job-1), local side, finished" in text
        assert text.partition("Open the results\n")[2].splitlines() == openings(*moved)


def test_the_report_in_the_job_folder_names_no_other_folder(moved: tuple[Path, str], tmp_path: Path) -> None:
    """So it stays true when the folder is moved."""
    folder, name = moved

    stored = json.loads((folder / "trackhub" / "delivery.json").read_text())

    assert stored["run_dir"] == ".."
    assert stored["lanes"]["jsonl"]["local"]["results"]["path"] == f"jsonl/{name}/local.jsonl"
    assert str(tmp_path) not in json.dumps(stored)


def test_reading_changes_nothing(job: Path) -> None:
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}

    status(job)

    assert {path: path.read_bytes() for path in job.rglob("*") if path.is_file()} == before


def test_a_journal_that_a_running_job_has_open_can_be_read(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "trackhub.db", job="job-1", side="server")
    try:
        journal.add_site("site-1", 0.0)

        assert list(document(tmp_path)["journals"][0]["sites"]) == ["site-1"]
    finally:
        journal.close()


def test_what_cannot_be_read_is_an_error_beside_what_can(job: Path) -> None:
    damaged = job / "other" / "trackhub.db"
    damaged.parent.mkdir()
    damaged.write_text("this is no database")

    done = status(job, "--json")

    assert done.returncode == 1
    assert "cannot read the journal" in done.stderr
    by_path = {Path(found["path"]).parent.name: found for found in json.loads(done.stdout)["journals"]}
    assert list(by_path["other"]) == ["path", "error"]
    assert by_path["trackhub"]["job"] == "job-1"


@pytest.mark.parametrize(
    ("name", "expected"), [("nothing", "there is no"), (".", "no journal (trackhub.db) and no spool")]
)
def test_a_path_without_either_is_an_error_that_says_what_was_expected(
    tmp_path: Path, name: str, expected: str
) -> None:
    done = status(tmp_path / name)

    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_one_command_shows_what_several_receivers_have_together(tmp_path: Path) -> None:
    for site in ("site-1", "site-2"):
        Journal.open(tmp_path / site / "trackhub" / "trackhub.db", job="job-1", side="client").close()

    several, one = status(tmp_path), status(tmp_path / "site-1")

    assert several.stdout.splitlines()[-1] == f"all together: {runnable('trackhub report')} {tmp_path}"
    assert "all together" not in one.stdout


def test_a_spool_that_had_to_go_to_the_temporary_folder_is_named_while_it_holds_records(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is so where a site's disk was full, or its folder belonged to another job."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    create_spool(job / "taken", SpoolInfo("site-3", "an older job", ("server",)))
    spool = create_spool_anywhere(job / "taken", SpoolInfo("site-3", "job-1", ("server",)))
    with Writer(spool) as writer:
        writer.log({"loss": 1.0}, 0)

    shown = status(job / "server")

    assert spool.parent == tmp_path / "tmp"
    assert f"{spool}: spool of site site-3, job job-1" in shown.stdout
    assert f"move it into {job / 'server'}, and deliver with `{command_for('trackhub replay', job / 'server')}`" in (
        shown.stdout
    )
    assert [found["path"] for found in document(job / "server")["spools"]] == [str(spool)]
    assert "site-3" not in status(job / "taken").stdout.replace(f"{job / 'taken'}: spool of site site-3", "")


@pytest.mark.parametrize("command", ["status", "watch"])
def test_output_that_cannot_hold_a_name_gets_it_with_escapes(tmp_path: Path, command: str) -> None:
    with trackhub.local(["jsonl"], folder=tmp_path, name="größe", quiet=True) as writer:
        writer.log({"loss": 1.0})

    done = subprocess.run(
        [sys.executable, "-m", "trackhub.cli", command, str(tmp_path)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    assert "gr\\xf6\\xdfe" in done.stdout
