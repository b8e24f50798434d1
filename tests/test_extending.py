"""The parts that docs/extending.md shows are real: they train, are swept and reported, with nothing but what it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from hyperdflash.evaluation.report_job import make_report
from hyperdflash.identity import run_name
from hyperdflash.launch.sweep_plan import plan_sweep
from hyperdflash.training.job import train
from tests.test_documented_commands import ROOT

SEARCHPATH = "hydra.searchpath=[file://my_conf]"


def run_here(folder: Path, module: str, *words: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HYPERDFLASH_RUNS": str(folder),
    }
    command = [sys.executable, "-m", module, SEARCHPATH, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_reducer_trains(shown_files, compose_config, mini_overrides):
    words = ["experiment=stage1", *mini_overrides, "reducer=path_weights", "reducer.first=0.1"]
    config = compose_config("train", [SEARCHPATH, *words])
    assert run_name(config).startswith("stage1-pre_hc_head-path_weights-")
    train(config)
    weight = torch.load(next(shown_files.glob("train/*/checkpoints/step*.ckpt")), weights_only=True)["state_dict"]
    assert weight["drafter.reducer.weight"].shape == (4,) and (weight["drafter.reducer.weight"] != 0.1).all()


def test_an_evaluation_names_a_methods_training_with_its_own_options(shown_files):
    told = run_here(shown_files, "src.evaluate", "methods=[projected]")
    wanted = f"`python -m src.train '{SEARCHPATH}' method=projected experiment=stage2` first"
    assert told.returncode == 1 and "method 'projected' has no finished run in" in told.stderr and wanted in told.stderr


def test_the_method_is_trained_and_found_by_its_name(shown_files, compose_config, mini_overrides):
    config = compose_config("train", [SEARCHPATH, *mini_overrides, "trainer.max_epochs=1", "method=projected"])
    assert "-pre_hc_head-fc-kl0.1-" in run_name(config)
    train(config)
    few = ["benchmarks.per_domain=1", "benchmarks.max_new_tokens=8", "temperature=[0]", "num_resamples=20", "threads=1"]
    words = ["methods=[projected]", 'training="experiment=stage1"', mini_overrides[0], *few, f"out={shown_files}/out"]
    told = run_here(shown_files, "src.evaluate", *words)
    assert told.returncode == 0, told.stderr
    assert json.loads((shown_files / "out/metrics.json").read_text())["runs"] == {
        "HyperDFlash, projected (6)": run_name(config)
    }


def test_the_command_that_an_error_tells_finds_the_options(shown_files, mini_target):
    target = f"target.path={mini_target}"
    told = run_here(shown_files, "src.train", "experiment=stage2", "reducer=path_weights", target)
    wanted = f"`python -m src.train experiment=stage1 '{SEARCHPATH}' reducer=path_weights {target}` first"
    assert told.returncode == 1 and wanted in told.stderr


def test_the_source_is_swept_and_reported(shown_files, compose_config, mini_overrides):
    words = [SEARCHPATH, *mini_overrides, "reducer=fc"]
    assert len(plan_sweep([*words, "sweep=my_sources"]).jobs) == 6
    for source in ("pre_hc_head", "final_and_layer"):
        train(compose_config("train", [*words, f"conditioning={source}", "seed=0"]))
    report, folder = make_report([*words, "sweep=my_sources", "seed=0", "num_resamples=50"])
    assert [cell.choices["conditioning"] for cell in report.cells] == ["pre_hc_head", "final_and_layer"]
    assert "| final_and_layer |" in (folder / "sweep.md").read_text()
