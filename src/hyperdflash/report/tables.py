"""Renders paragraphs and tables as Markdown and on the terminal, and formats numbers. A cell ``**x**`` is bold."""

import math
import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from hyperdflash.files import resource, write_text
from hyperdflash.report.bootstrap import Estimate

GAP = "-"  # not measured


@dataclass(frozen=True)
class Table:
    """``header`` and ``rows`` of text, the first column to the left and numbers to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = str | Table


def markdown(blocks: Iterable[Block]) -> str:
    """Joins blocks with blank lines; the text ends with a line break."""
    texts = []
    for block in blocks:
        if isinstance(block, Table):
            lines = [block.header, ["---", *["---:"] * (len(block.header) - 1)], *block.rows]
            block = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        texts.append(block)
    return "\n\n".join(texts) + "\n"


def show(text: str) -> None:
    """Prints Markdown on the terminal, with lines wide enough for the tables."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=max(Console().width, 160)).print(Markdown(text))


def bold_best(values: Sequence[float], texts: Sequence[str]) -> list[str]:
    """Returns ``texts`` with the first word of the highest of ``values`` in bold."""
    best = max((value for value in values if not math.isnan(value)), default=math.nan)
    bold = [re.sub(r"^\S+", r"**\g<0>**", text) for text in texts]
    return [bold[i] if value == best else texts[i] for i, value in enumerate(values)]


def estimate_text(estimate: Estimate, signed: bool = False) -> str:
    """Writes ``2.29 [2.20, 2.38]``."""
    value, low, high = (number_text(v, signed=signed) for v in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def number_text(value: float, digits: int = 2, signed: bool = False) -> str:
    """Writes ``2.29``; ``n/a`` for NaN."""
    if math.isnan(value):
        return "n/a"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"  # no "-0.00"


def or_gap(text: str) -> str:
    """Returns GAP for ``n/a``, else ``text``."""
    return GAP if text.startswith("n/a") else text


def rates_table(rates: dict[str, dict[str, tuple[Estimate, ...]]]) -> Table:
    """Returns acceptance in percent, a column per slot; ``rates``: method -> metric -> an estimate per slot."""
    rows = []
    for method, own in rates.items():
        for metric, slots in own.items():
            values = [number_text(100 * e.value, 1) for e in slots]
            rows.append([method if metric == "survival" else "", metric, *values])
    slots = max(map(len, rows)) - 2
    return Table(["Method", "", *map(str, range(1, slots + 1))], [row + [""] * (slots + 2 - len(row)) for row in rows])


def jsonable(value):
    """Returns nested dicts, lists and tuples with None for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_page(title: str, text: str, pictures: Iterable[Path], path: Path) -> Path:
    """Writes Markdown ``text`` as a page, which replaces ``path`` when complete; pictures follow the first ``##`` section."""
    from markdown_it import MarkdownIt

    first, *sections = MarkdownIt("js-default").render(text).split("<h2>")
    read = [(escape(picture.stem), b64encode(picture.read_bytes()).decode()) for picture in pictures]
    images = [f'<div><img alt="{name}" src="data:image/png;base64,{data}"></div>\n' for name, data in read]
    body = "<h2>".join([first, *(sections[:1])]) + "".join(images) + "".join(f"<h2>{own}" for own in sections[1:])
    page = (resource("assets") / "report.html").read_text()
    write_text(path, page.replace("<!--title-->", escape(title)).replace("<!--body-->", body))
    return path
