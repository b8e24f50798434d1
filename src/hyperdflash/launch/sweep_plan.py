"""Lists the jobs that `python -m src.train -m sweep=kl target=tiny,deep` trains, without running them."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hyperdflash.identity import CONF, decided_by, run_name, runs_dir
from hyperdflash.journal import TYPED_AXES, jobs_of
from hyperdflash.options import accept, check_keys, own_folders


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its swept values by axis, the options that decide its result, and its directory."""

    choices: dict[str, str]
    decided: dict
    directory: Path


@dataclass(frozen=True)
class SweepPlan:
    """``axes``: axis -> its values in order; ``baseline``: axis -> value, of swept axes alone."""

    name: str
    axes: dict[str, tuple[str, ...]]
    baseline: dict[str, str]
    jobs: tuple[Job, ...]


def plan_sweep(words: Sequence[str]) -> SweepPlan:
    """Expands ``words`` of the training command; ValueError when they sweep nothing."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(CONF, version_base="1.3"):
            return _plan(words)
    finally:
        GlobalHydra.instance().hydra = outer


def _plan(words: Sequence[str]) -> SweepPlan:
    shared = [word for word in words if word.partition("=")[0] == "sweep" or word.startswith("hydra")]
    rest = [word for word in words if word not in shared]
    head = compose("train", overrides=shared, return_hydra_config=True)
    accept(*own_folders(head.hydra))
    head.hydra.overrides.task = rest  # for `check_keys`
    params = [f"{key}={value}" for key, value in (head.hydra.sweeper.get("params") or {}).items()]
    jobs = jobs_of([*params, *rest], GlobalHydra.instance().config_loader())
    table = [dict(word.split("=", 1) for word in overrides) for overrides in jobs]
    axes = {key: tuple(dict.fromkeys(row[key] for row in table)) for key in table[0]}
    axes = {key: values for key, values in axes.items() if len(values) > 1}
    composed: dict[tuple[str, ...], DictConfig] = {}  # seeds share a composition, which takes most of the time
    planned = []
    for row in table:
        own = tuple(f"{key}={value}" for key, value in row.items() if key != "seed" or not value.isdigit())
        config = composed[own] = composed[own] if own in composed else compose("train", overrides=[*shared, *own])
        check_keys(config, head.hydra)
        if row.get("seed", "").isdigit():
            config.seed = int(row["seed"])
        planned.append(Job({key: row[key] for key in axes}, decided_by(config), runs_dir() / "train" / run_name(config)))
    if not axes:
        raise ValueError(f"nothing is swept by {shlex.join(words)!r}: give sweep=NAME, or an option with several values")
    named = head.sweep or {"name": "sweep", "baseline": []}
    baseline = dict(word.split("=", 1) for word in named["baseline"])
    return SweepPlan(named["name"], axes, {k: v for k, v in baseline.items() if k in axes}, tuple(planned))


def swept_here() -> dict[str, str]:
    """Returns axis -> value of the sweep that this training job belongs to, named or typed by hand; empty outside a sweep."""
    if not HydraConfig.initialized():
        return {}
    hydra = HydraConfig.get()
    words = dict(word.split("=", 1) for word in hydra.overrides.task if "=" in word)
    axes = {*(hydra.sweeper.get("params") or {}), *os.environ.get(TYPED_AXES, "").split()}
    return {key: words[key] for key in words if key in axes}
