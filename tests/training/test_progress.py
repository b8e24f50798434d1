"""What a user sees of a training, and what a run keeps of each of its starts."""

from __future__ import annotations

import csv
import json
import re

import pytest
from hydra.utils import instantiate

from hyperdflash import record
from hyperdflash.identity import train_run_dir
from hyperdflash.training.job import train
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
