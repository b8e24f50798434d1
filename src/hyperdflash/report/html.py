"""Writes a report as one HTML page with its pictures and sortable tables, which needs no network and no server."""

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from hyperdflash.files import resource, write_text


def write_page(title: str, text: str, pictures: Iterable[Path], path: Path) -> Path:
    """Writes Markdown ``text`` as a page, which replaces ``path`` when complete; pictures follow the first ``##`` section."""
    first, *sections = MarkdownIt("js-default").render(text).split("<h2>")
    images = [
        f'<img alt="{escape(picture.stem)}" src="data:image/png;base64,{b64encode(picture.read_bytes()).decode()}">\n'
        for picture in pictures
    ]
    body = "<h2>".join([first, *(sections[:1])]) + "".join(images) + "".join(f"<h2>{own}" for own in sections[1:])
    page = (resource("assets") / "report.html").read_text()
    write_text(path, page.replace("<!--title-->", escape(title)).replace("<!--body-->", body))
    return path
