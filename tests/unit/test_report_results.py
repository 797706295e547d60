# SPDX-License-Identifier: Apache-2.0
"""The end of a script that ran a job: what each backend stored, and how to look at it."""

from __future__ import annotations

from pathlib import Path

from trackhub.delivery import DeliveryReport, RunReport, SiteCounts, SiteReport, format_results
from trackhub.delivery.report import resolve_results
from trackhub.delivery.report_text import format_report
from trackhub.runnable_commands import runnable
from trackhub.spi import Results


def report(lanes: dict[str, dict[str, RunReport]], sites: dict[str, SiteReport] | None = None) -> DeliveryReport:
    """Return the report of a receiver whose counts add up."""
    return DeliveryReport(job="j", side="server", status="finished", balanced=True, sites=sites or {}, lanes=lanes)


def logged(n: int) -> SiteReport:
    """Return the counts of a site that has sent its final message."""
    return SiteReport(at_site=SiteCounts(logged=n, acked=n), received=n, journaled=n, final=True)


def test_each_site_and_backend_of_each_receiver_has_a_row() -> None:
    reports = {
        "server": report({"acme": {"site-1": RunReport(confirmed=3), "site-2": RunReport(confirmed=4)}}),
        "site-1": report({"jsonl": {"site-1": RunReport(confirmed=3)}}, {"site-1": logged(3)}),
    }

    lines = format_results(reports).splitlines()

    assert [line.split() for line in lines[3:]] == [
        ["site-1", "server", "acme", "3", "of", "?"],
        ["site-2", "server", "acme", "4", "of", "?"],
        ["site-1", "site-1", "jsonl", "3", "of", "3"],
    ]


def test_a_command_that_opens_several_runs_is_shown_once_and_can_be_typed_anywhere(tmp_path: Path) -> None:
    run = RunReport(results=Results(path="acme", command="acme open ."))

    found = resolve_results(report({"acme": {"site-1": run, "site-2": run}}), tmp_path / "trackhub")
    screen = format_results({"server": found})

    assert screen.endswith(f"\n\nOpen the results\n  acme: cd {tmp_path} && acme open .")


def test_without_a_command_the_page_or_else_the_absolute_path_is_shown(tmp_path: Path) -> None:
    runs = {
        "site-1": RunReport(results=Results(url="http://acme/1", path="acme/1")),
        "site-2": RunReport(results=Results(path="acme/2")),
        "site-3": RunReport(results=Results()),
    }

    screen = format_results({"server": resolve_results(report({"acme": runs}), tmp_path / "trackhub")})

    assert screen.endswith(f"\n  acme (site-1): http://acme/1\n  acme (site-2): {tmp_path / 'acme' / '2'}")


def test_what_several_places_count_for_the_same_reason_is_not_merged() -> None:
    at_site = SiteCounts(logged=10, dropped={"too_large": 1}, refused={"too_large": 2}, acked=7)
    run = RunReport(confirmed=4, rejected={"too_large": 3})

    screen = format_results({"server": report({"acme": {"site-1": run}}, {"site-1": SiteReport(at_site=at_site)})})

    assert "4 of 10    too_large: 3; too_large: 1; too_large: 2" in screen


def test_nothing_tracked_is_an_empty_text() -> None:
    assert format_results({}) == ""


def test_a_report_is_complete_when_nothing_is_pending_lost_or_unbalanced() -> None:
    complete = report({"acme": {"site-1": RunReport(confirmed=3)}}, {"site-1": logged(3)})

    assert complete.is_complete()
    assert not report({"acme": {"site-1": RunReport(confirmed=2, pending=1)}}, {"site-1": logged(3)}).is_complete()
    assert not report({"acme": {"site-1": RunReport(rejected={"too_large": 1})}}).is_complete()
    complete.balanced = False
    assert not complete.is_complete()


def test_a_command_that_another_one_repeats_with_a_flag_more_is_left_out(tmp_path: Path) -> None:
    runs = {
        "site-1": RunReport(results=Results(command="acme open .")),
        "site-2": RunReport(results=Results(command="acme --all open .")),
    }

    screen = format_results({"server": resolve_results(report({"acme": runs}), tmp_path / "trackhub")})

    assert screen.endswith(f"\n\nOpen the results\n  acme: cd {tmp_path} && acme --all open .")


def test_what_several_receivers_have_opens_together_by_one_command(tmp_path: Path) -> None:
    run = RunReport(results=Results(command="acme open ."))
    reports = {
        site: resolve_results(report({"acme": {site: run}}), tmp_path / "my job" / site / "trackhub")
        for site in ("site-1", "site-2")
    }

    lines = format_results(reports).splitlines()

    assert lines[-1] == f"  all together: {runnable('trackhub report')} '{tmp_path}/my job'"


def test_each_of_several_commands_is_a_line_and_what_opens_all_runs_is_there_once(tmp_path: Path) -> None:
    runs = {
        site: RunReport(results=Results(command=f"acme show all\nacme upload {site}")) for site in ("site-1", "site-2")
    }

    screen = format_results({"server": resolve_results(report({"acme": runs}), tmp_path / "trackhub")})

    assert screen.partition("Open the results\n")[2].splitlines() == [
        f"  acme: cd {tmp_path} && acme show all",
        f"  acme (site-1): cd {tmp_path} && acme upload site-1",
        f"  acme (site-2): cd {tmp_path} && acme upload site-2",
    ]


def test_a_page_of_one_of_several_runs_is_named_by_its_site_and_a_common_one_is_not(tmp_path: Path) -> None:
    """An MLflow server gives each run a page whose address says nothing to a person."""
    runs = {
        site: RunReport(results=Results(url=url))
        for site, url in (("federation", "http://acme/a1"), ("site-1", "http://acme/b2"))
    }
    common = {site: RunReport(results=Results(url="http://other/all")) for site in ("site-1", "site-2")}
    alone = {"site-1": RunReport(results=Results(url="http://one/1", command="one show ."))}
    found = report({"acme": runs, "other": common, "one": alone})

    shown = format_results({"server": found}).partition("Open the results\n")[2].splitlines()

    assert format_report(found).splitlines()[-5:] == shown
    assert shown == [
        "  acme (federation): http://acme/a1",
        "  acme (site-1): http://acme/b2",
        "  one: one show .",
        "  one: http://one/1",
        "  other: http://other/all",
    ]
