# SPDX-License-Identifier: Apache-2.0
"""The delivery report as text, and what becomes of its results when it is read where the job's folder lies now."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from trackhub.delivery.report import DeliveryReport, RunReport, SiteReport, read_report, write_report
from trackhub.delivery.report_text import format_report, format_results, leave_report
from trackhub.delivery.wire import SiteCounts
from trackhub.runnable_commands import command_for
from trackhub.spi import Results


@pytest.fixture
def report() -> DeliveryReport:
    """One site that logged 10 records, in one backend, which confirmed 4 of them by the client's word alone."""
    counts = SiteCounts(logged=10, acked=10)
    results = Results(url="https://acme/run", path="acme/run", command="acme show acme")
    return DeliveryReport(
        job="sim-1", job_name="cifar10", side="server", status="finished", balanced=True,
        sites={"site-1": SiteReport(at_site=counts, received=10, journaled=10, final=True)},
        lanes={"acme": {"site-1": RunReport(confirmed=10, client_confirmed=4, results=results)}},
    )  # fmt: skip


def test_the_text_names_the_job_and_what_the_client_alone_confirmed(report: DeliveryReport) -> None:
    text = format_report(report)

    assert text.startswith("trackhub delivery report: job cifar10 (sim-1), server side, finished\n")
    assert "10 (4 by the SDK alone)" in text
    assert text.endswith("Open the results\n  acme: acme show acme\n  acme: https://acme/run")
    assert "by the SDK alone: 4" in format_results({"server": report})


def test_every_count_of_a_thousand_has_a_comma() -> None:
    site = SiteReport(at_site=SiteCounts(logged=9001, acked=9001), received=9001, journaled=9001, final=True)
    run = RunReport(confirmed=5000, client_confirmed=1000, pending=2000, rejected={"too_large": 2001})

    text = format_report(
        DeliveryReport(
            job="sim-1",
            side="server",
            status="finished",
            balanced=True,
            sites={"site-1": site},
            lanes={"acme": {"site-1": run}},
        )
    )

    (row,) = (line for line in text.splitlines() if line.startswith("site-1"))
    assert row.split()[2:10] == ["9,001", "9,001", "5,000", "(1,000", "by", "the", "SDK", "alone)"]
    assert row.split()[10:12] == ["2,001", "2,000"]


def test_a_job_without_a_name_is_called_by_its_id(report: DeliveryReport) -> None:
    for name in ("", "sim-1"):
        text = format_report(msgspec.structs.replace(report, job_name=name))

        assert text.startswith("trackhub delivery report: job sim-1, server side")


def test_a_command_that_opens_several_runs_is_shown_once(report: DeliveryReport) -> None:
    (run,) = report.lanes["acme"].values()
    of_both = msgspec.structs.replace(report, lanes={"acme": {"site-1": run, "site-2": run}})

    assert format_report(of_both).count("acme show acme") == 1


@pytest.mark.parametrize("run_dir", ["..", "../.."])
def test_results_are_those_of_the_run_folder_beside_the_report(
    report: DeliveryReport, tmp_path: Path, run_dir: str
) -> None:
    folder = tmp_path / "a job" / "trackhub" / "site-1"
    folder.mkdir(parents=True)
    run_folder = (folder / run_dir).resolve()
    write_report(folder / "delivery.json", msgspec.structs.replace(report, run_dir=run_dir))

    read = read_report(folder / "delivery.json")

    assert read.run_dir == str(run_folder)
    assert read.lanes["acme"]["site-1"].results == Results(
        url="https://acme/run", path=str(run_folder / "acme" / "run"), command=f"cd '{run_folder}' && acme show acme"
    )


def test_results_of_a_run_folder_elsewhere_stay_there(report: DeliveryReport, tmp_path: Path) -> None:
    """So it is with a receiver whose own files are not in the run folder."""
    write_report(tmp_path / "delivery.json", msgspec.structs.replace(report, run_dir="/jobs/1"))

    results = read_report(tmp_path / "delivery.json").lanes["acme"]["site-1"].results

    assert results is not None
    assert (results.path, results.command) == ("/jobs/1/acme/run", "cd /jobs/1 && acme show acme")


@pytest.mark.parametrize(("pending", "moves_to"), [(3, ""), (0, ""), (3, "It moves into the job store.")])
def test_the_report_in_the_log_names_the_command_that_delivers_what_is_pending(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pending: int, moves_to: str
) -> None:
    """A path that the job's folder leaves would be of no use."""
    caplog.set_level(logging.INFO, "trackhub")
    run = RunReport(confirmed=1, pending=pending, state="unfinished" if pending else "finished", last_error="away")
    lanes = {"mlflow": {"site-1": run}}
    report = DeliveryReport(job="j", side="server", status="finished", balanced=True, sites={}, lanes=lanes)

    leave_report(tmp_path, report, moves_to)

    assert (f"Deliver what is pending with `{command_for('trackhub replay', tmp_path)}`" in caplog.text) is (
        bool(pending) and not moves_to
    )
    assert (run.trouble() == "away") is bool(pending)  # what a later try delivered is no trouble
