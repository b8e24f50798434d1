"""The W&B workspace over the trainings of a project: acceptance by drafted position, tau, losses and drafts, by swept axes."""

from collections.abc import Sequence
from pathlib import Path

import wandb_workspaces.expr as expr
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from omegaconf import DictConfig

from hyperdflash.training.curves import KINDS, acceptance_metric
from hyperdflash.training.loggers import axis_key, logged_in
from hyperdflash.training.wandb_record import workspace_json

STEP = "trainer/global_step"
STEPS = {"val/tau": "tau", "train/loss": "loss", "train/lr": "learning rate", "train/grad_norm": "gradient norm"}
STEPS |= {"train/tokens_per_s": "tokens per second"}


def make_dashboard(config: DictConfig) -> None:
    """Saves the workspace at W&B and prints its address, or writes it into ``config.file``; ValueError without a login."""
    shown = {"sweep": config.group, "axes": config.axes, "domains": config.domains}
    workspace = build_workspace(config.entity, config.project, **shown)
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


def build_workspace(
    entity: str, project: str, *, sweep: str | None, axes: Sequence[str], domains: Sequence[str]
) -> ws.Workspace:
    """Builds the workspace and sends nothing. Runs are grouped by their swept axes: the mean over seeds, and a band from the
    lowest to the highest. ``sweep`` limits the workspace to the runs of that group; ``axes`` get a bar of tau each, ``domains``
    a plot of acceptance by position each."""
    label, tau = wr.Config("axes"), wr.SummaryMetric("best/tau_mean")

    over_seeds = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}

    def lines(title: str, x: str, metric: str) -> wr.LinePlot:
        return wr.LinePlot(title=title, x=x, y=[metric], groupby=label, **over_seeds)

    def bars(title: str, groupby: wr.Config) -> wr.BarPlot:
        return wr.BarPlot(title=title, metrics=[tau], groupby=groupby, **over_seeds, orientation="h")

    acceptance = [
        lines(f"{kind} by position, {domain or 'all domains'}", "position", acceptance_metric(kind, domain))
        for domain in (None, *domains)
        for kind in KINDS
    ]
    taus = [bars("tau", label), *(bars(f"tau by {option}", wr.Config(axis_key(option))) for option in axes)]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Drafters, sweep {sweep}" if sweep else "Drafters",
        sections=[
            ws.Section(name="Acceptance by position, best checkpoint", panels=acceptance, is_open=True),
            ws.Section(name="Training", panels=[lines(f"{n} by step", STEP, key) for key, n in STEPS.items()], is_open=True),
            ws.Section(name="Accepted length by swept axis, best checkpoint", panels=taus, is_open=True),
            ws.Section(name="Runs", panels=[wr.RunComparer(diff_only="split")], is_open=True),
            ws.Section(name="Drafted and accepted", panels=[wr.MediaBrowser(title="drafts", media_keys=["val/drafts"])]),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=[expr.Metric("Group") == sweep] if sweep else [],
            groupby=[expr.Config("axes")],
            pinned_columns=["summary:best/tau_mean", "config:axes", "config:method"],
        ),
    )
