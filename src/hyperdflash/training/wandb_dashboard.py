"""The W&B workspace over the trainings of a project: acceptance per slot and tau by method, tau against each axis, drafts."""

from pathlib import Path

import wandb_workspaces.expr as expr
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from omegaconf import DictConfig

from hyperdflash.training.loggers import WANDB_AXES, logged_in
from hyperdflash.training.wandb_record import workspace_json

STEP = "trainer/global_step"
NUMERIC = {key: option for key, option in WANDB_AXES.items() if option not in ("kl.teacher", "target.path", "seed")}


def make_dashboard(config: DictConfig) -> None:
    """Saves the workspace at W&B and prints its address, or writes it into ``config.file``; ValueError without a login."""
    workspace = build_workspace(config.entity, config.project, sweep=config.group)
    if config.file:
        Path(config.file).write_text(workspace_json(workspace))
        print(f"wrote {config.file}: {sum(len(section.panels) for section in workspace.sections)} panels, nothing was sent")
    elif logged_in():
        print(workspace.save().url)
    else:
        raise ValueError(
            "saving a workspace needs a W&B login: run `wandb login`, or give file=workspace.json; "
            "`python -m src.report sweep=NAME` makes the same page without an account"
        )


def build_workspace(entity: str, project: str, *, sweep: str | None = None, num_slots: int = 6) -> ws.Workspace:
    """Builds the workspace and sends nothing; ``sweep`` limits it to the runs of that group."""
    slots, kinds, method = range(1, num_slots + 1), ("survival", "conditional"), wr.Config("method")

    def bars(title: str, *metrics: str) -> wr.BarPlot:
        shown = [wr.SummaryMetric(metric) for metric in metrics]
        grouped = {"groupby": method, "groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}
        return wr.BarPlot(title=f"{title}, best checkpoint", metrics=shown, **grouped, orientation="v")

    def lines(metric: str) -> wr.LinePlot:
        grouped = {"groupby": method, "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
        return wr.LinePlot(title=f"{metric} by step", x=STEP, y=[metric], **grouped)

    acceptance = [bars(f"{kind} acceptance per position", *(f"best/{kind}_{k}" for k in slots)) for kind in kinds]
    acceptance += [lines(f"val/{kind}_{k}") for kind in kinds for k in slots]
    tau = wr.SummaryMetric("best/tau_mean")
    taus = [lines("val/tau"), bars("tau, plain mean over domains", "best/tau_mean")]
    taus += [
        wr.ScatterPlot(title=f"tau against {option}", x=wr.Config(key), y=tau, regression=False)
        for key, option in NUMERIC.items()
    ]
    axes = [(method, "method"), *((wr.Config(key), option) for key, option in WANDB_AXES.items()), (tau, "tau")]
    columns = [wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=name) for metric, name in axes]
    choices = wr.ParallelCoordinatesPlot(title="choices and tau", columns=columns)
    drafts = wr.MediaBrowser(title="val/drafts", media_keys=["val/drafts"])
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Drafters, sweep {sweep}" if sweep else "Drafters",
        sections=[
            ws.Section(name="Acceptance by method", panels=acceptance, is_open=True),
            ws.Section(name="Accepted length", panels=taus, is_open=True),
            ws.Section(name="Choices", panels=[choices], is_open=True),
            ws.Section(name="Drafted and accepted", panels=[drafts]),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=[expr.Metric("Group") == sweep] if sweep else [],
            groupby=[expr.Config("method")],
            pinned_columns=["summary:best/tau_mean", "config:method"],
        ),
    )
