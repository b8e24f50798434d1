"""Shows and logs a run: one progress bar, metrics.csv, and W&B, which is offline unless somebody is logged in."""

import csv
import io
import netrc
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from hyperdflash.cli import given_overrides
from hyperdflash.files import whole_file, write_text
from hyperdflash.identity import DECIDING, NOT_DECIDING, class_name, source_names
from hyperdflash.launch.sweep_plan import swept_here
from hyperdflash.stable_hash import content_hash

REACH_S = 5.0  # time in which W&B's server must answer
# Options that a sweep often changes; conf/dashboard.yaml draws a bar of tau for each.
AXES = (
    *("conditioning", "reducer", "head", "drafter.num_layers", "blocks.num_anchors", "loss.gamma", "kl.alpha", "kl.positions"),
    *("kl.temperature", "kl.teacher", "target.path", "seed"),
)
# step metric of W&B -> the metrics that it is the x axis of
STEP_METRICS = {"trainer/global_step": ("train/*", "val/*"), "position": ("acceptance/*",)}


class StepBar(TQDMProgressBar):
    """Lightning's bar over the run's steps, so that a resumed run's ETA is right; shows loss, last tau and learning rate."""

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
    Columns are ``step`` (the number of steps before, so the first is 0), ``epoch``, then metrics by first appearance."""

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
        columns = list(reader.fieldnames or ["step", "epoch"])
        if "step" not in columns:
            raise ValueError(f"{self.path} is no table of this run's metrics: remove it, and it begins with the next step")
        return columns, list(reader)

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
        with harmless():
            self.experiment.log({**metrics, "trainer/global_step": step}, step=step)


@contextmanager
def harmless(then: str = "the training goes on without") -> Iterator[None]:
    """Around what talks to W&B: its fault costs a part of W&B's log, never the training; each fault is printed once."""
    try:
        yield
    except Exception as error:
        _told(f"W&B: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; {then}")


@cache
def _told(line: str) -> None:
    print(line, flush=True)


def logged_in() -> bool:
    """Returns whether a W&B key is in the environment or in .netrc; sends nothing over the network."""
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def wandb_mode(option: str) -> str:
    """Returns online, offline or off, from ``logger.wandb`` and the environment in any spelling. Leaves the environment in
    W&B's own spelling, since W&B refuses every other."""
    mode = os.environ.get("WANDB_MODE", "").strip().lower()
    if os.environ.pop("WANDB_DISABLED", "").strip().lower() not in ("", "0", "false", "no", "off", "n", "f", "none"):
        mode = "disabled"
    known = {"": "", "run": "online", "shared": "online", "dryrun": "offline", "off": "disabled", "false": "disabled"}
    mode = known.get(mode, mode)
    if mode not in ("", "online", "offline", "disabled"):
        _told(f"WANDB_MODE={mode} is not online, offline or disabled: W&B logs offline")
        mode = "offline"
    os.environ.pop("WANDB_MODE", None)
    if mode:
        os.environ["WANDB_MODE"] = mode
    if "off" in (option, mode) or mode == "disabled":
        return "off"
    if "offline" in (option, mode):
        return "offline"
    return "online" if option == "online" or logged_in() else "offline"


@rank_zero_only
def check_wandb(logger: DictConfig) -> None:
    """Sets ``logger.wandb`` to offline, with one line, where the key in the environment is malformed or W&B's server cannot be
    reached; W&B itself finds out behind the states, after two minutes."""
    if wandb_mode(logger.wandb) == "online" and logged_in():
        import wandb

        online, logger.wandb = logger.wandb, "offline"
        with harmless("this run logs offline"):
            settings = wandb.setup(wandb.Settings(silent=True)).settings
            if "WANDB_API_KEY" in os.environ:
                wandb.login(verify=False)  # checks the key's form
            with suppress(HTTPError):  # the server answers
                urlopen(settings.base_url, timeout=REACH_S).close()
            logger.wandb = online


def make_loggers(config: DictConfig, run: Path, name: str, **labels) -> list[Logger]:
    """Returns the loggers of a run. ``csv`` writes run/metrics.csv, ``tensorboard`` a folder of that name; ``wandb`` is one of
    WANDB_MODES, with ``labels`` for wandb.init; a resumed run continues the W&B run whose id is in run/wandb/id."""
    loggers: list[Logger] = [MetricsCSV(run)] if config.csv else []
    if config.tensorboard:
        import tensorboard  # noqa: F401, an extra: Lightning's own error does not name the module

        loggers.append(TensorBoardLogger(run, name="", version="tensorboard"))
    mode = wandb_mode(config.wandb)
    if mode != "off" and (started := _start_wandb(mode, run, name, project=config.project, **labels)):
        loggers.append(started)
    return loggers


@rank_zero_only
def _start_wandb(mode: str, run: Path, name: str, **labels) -> StepWandb | None:
    """Starts the W&B run of rank 0; where W&B does not start online, offline; None where it does not start at all."""
    import wandb

    identity = run / "wandb" / "id"
    if not identity.exists():
        write_text(identity, secrets.token_hex(4))
    own = {"dir": run, "id": identity.read_text().strip(), "resume": "allow", "name": within(name, 128), **labels}
    for attempt in dict.fromkeys([mode, "offline"]):
        with harmless():
            started = wandb.init(mode=attempt, settings=wandb.Settings(silent=True), **own)
            for step, metrics in STEP_METRICS.items():
                started.define_metric(step)
                for metric in metrics:
                    started.define_metric(metric, step_metric=step)
            return StepWandb(experiment=started, offline=attempt == "offline", save_dir=run)
    return None


def wandb_labels(config: DictConfig) -> dict:
    """Returns W&B's labels of a training, within W&B's limits: ``group`` is its sweep's name, or its swept axes, or its stage;
    ``job_type`` its choice in the sweep without the seed, or its stage; ``tags`` are stage, target, method and sweep."""
    stage, swept = f"stage{config.stage}", swept_here()
    sweep = config.sweep.name if config.sweep else " ".join(swept)
    choice = " ".join(f"{axis}={value}" for axis, value in swept.items() if axis != "seed")
    tags = [stage, Path(config.target.path).name, method_name(config), f"sweep:{sweep}" if sweep else ""]
    return {
        "group": within(sweep or stage, 128),
        "job_type": within(choice or stage, 64),
        "tags": [within(tag, 64) for tag in tags if tag],
    }


def within(text: str, limit: int) -> str:
    """Returns ``text`` cut to ``limit`` characters; a digest at the end keeps different texts different."""
    return text if len(text) <= limit else f"{text[: limit - 9]}-{content_hash(text)[:8]}"


def wandb_axes(config: DictConfig) -> dict[str, object]:
    """Returns a training's choices as flat keys of the W&B configuration, since panels read no nested ones. ``axes`` is the
    label that runs are grouped by: the swept axes, then every other word of the command that decides the result, without the
    seed, so that no two settings share a label. ``axis_<option>`` are the options AXES and the swept ones."""
    swept, words, label = swept_here(), dict(word.split("=", 1) for word in given_overrides() if "=" in word), {}
    for key in sorted(words, key=lambda key: (key not in swept, key)):
        group, _, option = key.lstrip("+").partition(".")
        decides = group in ("experiment", "method", *DECIDING) or key == "cache.dtype"
        if decides and group != "seed" and option not in NOT_DECIDING.get(group, ()):
            label[key] = words[key]
    values = {option: OmegaConf.select(config, option) for option in (*AXES, *swept)}
    values |= {option: swept.get(option) or class_name(group) for option, group in values.items() if OmegaConf.is_config(group)}
    flat = {axis_key(option): value for option, value in values.items() if value is not None}
    axes = " ".join(f"{key}={value}" for key, value in label.items()) or f"stage{config.stage}"
    return {"axes": axes, "method": method_name(config), **flat}


def axis_key(option: str) -> str:
    """Returns the key of an option in the W&B configuration: kl.alpha -> axis_kl_alpha."""
    return "axis_" + re.sub(r"\W", "_", option)


def method_name(config: DictConfig) -> str:
    """Returns pre_hc_head-hc_gate, layers_flat-fc, pre_hc_head-hc_gate_random, or the name of a drafter that reads neither."""
    source, *reducer = source_names(config)
    if not reducer:
        return source
    source += f"_{config.conditioning.paths}" if "paths" in config.conditioning else ""
    return f"{source}-{reducer[0]}" + ("_random" if config.reducer.get("init") == "random" else "")
