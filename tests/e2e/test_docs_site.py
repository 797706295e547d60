# SPDX-License-Identifier: Apache-2.0
"""The site of the pages is built without a warning and without a network, and each of its own links leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

import trackhub
from tests.e2e.browser import CHROMIUM, FLAGS, needs_chromium

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?:href|src)=\"(?!https?:|mailto:|data:)([^\"#]*)(?:#([^\"]*))?\"")
LOADED = re.compile(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"https?:[^\"]*\"")

pytestmark = pytest.mark.long
pytest.importorskip("sphinx", reason="sphinx is not installed; it is in the extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A proxy that does not exist stands for a machine without a network."""
    folder = tmp_path_factory.mktemp("docs")
    options = ["--conf-dir", "docs", "--doctree-dir", str(folder / "doctrees"), "--fail-on-warning", "--keep-going"]
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "--builder", "html", *options, "--quiet", ".", str(folder / "site")],
        cwd=ROOT,
        env={**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder / "site"


def test_every_link_of_the_site_leads_to_a_file_and_a_place_in_it(site: Path) -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    dead = []
    for page, text in pages.items():
        for target, place in LINK.findall(text):
            file = (page.parent / unquote(target.partition("?")[0])).resolve() if target else page
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (place and file in pages and f'id="{unquote(place)}"' not in pages[file]):
                dead.append(f"{page.relative_to(site)}: {target}#{place}")

    assert len(pages) > 40
    assert dead == []


def test_no_page_loads_anything_from_a_network(site: Path) -> None:
    assert [page.name for page in site.rglob("*.html") if LOADED.search(page.read_text(encoding="utf-8"))] == []


def test_the_api_reference_has_every_public_name_of_the_package(site: Path) -> None:
    page = (site / "docs" / "api.html").read_text(encoding="utf-8")

    assert [name for name in trackhub.__all__ if name not in page] == []
    assert 'id="trackhub.Writer.log_image"' in page
    assert 'id="trackhub.integrations.transformers.TrackhubCallback"' in page


def test_the_side_bar_leads_to_every_page_that_the_index_names(site: Path) -> None:
    index = (site / "docs" / "index.html").read_text(encoding="utf-8")
    side_bar = index.partition("sidebar-tree")[2].partition("</aside>")[0]

    for page in ("getting-started", "writer", "troubleshooting", "cli", "api", "adr/0001-cursors-per-run"):
        assert f'href="{page}.html"' in side_bar


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_with_code_fits_a_phone_and_is_open_to_keyboard_and_eyes(site: Path, scheme: str) -> None:
    """What axe says of the theme's own side bar is left to the theme."""
    playwright_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; it is in the extra dev"
    )
    from axe_playwright_python.sync_playwright import Axe

    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": 360, "height": 700}, color_scheme=scheme).new_page()
        found = {}
        for name in ("README", "docs/getting-started", "docs/writer", "docs/cli"):
            page.goto((site / f"{name}.html").as_uri())
            rules = {"runOnly": ["color-contrast", "scrollable-region-focusable", "image-alt", "link-name"]}
            violations = Axe().run(page, options=rules).response["violations"]
            found[name] = (page.evaluate("document.documentElement.scrollWidth"), [v["id"] for v in violations])
        browser.close()

    assert found == dict.fromkeys(found, (360, []))
