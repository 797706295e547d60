# SPDX-License-Identifier: Apache-2.0
"""Turns a text in Markdown into HTML that can do nothing: no links, no images, no HTML of the text's own.

`table_and_media_values` calls it with the texts that sites logged, and with the notes of jobs. It calls markdown-it-py
with the rules that are named here and no others. All that they do not know stays text, and is escaped.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

__all__ = ["as_html"]

_RULES = (
    "table", "code", "fence", "blockquote", "hr", "list", "heading",
    "newline", "escape", "backticks", "strikethrough", "emphasis", "entity", "balance_pairs", "fragments_join",
)  # fmt: skip
# What shows that a text is meant as Markdown: these blocks, and these marks within a line.
_BLOCKS = ("table_open", "fence", "blockquote_open", "bullet_list_open", "ordered_list_open", "heading_open")
_INLINE = ("**", "*", "~~", "`", "``")  # not "_" and "__": plain texts have them in names such as __init__
_MAX_NESTING = 20
_MAX_CELLS = 10_000
"""The parser adds the cells that rows of a table lack: 20,000 characters with one wide row would take it 4 s."""


def as_html(text: str) -> Any:
    """Return a text as HTML, as a `Markup` that jinja2 does not escape again.

    Returns:
        None if the text has no sign of Markdown, could hold a table of more than 10,000 cells, or is nested so deeply
        that the parser would leave parts out. Show the text itself then.
    """
    from markupsafe import Markup

    text = re.sub(r"\r\n?", "\n", text)  # the parser's lines, so that a table's rows are counted as it counts them
    lines = text.split("\n")
    if len(lines) * max(line.count("|") for line in lines) > _MAX_CELLS:
        return None
    parser = _parser()
    tokens = parser.parse(text)
    if not any(_is_sign(token) for token in _all(tokens)) or any(t.level >= _MAX_NESTING - 1 for t in tokens):
        return None
    _fit_into_the_page(tokens)
    return Markup(parser.renderer.render(tokens, parser.options, {}))


@functools.cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # "zero" has no rule but paragraphs. Line breaks are kept, since many texts are log output.
    parser = MarkdownIt("zero", {"breaks": True, "maxNesting": _MAX_NESTING})
    return parser.enable(list(_RULES))


def _all(tokens: Sequence[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from token.children or ()


def _is_sign(token: Token) -> bool:
    return token.type in _BLOCKS or (token.type != "text" and token.markup in _INLINE)


def _fit_into_the_page(tokens: Sequence[Token]) -> None:
    """Turn headings into paragraphs, and empty header cells into plain cells.

    A text's headings would be headings of the page, and a screen reader stops at a header cell that says nothing.
    """
    for place, token in enumerate(tokens):
        if token.type in ("heading_open", "heading_close"):
            token.tag = "p"
            if token.nesting == 1:
                token.attrSet("class", "head")
        elif token.type == "th_open":
            if tokens[place + 1].content.strip():
                token.attrSet("scope", "col")
            else:
                token.tag = tokens[place + 2].tag = "td"
