# SPDX-License-Identifier: Apache-2.0
"""The addresses that are printed for MLflow, in a real browser: the first screen has the federation's curve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.browser import CHROMIUM, FLAGS, needs_chromium
from trackhub.delivery.federation.federation_run import FederationOptions
from trackhub.delivery.receiver import Receiver
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.spi import Results

if TYPE_CHECKING:
    from playwright.sync_api import Page

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed; it is in the extra dev"
)

WAIT_S = 120

pytestmark = [pytest.mark.long, needs_chromium]


@pytest.fixture
def page() -> Iterator[Page]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(viewport={"width": 1400, "height": 900})
        browser.close()


def deliver(folder: Path, options: dict[str, Any]) -> Results:
    """Deliver a federation run of four rounds, and return how to look at it."""
    receiver = Receiver(
        folder, job=JobInfo(folder.name), side=Side.SERVER, backends={"mlflow": options}, federation=FederationOptions()
    )
    receiver.start()
    assert receiver.federation is not None
    for number in range(4):
        receiver.federation.log({"aggregated/accuracy": 0.1 + 0.2 * number, "fl/seconds/round": 3.0}, number)
    results = receiver.finish(RunStatus.FINISHED).lanes["mlflow"]["federation"].results
    assert results is not None
    return results


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Results, str]]:
    """A job in a file, with MLflow started by the printed command, and the address of this MLflow."""
    results = deliver(tmp_path / "job-in-a-file", {})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(
            f"{results.command} --port {port}", shell=True, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until_served(f"http://127.0.0.1:{port}/health", process)
        yield results, f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_served(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        else:
            return


def check_first_screen(page: Page, url: str) -> None:
    """Check that a browser which was never here shows the curve, without a click and without scrolling."""
    page.goto(url)
    page.get_by_text("aggregated/accuracy").first.wait_for(timeout=WAIT_S * 1000)
    curve = page.locator(".scatterlayer path.js-line").first
    curve.wait_for(timeout=WAIT_S * 1000)
    box = curve.bounding_box()
    assert box is not None
    assert box["width"] > 50
    assert box["y"] + box["height"] < 900


def test_the_printed_address_of_a_file_shows_the_curve_of_the_federation(
    page: Page, served: tuple[Results, str]
) -> None:
    results, server = served
    assert results.url is not None

    check_first_screen(page, results.url.replace("http://127.0.0.1:5000", server))


def test_the_printed_address_of_a_server_shows_the_curve_of_the_federation(
    page: Page, served: tuple[Results, str], tmp_path: Path
) -> None:
    _, server = served

    results = deliver(tmp_path / "job-at-a-server", {"tracking_uri": server})

    assert results.command is None
    assert results.url is not None
    check_first_screen(page, results.url)
