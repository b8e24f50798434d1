"""What a run shows and logs: one progress bar, metrics.csv, and W&B, which is offline unless somebody is logged in."""

import csv
import io
import netrc
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from hyperdflash.files import whole_file
from hyperdflash.identity import source_names
from hyperdflash.launch.sweep_plan import swept_here

WANDB_MODES = ("auto", "online", "offline", "off")
# Options that a sweep may change, as flat keys of the W&B configuration: panels read no nested ones.
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


class StepBar(TQDMProgressBar):
    """Lightning's bar over the run's steps instead of an epoch's batches, so that a resumed run's ETA is right; shows loss, tau
    of the last validation and learning rate."""

    def init_train_tqdm(self) -> tqdm:
        steps, done = int(self.trainer.estimated_stepping_batches), self.trainer.global_step
        looks = {"desc": "train", "unit": "step", "dynamic_ncols": True, "disable": self.is_disabled}
        return tqdm(total=steps, initial=done, **looks)

    def init_validation_tqdm(self) -> tqdm:
        return tqdm(disable=True)

    def on_train_epoch_start(self, trainer: L.Trainer, *_) -> None:
        """Does nothing: the run is one epoch, and `on_train_start` has made the bar."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:  # reading a metric waits for the device
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
        self.train_progress_bar.update(trainer.global_step - self.train_progress_bar.n)

    def on_exception(self, *_) -> None:
        with suppress(TypeError):  # there is no bar yet
            self.train_progress_bar.close()

    def get_metrics(self, trainer: L.Trainer, pl_module) -> dict[str, str]:
        formats = {"train/loss": ".3f", "val/tau": ".3f", "train/lr": ".2e"}
        metrics = {name: float(trainer.callback_metrics[name]) for name in formats if name in trainer.callback_metrics}
        return {name.partition("/")[2]: format(value, formats[name]) for name, value in metrics.items()}


class MetricsCSV(Logger):
    """Writes one row of ``run``/metrics.csv per call, before the call returns; a new metric rewrites the file with its column.

    Columns are ``step`` (the number of steps before, so the first is 0), ``epoch``, then metrics by first appearance.
    """

    name = version = ""

    def __init__(self, run: Path):
        super().__init__()
        self.path = run / "metrics.csv"
        self._columns: list[str] | None = None

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Does nothing: the run's configuration has its own file."""

    @rank_zero_only
    def restart_at(self, step: int) -> None:
        """Drops incomplete rows, and those that a run that continues from ``step`` writes again."""
        columns, rows = self._read()
        self._rewrite(columns, [row for row in rows if int(row["step"]) < step])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {name: int(value) if name == "epoch" else float(value) for name, value in metrics.items()} | {"step": step}
        if self._columns is None:
            self._columns = self._read()[0]
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._rewrite(self._columns, self._read()[1])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """Returns the columns and the complete rows on disk."""
        text = self.path.read_text() if self.path.exists() else ""
        reader = csv.DictReader([line for line in text.splitlines(keepends=True) if line.endswith("\n")])
        return list(reader.fieldnames or ["step", "epoch"]), list(reader)

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        with whole_file(self.path, sync=True) as file:
            file.write(text.getvalue().encode())


class StepWandb(WandbLogger):
    """Logs one W&B row per optimizer step, under the step's number, so that W&B drops what a resumed run logs again."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)


def logged_in() -> bool:
    """Returns whether a W&B key is in the environment or in .netrc; sends nothing over the network."""
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def make_loggers(config: DictConfig, run: Path, name: str, **wandb_init) -> list[Logger]:
    """Returns the loggers of a run. ``csv`` writes run/metrics.csv; ``wandb`` is one of WANDB_MODES, with ``wandb_init`` for
    wandb.init; a resumed run continues the W&B run whose id is in run/wandb_id."""
    loggers: list[Logger] = [MetricsCSV(run)] if config.csv else []
    mode = os.environ.get("WANDB_MODE")
    if config.wandb != "off" and mode != "disabled":
        import wandb  # an extra: Lightning's own error does not name the module

        offline = mode == "offline" or config.wandb == "offline" or (config.wandb == "auto" and not logged_in())
        where = {"project": config.project, "save_dir": run, "offline": offline, "id": _wandb_id(run)}
        loggers.append(StepWandb(name=name, settings=wandb.Settings(silent=True), **where, **wandb_init))
    return loggers


@rank_zero_only
def _wandb_id(run: Path) -> str:
    path = run / "wandb_id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()


def wandb_place(config: DictConfig) -> dict:
    """Returns W&B's labels of a training: ``group`` is its sweep, ``job_type`` its choice in the sweep without the seed (the
    stage outside a sweep), ``tags`` are stage, target, method and sweep."""
    stage = f"stage{config.stage}"
    choice = " ".join(f"{axis}={value}" for axis, value in swept_here().items() if axis != "seed")
    sweep = config.sweep.name if config.sweep else None
    tags = [stage, Path(config.target.path).name, method_name(config), *([f"sweep:{sweep}"] if sweep else [])]
    return {"group": sweep or stage, "job_type": (choice or stage)[:64], "tags": [tag[:64] for tag in tags]}


def wandb_axes(config: DictConfig) -> dict[str, object]:
    """Returns a training's ``method`` and its values of WANDB_AXES, without the options that it does not have."""
    values = {key: OmegaConf.select(config, option) for key, option in WANDB_AXES.items()}
    return {"method": method_name(config), **{key: value for key, value in values.items() if value is not None}}


def method_name(config: DictConfig) -> str:
    """Returns pre_hc_head-hc_gate, layers_flat-fc, pre_hc_head-hc_gate_random, or the name of a drafter that reads neither."""
    source, *reducer = source_names(config)
    if not reducer:
        return source
    source += f"_{config.conditioning.paths}" if "paths" in config.conditioning else ""
    return f"{source}-{reducer[0]}" + ("_random" if config.reducer.get("init") == "random" else "")
