"""Loggers of a run: CSV beside the checkpoints, and W&B, offline unless somebody is logged in."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from hyperdflash.identity import source_names
from hyperdflash.launch.sweep_plan import swept_here
from hyperdflash.settings import boolean
from hyperdflash.training.metrics_csv import MetricsCSV

WANDB_MODES = ("auto", "online", "offline", "off")
# What a sweep may turn, as flat keys of the W&B configuration: panels read no nested ones.
WANDB_AXES = {
    "axis_kl_alpha": "kl.alpha",
    "axis_kl_positions": "kl.positions",
    "axis_kl_temperature": "kl.temperature",
    "axis_kl_teacher": "kl.teacher",
    "axis_draft_layers": "drafter.num_layers",
    "axis_anchors": "blocks.num_anchors",
    "axis_gamma": "loss.gamma",
    "axis_target": "target.path",
    "axis_seed": "seed",
}


def logged_in() -> bool:
    """A W&B key in the environment or in .netrc; nothing is asked over the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def make_loggers(config: DictConfig, run: Path, name: str, **wandb_init) -> list[Logger] | bool:
    """``csv`` true writes run/metrics.csv; ``wandb`` one of WANDB_MODES, with ``wandb_init`` for wandb.init.

    A resumed run goes on in the same W&B run: its id lies in run/wandb_id.
    """
    if config.wandb not in WANDB_MODES:
        raise ValueError(f"logger.wandb must be one of {', '.join(WANDB_MODES)}, got {config.wandb!r}")
    boolean("logger.artifacts", config.artifacts)
    loggers: list[Logger] = [MetricsCSV(run)] if config.csv else []
    if config.wandb != "off":
        wanted = os.environ.get("WANDB_MODE")
        offline = wanted == "offline" or config.wandb == "offline" or (config.wandb == "auto" and not logged_in())
        if wanted != "disabled":
            import wandb  # an extra: Lightning's own error does not name the module

            where = {"project": config.project, "save_dir": run, "offline": offline, "id": _wandb_id(run)}
            loggers.append(StepWandb(name=name, settings=wandb.Settings(silent=True), **where, **wandb_init))
    return loggers or False


class StepWandb(WandbLogger):
    """Rows of W&B numbered by the optimizer step, one a step: what a resumed run logs again, W&B drops by its number."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)


def wandb_place(config: DictConfig) -> dict:
    """W&B's labels of a training: ``group`` is its sweep, ``job_type`` its choice in the sweep without the seed (the stage
    outside a sweep), ``tags`` are stage, target, method and sweep."""
    stage = f"stage{config.stage}"
    choice = " ".join(f"{axis}={value}" for axis, value in swept_here().items() if axis != "seed")
    sweep = config.sweep.name if config.sweep else None
    tags = [stage, Path(config.target.path).name, method_name(config), *([f"sweep:{sweep}"] if sweep else [])]
    return {"group": sweep or stage, "job_type": (choice or stage)[:64], "tags": [tag[:64] for tag in tags]}


def wandb_axes(config: DictConfig) -> dict[str, object]:
    """WANDB_AXES of a training, and its ``method``; an option that it does not have is left out."""
    values = {key: OmegaConf.select(config, option) for key, option in WANDB_AXES.items()}
    return {"method": method_name(config), **{key: value for key, value in values.items() if value is not None}}


def method_name(config: DictConfig) -> str:
    """pre_hc_head-hc_gate, layers_flat-fc, pre_hc_head-hc_gate_random; or a drafter's own name where it reads neither."""
    source, *reducer = source_names(config)
    if not reducer:
        return source
    source += f"_{config.conditioning.paths}" if "paths" in config.conditioning else ""
    return f"{source}-{reducer[0]}" + ("_random" if config.reducer.get("init") == "random" else "")


@rank_zero_only
def _wandb_id(run: Path) -> str:
    path = Path(run) / "wandb_id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
