"""Reads what an offline W&B run recorded, and draws a workspace's line plots from it, as W&B would.

python -m tests.training.offline_record FILE.png RUN...
"""

from __future__ import annotations

import json
import struct
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from wandb.proto import wandb_internal_pb2 as pb

BLOCK, HEADER = 32768, 7


def records(run: Path) -> list[pb.Record]:
    """Every record of a run's only offline file."""
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return records_in(file)


def records_in(file: Path) -> list[pb.Record]:
    """LevelDB's log format, a protobuf message each; W&B reads it in its compiled service alone."""
    data, position, parts, found = file.read_bytes(), 7, [], []  # the file's own header: ":W&B", magic, version
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        position += HEADER
        if kind == 0:
            break
        parts.append(data[position : position + length])
        position += length
        if kind in (1, 4):  # whole, or the last part
            found.append(pb.Record.FromString(b"".join(parts)))
            parts = []
    return found


def values(items) -> dict[str, object]:
    """Of a history, summary or configuration update."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def rows(kept: Sequence[pb.Record]) -> list[dict]:
    return [values(record.history.item) for record in kept if record.HasField("history")]


def configuration(kept: Sequence[pb.Record]) -> dict[str, object]:
    return {key: value for record in kept for key, value in values(record.config.update).items()}


def panels(view: dict) -> list[tuple]:
    """Of a workspace's specification: (section, kind, title, x, metrics, key that it is grouped by) per panel."""
    found = []
    for section in view["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            own = panel["config"]
            title = own.get("chartTitle") or own.get("barPlotTitle") or ""
            metrics = own.get("metrics") or own.get("mediaKeys") or []
            found.append((section["name"], panel["viewType"], title, own.get("xAxis"), metrics, own.get("groupBy")))
    return found


def curves(runs: Sequence[Path], x: str, metric: str, groupby: str) -> dict[str, np.ndarray]:
    """Group -> [points, 2] of x and the mean of ``metric`` over the group's runs."""
    found: dict[str, dict[float, list]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        kept = records(run)
        label = str(configuration(kept)[groupby.removesuffix(".value")])
        for row in rows(kept):
            if metric in row:
                found[label][row[x]].append(row[metric])
    return {label: np.array([(at, np.mean(own)) for at, own in sorted(points.items())]) for label, points in found.items()}


def draw(view: dict, runs: Sequence[Path], path: Path) -> None:
    from matplotlib.figure import Figure

    plots = [panel for panel in panels(view) if panel[1] == "Run History Line Plot"]
    figure = Figure(figsize=(18, 3.2 * -(-len(plots) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(plots) // 3), 3).flat
    for axis in axes[len(plots) :]:
        axis.axis("off")
    for axis, (_, _, title, x, (metric,), groupby) in zip(axes, plots, strict=False):
        for label, points in curves(runs, x, metric, groupby).items():
            axis.plot(*points.T, marker=".", label=label)
        axis.set(title=title, xlabel=x)
        axis.legend(fontsize=6)
    figure.savefig(path, dpi=70)


def main(path: str, *runs: str) -> None:
    from omegaconf import OmegaConf

    from hyperdflash.identity import CONF
    from hyperdflash.training.wandb_dashboard import build_workspace
    from hyperdflash.training.wandb_record import workspace_json

    own = OmegaConf.load(Path(CONF) / "dashboard.yaml")
    workspace = build_workspace("team", own.project, sweep=None, axes=own.axes, domains=own.domains)
    draw(json.loads(workspace_json(workspace)), [Path(run) for run in runs], Path(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
