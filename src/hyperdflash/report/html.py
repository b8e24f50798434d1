"""Writes a report as one HTML page with its pictures and sortable tables, which needs no network and no server."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path

from hyperdflash.files import write_text
from hyperdflash.report.tables import Block, html_blocks

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ margin: 0 auto; max-width: 1320px; padding: 24px 28px 60px; font: 14px/1.5 system-ui, sans-serif; color: #1d2430; }}
  h1 {{ font-size: 22px; }} h2 {{ font-size: 16px; margin-top: 30px; }}
  img {{ max-width: 100%; display: block; margin: 12px 0; }}
  .scroll {{ overflow-x: auto; }} table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
  th, td {{ padding: 5px 9px; text-align: right; border-bottom: 1px solid #d9dee6; white-space: nowrap; }}
  th {{ background: #f5f7fa; cursor: pointer; }} th:first-child, td:first-child {{ text-align: left; }}
  th[aria-sort="ascending"]::after {{ content: " ▲"; }} th[aria-sort="descending"]::after {{ content: " ▼"; }}
</style>
</head>
<body>
{body}
<script>
const value = text => (n => isNaN(n) ? text : n)(parseFloat(text.replace("−", "-").replaceAll(",", "")));
for (const head of document.querySelectorAll("th")) head.onclick = () => {{
  const body = head.closest("table").tBodies[0], sign = head.ariaSort === "descending" ? 1 : -1;
  const key = row => value(row.cells[head.cellIndex].textContent);
  if ([...body.rows].some(row => !row.cells[0].textContent)) return; // rows that belong together
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = sign < 0 ? "descending" : "ascending";
  body.append(...[...body.rows].sort((a, b) => sign * (key(a) > key(b) ? 1 : key(a) < key(b) ? -1 : 0)));
}};
document.body.dataset.ready = "yes";
</script>
</body>
</html>
"""


def write_page(title: str, blocks: Iterable[Block], pictures: Iterable[Path], path: Path) -> Path:
    """Writes the page, which replaces ``path`` when complete; the pictures follow the first section."""
    blocks = list(blocks)
    images = [
        f'<img alt="{escape(picture.stem)}" src="data:image/png;base64,{b64encode(picture.read_bytes()).decode()}">'
        for picture in pictures
    ]
    sections = [i for i, block in enumerate(blocks) if isinstance(block, str) and block.startswith("## ")]
    after = sections[1] if len(sections) > 1 else len(blocks)
    body = "\n".join([html_blocks(blocks[:after]), *images, html_blocks(blocks[after:])])
    write_text(path, PAGE.format(title=escape(title), body=body))
    return path
