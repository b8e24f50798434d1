"""Loggers of a run: CSV beside the checkpoints, and W&B, offline unless somebody is logged in."""

from __future__ import annotations

import netrc
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig

WANDB_MODES = ("auto", "online", "offline", "off")


def logged_in() -> bool:
    """A W&B key in the environment or in .netrc; nothing is asked over the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def make_loggers(config: DictConfig, run: Path, name: str) -> list[Logger] | bool:
    """``csv`` true writes run/version_N/metrics.csv (a resumed run gets the next N); ``wandb`` one of WANDB_MODES."""
    if config.wandb not in WANDB_MODES:
        raise ValueError(f"logger.wandb must be one of {', '.join(WANDB_MODES)}, got {config.wandb!r}")
    loggers: list[Logger] = [CSVLogger(run, name="")] if config.csv else []
    if config.wandb != "off":
        wanted = os.environ.get("WANDB_MODE")
        offline = wanted == "offline" or config.wandb == "offline" or (config.wandb == "auto" and not logged_in())
        if wanted != "disabled":
            loggers.append(WandbLogger(name=name, project=config.project, save_dir=run, offline=offline))
    return loggers or False
