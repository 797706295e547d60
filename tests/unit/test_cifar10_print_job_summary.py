# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 job's last screen."""

from __future__ import annotations

from pathlib import Path

import pytest
from print_job_summary import REPORT, forget, print_delivery, print_fetching, print_metrics

from trackhub.delivery.report import DeliveryReport, RunReport, SiteReport, write_report
from trackhub.delivery.wire import SiteCounts
from trackhub.spi import Results


def report(*, pending: int = 0, rejected: int = 0, dropped: int = 0) -> DeliveryReport:
    """Return the report of a server with one site that logged 1,234 records, for one backend."""
    logged = 1234
    acked = logged - dropped
    drops = {"disk_full": dropped} if dropped else {}
    return DeliveryReport(
        job="j",
        side="server",
        status="finished",
        balanced=True,
        sites={
            "site-1": SiteReport(
                at_site=SiteCounts(logged=logged, dropped=drops, acked=acked),
                received=acked,
                journaled=acked,
                final=True,
            )
        },
        lanes={
            "acme": {
                "site-1": RunReport(
                    confirmed=acked - pending - rejected,
                    rejected={"too_large": rejected} if rejected else {},
                    pending=pending,
                    last_error="TransientError: no route\nto host" if pending else "",
                    results=Results(url="http://acme/run", command="acme open run"),
                )
            }
        },
    )


def keep(folder: Path, made: DeliveryReport) -> Path:
    """Leave a report where the receiver with this run folder does."""
    (folder / REPORT).parent.mkdir(parents=True)
    write_report(folder / REPORT, made)
    return folder


def test_a_complete_delivery_is_one_row_and_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complete = print_delivery({"server": keep(tmp_path, report())})

    screen = capsys.readouterr().out
    assert complete
    assert "  site-1  server    acme     1,234 of 1,234\n" in screen
    assert f"  acme: cd {tmp_path} && acme open run\n" in screen


@pytest.mark.parametrize(
    ("made", "row"),
    [
        (report(pending=34), "1,200 of 1,234  pending: 34; TransientError: no route\n"),
        (report(rejected=4), "1,230 of 1,234  too_large: 4\n"),
        (report(dropped=34), "1,200 of 1,234  disk_full: 34\n"),
    ],
)
def test_what_is_missing_is_counted_with_its_reason(
    made: DeliveryReport, row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = print_delivery({"server": keep(tmp_path, made)})

    assert not complete
    assert row in capsys.readouterr().out


def test_a_missing_report_counts_as_undelivered_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folders = {"server": keep(tmp_path / "server", report()), "site-1": tmp_path / "site-1"}

    complete = print_delivery(run_folders)

    screen = capsys.readouterr().out
    assert not complete
    assert "1,234 of 1,234" in screen
    assert "Delivery unknown: no delivery report of site-1: " in screen


def test_metrics_that_only_some_sites_have_leave_a_gap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site-1.json").write_text('{"val/accuracy": 0.5}')
    (tmp_path / "site-2.json").write_text('{"val/accuracy": 0.25, "val/loss": 2}')

    print_metrics(tmp_path)

    assert "  site-1  0.5000        -\n  site-2  0.2500        2.0000\n" in capsys.readouterr().out


def test_an_earlier_job_in_the_same_workspace_is_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folders = {"site-1": keep(tmp_path / "site-1", report())}
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "site-1.json").write_text('{"val/loss": 2}')

    forget(run_folders, tmp_path / "sites")

    print_metrics(tmp_path / "sites")
    assert not print_delivery(run_folders)
    assert "1,234" not in (screen := capsys.readouterr().out)
    assert "val/loss" not in screen


@pytest.mark.parametrize("is_poc", [True, False])
@pytest.mark.parametrize(("server", "clients"), [(True, False), (False, True), (True, True)])
def test_fetching_is_explained_for_the_side_that_has_something(
    server: bool,
    clients: bool,
    is_poc: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    programs = nvflare, trackhub = tmp_path / "nvflare", tmp_path / "trackhub"
    for program in programs:
        program.touch(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))  # of an environment that is not in PATH

    print_fetching("1234", Path("/my kits/admin"), server=server, clients=clients, is_poc=is_poc)

    lines = capsys.readouterr().out.splitlines()
    assert (f"  {nvflare} job download 1234 --startup-kit '/my kits/admin'" in lines) is server
    assert (f"  {trackhub} report 1234" in lines) is server
    assert (f"  {trackhub} report '/my kits'" in lines) is (clients and is_poc)
    assert ("  trackhub status WORKSPACE/1234" in lines) is (clients and not is_poc)
