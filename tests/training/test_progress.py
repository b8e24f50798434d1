"""What a user sees of a training, and what a run keeps of each of its starts."""

from __future__ import annotations

import csv
import json
import re
import sys

import pytest
from hydra.utils import instantiate

from hyperdflash import record
from hyperdflash.identity import train_run_dir
from hyperdflash.training.curves import draw_curves
from hyperdflash.training.job import train
from hyperdflash.training.loggers import make_loggers
from hyperdflash.training.module import DraftingModule


def test_a_resumed_run_shows_its_loss_and_keeps_its_first_start(
    runs_here, prepared_overrides, compose_config, tmp_path, monkeypatch, capfd
):
    """Stopped in step 5 and resumed at 4 by other code: the bar reads the last row of metrics.csv."""
    runs_here(tmp_path / "runs")
    config = compose_config("train", [*prepared_overrides, "trainer.max_epochs=1", "logger=default"])
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="gone"):
        whole = DraftingModule.training_step

        def dies(module, batch, batch_index):
            if module.global_step == 5:
                raise RuntimeError("gone")
            return whole(module, batch, batch_index)

        patch.setattr(DraftingModule, "training_step", dies)
        patch.setattr(record, "training_code", lambda source: "first-code")
        train(config)
    capfd.readouterr()
    monkeypatch.setattr(record, "training_code", lambda source: "other-code")
    train(config)

    run, shown = train_run_dir(config), capfd.readouterr()
    steps = list(csv.DictReader((run / "metrics.csv").open()))
    loss = [float(row["train/loss"]) for row in steps if row["train/loss"]][-1]
    tau = [float(row["val/tau"]) for row in steps if row["val/tau"]][-1]
    optim, rates = instantiate(config.optim), [float(row["train/lr"]) for row in steps if row["train/lr"]]
    assert rates == pytest.approx([optim.lr * optim.factor(step, 6) for step in range(6)])
    last = re.split(r"[\r\n]+", shown.err[: shown.err.rindex("tau=") + 60])
    (last,) = [line for line in last if "tau=" in line][-1:]
    assert last.startswith("train: 100%") and " 6/6 " in last and "step" in last, last
    assert f"loss={loss:.3f}" in last and f"tau={tau:.3f}" in last and re.search(r"lr=\d\.\d\de[+-]\d\d", last), last

    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["training_code"] for start in starts] == ["first-code", "other-code"]
    assert starts[0]["time"] <= starts[1]["time"] and all(start["packages"]["torch"] for start in starts)

    told = [line for line in (shown.out + shown.err).splitlines() if "wandb" in line.lower()]
    assert len(told) == 1 and told[0].startswith("W&B: offline, to upload: wandb sync"), told


def test_a_start_without_an_extra_is_recorded(monkeypatch):
    version = record.importlib.metadata.version

    def without_wandb(name: str) -> str:
        if name == "wandb":
            raise record.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(record.importlib.metadata, "version", without_wandb)
    packages = record.environment_record("python -m src.train")["packages"]
    assert packages["wandb"] is None and packages["torch"] == version("torch")


def test_a_run_ends_with_its_curves_and_logs_every_term(runs_here, prepared_overrides, compose_config, tmp_path):
    """D-PACE reads no teacher, and its mean is the whole loss at weight 1."""
    runs_here(tmp_path / "runs")
    words = ["objective=dpace", "trainer.max_epochs=1", "logger.curves=true"]
    config = compose_config("train", [*prepared_overrides, *words])
    train(config)
    run = train_run_dir(config)
    steps = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["train/loss"]]
    assert [float(row["train/dpace"]) for row in steps] == pytest.approx([float(row["train/loss"]) for row in steps])
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_without_matplotlib_are_one_line(tmp_path, monkeypatch, capsys):
    for name in ("hyperdflash.report.figures", "matplotlib.axes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw_curves(tmp_path)
    assert "hyperdflash[figures]" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_training_that_never_began_leaves_no_folder(runs_here, prepared_overrides, compose_config, tmp_path):
    runs = runs_here(tmp_path / "runs")
    config = compose_config("train", [*prepared_overrides, "corpus.max_length=3"])
    with pytest.raises(ValueError, match="supervised"):
        train(config)
    assert list((runs / "train").iterdir()) == []


def test_tensorboard_gets_what_the_csv_gets(compose_config, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs .[tensorboard]")
    _, logger = make_loggers(compose_config("train", ["logger.tensorboard=true", "logger.wandb=off"]).logger, tmp_path, "run")
    logger.log_metrics({"train/loss": 1.5, "epoch": 0}, step=3)
    logger.save()
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(one.step, one.value) for one in found.Scalars("train/loss")] == [(3, 1.5)]
