"""A SweepReport as one page that needs nothing else: no account, no network, no server.

The page is report/page.html with the numbers put in as JSON; its script draws SVG from them in the browser.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from html import escape
from pathlib import Path

from hyperdflash.files import write_text
from hyperdflash.report.bootstrap import LEVEL, MEAN
from hyperdflash.report.figures import COLOURS
from hyperdflash.report.sweep import Cell, SweepReport, verdict_lines
from hyperdflash.report.tables import jsonable

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(report: SweepReport, path: Path) -> Path:
    """Replaces the file at ``path`` when the page is complete."""
    text = TEMPLATE.read_text().replace("{{TITLE}}", escape(f"Sweep {report.name}"))
    # "</script>" inside a string would end the element; "<\/" is the same JSON
    text = text.replace("{{DATA}}", json.dumps(page_data(report), allow_nan=False).replace("</", "<\\/"))
    write_text(path, text)
    return path


def page_data(report: SweepReport) -> dict:
    """What the page's script reads: plain JSON values, None where a number is undefined."""
    return jsonable(
        {
            "name": report.name,
            "axes": {axis: list(values) for axis, values in report.axes.items()},
            "groups": list(report.groups),
            "mean": MEAN,
            "level": LEVEL,
            "baseline": report.baseline,
            "prompts": report.prompts,
            "resamples": report.num_resamples,
            "colours": list(COLOURS),
            "verdicts": verdict_lines(report),
            "left_out": report.left_out,
            "missing": list(report.missing),
            "cells": [_cell(cell) for cell in report.cells],
        }
    )


def _cell(cell: Cell) -> dict:
    over = cell.tau_over_seeds if len(cell.seeds) > 1 else cell.tau_over_prompts
    record = {
        "target": cell.target,
        "choices": cell.choices,
        "label": cell.label,
        "seeds": list(cell.seeds),
        "runs": list(cell.runs),
        "steps": cell.steps,
        "parameters": cell.parameters,
        "tau": {group: asdict(estimate) for group, estimate in over.items()},
        "survival": [asdict(estimate) for estimate in cell.survival],
        "conditional": [asdict(estimate) for estimate in cell.conditional],
        "curve": cell.curve.tolist(),
        "is_baseline": cell.is_baseline,
        "marks": list(cell.marks),
        "difference": None,
    }
    if cell.difference:
        record["difference"] = {
            "prompts": asdict(cell.difference.over_prompts[MEAN]),
            "seeds": asdict(cell.difference.over_seeds[MEAN]),
            "verdict": cell.difference.verdict,
        }
    return record
