# SPDX-License-Identifier: Apache-2.0
"""How Sphinx makes the site of the pages. ``make docs`` calls it with the repository as its source folder.

The pages are plain Markdown, which a forge shows as well. The site's order of pages is that of the links in index.md.
Nothing is loaded from a network, neither while the site is built nor while it is read.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import trackhub  # noqa: E402

project = "trackhub"
copyright = "trackhub contributors, Apache-2.0"
version = release = trackhub.__version__
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "docs/api.rst", "backends/*/README.md", "jobs/*/README.md"]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "trackhub"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"trackhub {trackhub.__version__}"
html_extra_path = ["site"]
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sphinx = False
pygments_style, pygments_dark_style = "a11y-light", "github-dark"

myst_heading_anchors = 6

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_mock_imports = ["accelerate", "keras", "lightgbm", "lightning", "pytorch_lightning", "xgboost"]
napoleon_google_docstring, napoleon_numpy_docstring, napoleon_use_ivar = True, False, True
suppress_warnings = ["ref.python"]  # a name such as Limits that several public modules export leads to one of them
python_maximum_signature_line_length = 100

# autodoc's mocks take no items, and the callback for transformers registers itself in a dict of that library.
_transformers, _integrations = types.ModuleType("transformers"), types.ModuleType("transformers.integrations")
_transformers.TrainerCallback = type("TrainerCallback", (), {})  # type: ignore[attr-defined]
_integrations.integration_utils = types.SimpleNamespace(INTEGRATION_TO_CALLBACK={})  # type: ignore[attr-defined]
sys.modules |= {"transformers": _transformers, "transformers.integrations": _integrations}

_SECTION = re.compile(r"^\*\*([^*]+)\*\*", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#]+\.(?:md|rst))\)")


def _add_toctrees(app: Sphinx, name: str, source: list[str]) -> None:
    """Give index.md the lists of pages that the site's side bar shows: each section's links, in their order."""
    if name != root_doc:
        return
    heads = [*_SECTION.finditer(source[0])]
    ends = [*(head.start() for head in heads[1:]), len(source[0])]
    lists = ["```{toctree}\n:hidden:\n\nWhat it is <../README>\n```"]
    for head, end in zip(heads, ends, strict=True):
        links = {page: text.replace("`", "") for text, page in _LINK.findall(source[0][head.end() : end])}
        # A decision's link is its number. Its own title says more.
        entries = [page if text.isdigit() else f"{text} <{page}>" for page, text in links.items()]
        lists.append("\n".join(["```{toctree}", ":hidden:", f":caption: {head[1]}", "", *entries, "```"]))
    source[0] += "\n\n" + "\n\n".join(lists) + "\n"


def setup(app: Sphinx) -> None:
    """Connect the above to Sphinx."""
    app.connect("source-read", _add_toctrees)
