"""The W&B workspace over the trainings of a project, with the content of the page of `python -m src.report`.

acceptance    survival and conditional acceptance per position by method, at the best checkpoint and over training
tau           by step, by method, against each numeric axis
choices       parallel coordinates from the axes to tau
drafts        tables of drafted and accepted text
"""

from __future__ import annotations

from pathlib import Path

import wandb_workspaces.expr as expr
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from omegaconf import DictConfig

from hyperdflash.training.loggers import WANDB_AXES, logged_in

STEP = "trainer/global_step"
NUMERIC = {key: option for key, option in WANDB_AXES.items() if option not in ("kl.teacher", "target.path", "seed")}


def make_dashboard(config: DictConfig) -> None:
    """Saves the workspace at W&B and prints its address, or writes it into ``config.file``; ValueError without a login."""
    workspace = build_workspace(config.entity, config.project, sweep=config.group)
    if config.file:
        Path(config.file).write_text(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2))
        print(f"wrote {config.file}: {sum(len(section.panels) for section in workspace.sections)} panels, nothing was sent")
        return
    if not logged_in():
        raise ValueError(
            "saving a workspace needs a W&B login: run `wandb login`, or give file=workspace.json; "
            "`python -m src.report` makes the same page without an account"
        )
    print(workspace.save().url)


def build_workspace(entity: str, project: str, *, sweep: str | None = None, num_slots: int = 6) -> ws.Workspace:
    """Builds the workspace and sends nothing; ``sweep`` limits it to the runs of that group."""
    slots = range(1, num_slots + 1)
    method = wr.Config("method")
    bars = [
        wr.BarPlot(
            title=f"{kind} acceptance per position, best checkpoint, mean by method",
            metrics=[wr.SummaryMetric(f"best/{kind}_{k}") for k in slots],
            groupby=method,
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
            orientation="v",
        )
        for kind in ("survival", "conditional")
    ]
    positions = [_line(f"val/{kind}_{k}", method) for kind in ("survival", "conditional") for k in slots]
    scatters = [
        wr.ScatterPlot(title=f"tau against {option}", x=wr.Config(key), y=wr.SummaryMetric("best/tau_mean"), regression=False)
        for key, option in NUMERIC.items()
    ]
    by_method = wr.BarPlot(
        title="tau, plain mean over domains, best checkpoint",
        metrics=[wr.SummaryMetric("best/tau_mean")],
        groupby=method,
        groupby_aggfunc="mean",
        groupby_rangefunc="stderr",
    )
    columns = [wr.ParallelCoordinatesPlotColumn(metric=method, display_name="method")]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(k), display_name=option) for k, option in WANDB_AXES.items()]
    columns.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric("best/tau_mean"), display_name="tau"))
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Drafters, sweep {sweep}" if sweep else "Drafters",
        sections=[
            ws.Section(name="Acceptance by method", panels=[*bars, *positions], is_open=True),
            ws.Section(name="Accepted length", panels=[_line("val/tau", method), by_method, *scatters], is_open=True),
            ws.Section(
                name="Choices", panels=[wr.ParallelCoordinatesPlot(title="choices and tau", columns=columns)], is_open=True
            ),
            ws.Section(name="Drafted and accepted", panels=[wr.MediaBrowser(title="val/drafts", media_keys=["val/drafts"])]),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=[expr.Metric("Group") == sweep] if sweep else [],
            groupby=[expr.Config("method")],
            pinned_columns=["summary:best/tau_mean", "config:method"],
        ),
    )


def _line(metric: str, group: wr.Config) -> wr.LinePlot:
    return wr.LinePlot(
        title=f"{metric} by step", x=STEP, y=[metric], groupby=group, groupby_aggfunc="mean", groupby_rangefunc="minmax"
    )
