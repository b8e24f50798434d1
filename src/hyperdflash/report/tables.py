"""Renders a report's paragraphs and tables as Markdown, as HTML and on the terminal, and formats its numbers.

A cell ``**x**`` is bold in every format. A row of one cell is a section's heading.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from hyperdflash.report.bootstrap import Estimate

GAP = "-"  # not measured


@dataclass(frozen=True)
class Table:
    """``header`` and ``rows`` of text, the first column to the left and numbers to the right; ``title`` and ``caption`` are
    for the terminal."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""


Block = str | Table


def markdown(blocks: Iterable[Block]) -> str:
    """Joins blocks with blank lines; the text ends with a line break."""
    texts = ("\n".join(markdown_table(b.header, b.rows)) if isinstance(b, Table) else b for b in blocks)
    return "\n\n".join(texts) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def terminal_table(table: Table) -> RichTable:
    """Returns a table for ``rich.console.Console.print``."""
    found = RichTable(box=box.SIMPLE_HEAD, title=table.title or None, caption=table.caption or None)
    found.title_justify = found.caption_justify = "left"
    for i, name in enumerate(table.header):
        found.add_column(name, justify="right" if i else "left")
    for row in table.rows:
        if len(row) == 1:
            found.add_section()
        found.add_row(*([f"[dim]{row[0]}[/]"] if len(row) == 1 else (_bold(escape(c), r"[bold green]\1[/]") for c in row)))
    return found


def html_blocks(blocks: Iterable[Block]) -> str:
    """Returns paragraphs, lists, headings (``#``, ``##``, ``###``) and tables as HTML elements."""
    found = []
    for block in blocks:
        if isinstance(block, Table):
            head = "".join(f"<th>{_html(name)}</th>" for name in block.header)
            rows = ("".join(f"<td>{_html(cell)}</td>" for cell in row) for row in block.rows)
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            found.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
        elif block.startswith("#"):
            level = len(block) - len(block.lstrip("#"))
            found.append(f"<h{level}>{_html(block.lstrip('# '))}</h{level}>")
        elif block.startswith("- "):
            items = "".join(f"<li>{_html(line.removeprefix('- '))}</li>" for line in block.splitlines())
            found.append(f"<ul>{items}</ul>")
        else:
            found.append(f"<p>{_html(block)}</p>")
    return "\n".join(found)


def bold_best(values: Sequence[float], texts: Sequence[str], whole: bool = False) -> list[str]:
    """Returns ``texts`` with that of the highest of ``values`` in bold: its first word, or the ``whole``."""
    defined = [value for value in values if not math.isnan(value)]
    found = list(texts)
    if defined:
        best = list(values).index(max(defined))
        first, blank, rest = (texts[best], "", "") if whole else texts[best].partition(" ")
        found[best] = f"**{first}**{blank}{rest}"
    return found


def estimate_text(estimate: Estimate, signed: bool = False) -> str:
    """Writes ``2.29 [2.20, 2.38]``."""
    low, high = (number_text(v, signed=signed) for v in (estimate.low, estimate.high))
    return f"{number_text(estimate.value, signed=signed)} [{low}, {high}]"


def number_text(value: float, digits: int = 2, signed: bool = False) -> str:
    """Writes ``2.29``; ``n/a`` for NaN."""
    if math.isnan(value):
        return "n/a"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"  # no "-0.00"


def or_gap(text: str) -> str:
    """Returns GAP for ``n/a``, else ``text``."""
    return GAP if text.startswith("n/a") else text


def jsonable(value):
    """Returns nested dicts, lists and tuples with None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _bold(text: str, form: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", form, text)


def _html(text: str) -> str:
    return _bold(html.escape(text), r"<b>\1</b>")
