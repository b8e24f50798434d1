"""The W&B dashboard over a project's trainings; needs `pip install -e .[wandb]`.

python -m src.dashboard entity=TEAM project=hyperdflash                logged in: saves the workspace and prints its address
python -m src.dashboard entity=TEAM file=workspace.json                 without an account: what would be sent

`python -m src.report` makes the same page without W&B.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from hyperdflash.cli import entry_point


@entry_point("dashboard")
def main(config: DictConfig) -> None:
    from hyperdflash.training.loggers import logged_in

    try:
        from hyperdflash.training.wandb_dashboard import build_workspace
    except ModuleNotFoundError as error:
        raise ValueError(f"the dashboard needs {error.name}: run `pip install -e .[wandb]`") from error
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


if __name__ == "__main__":
    main()
