"""The curves of one run: its picture, and acceptance by drafted position at the best checkpoint."""

import csv
import json
import re
from pathlib import Path

from hyperdflash.cli import sentence_of

KINDS = ("survival", "conditional")
BY_STEP = {"train/loss": "loss", "train/lr": "learning rate", "val/tau": "validation τ"}


def acceptance_metric(kind: str, domain: str | None = None) -> str:
    """Returns the name of a rate of KINDS, over all prompts or those of ``domain``: acceptance/survival_math."""
    return "_".join([f"acceptance/{kind}", *([re.sub(r"\W", "_", domain)] if domain else [])])


def acceptance_rows(record: dict) -> list[dict[str, float]]:
    """Returns a row per drafted position of validation.json: ``position``, and every ``acceptance_metric`` that has a round."""
    prompts = record["prompts"]
    rows: list[dict[str, float]] = [{"position": k + 1} for k in range(len(prompts[0]["survived"]))]
    for domain in (None, *sorted({prompt["domain"] for prompt in prompts})):
        own = [prompt for prompt in prompts if domain in (None, prompt["domain"])]
        for k, row in enumerate(rows):
            survived, reached = (sum(prompt[field][k] for prompt in own) for field in ("survived", "reached"))
            counts = zip(KINDS, (sum(prompt["rounds"] for prompt in own), reached), strict=True)
            row |= {acceptance_metric(kind, domain): survived / count for kind, count in counts if count}
    return rows


def draw_curves(run: Path) -> None:
    """Writes run/curves.png: loss, learning rate and validation tau by step, acceptance by drafted position."""
    try:
        import matplotlib  # noqa: F401, an extra: an error in a part of it would name that part

        from hyperdflash.report.figures import PANEL_IN, PANELS, dress, headed_figure, label_lines, look, save_figure
    except ModuleNotFoundError as error:
        print(f"no {run / 'curves.png'}: {sentence_of(error)}", flush=True)
        return
    record = json.loads((run / "validation.json").read_text())
    metrics = run / "metrics.csv"
    logged = list(csv.DictReader(metrics.read_text().splitlines())) if metrics.exists() else []
    heading = f"best validation τ {record['tau']:.3f} after {record['step']} steps; acceptance there, on validation prompts"
    figure, (top, bottom) = headed_figure(run.name, [heading], [PANEL_IN, PANEL_IN])
    for axis, (name, title) in zip(top.subplots(1, 3), BY_STEP.items(), strict=True):
        points = [(int(row["step"]) + 1, float(row[name])) for row in logged if row.get(name)]
        if points:
            axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else "", color=look(1)[0])
        dress(axis, title, "optimizer step")
    rows, domains = acceptance_rows(record), sorted({prompt["domain"] for prompt in record["prompts"]})
    axes = bottom.subplots(1, 2, sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        ends = []
        for index, domain in enumerate((None, *domains)):
            name, (color, marker) = acceptance_metric(kind, domain), look(index)
            points = [(row["position"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), color=color, marker=marker)
            ends.append((0, rows[0].get(name, 0), domain or "all", color, marker))
        dress(axis, PANELS[kind], "drafted position k")
        axis.set(ylim=(-0.02, 1.02), ylabel="acceptance rate")
    label_lines(axes[1], ends)
    save_figure(figure, run / "curves.png")
