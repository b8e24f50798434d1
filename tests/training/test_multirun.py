"""Sweeps: each job in its own directory and with its own ranks, failures named at the end, finished jobs skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hyperdflash.journal import summary

ROOT = Path(__file__).resolve().parents[2]


def sweep(runs: Path, *overrides: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HYPERDFLASH_RUNS": str(runs), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "src.train", "-m", "experiment=stage1", *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture
def sweep_here(run_command, monkeypatch):
    """``sweep`` in this process, into the runs of this test; only the ranks are processes of their own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *overrides: run_command("train", "-m", "experiment=stage1", *overrides)


def test_a_job_of_two_ranks_and_one_that_fails_and_both_again(runs_here, prepared_overrides, tmp_path, sweep_here):
    runs = runs_here(tmp_path / "runs")
    overrides = ["trainer=ddp_cpu", *prepared_overrides, "trainer.max_epochs=1", "kl.alpha=1.5,0.15", "trainer.devices=2"]
    done = sweep_here(*overrides)
    assert done.returncode == 1
    (run,) = (path.parent for path in (runs / "train").glob("*/result.json"))
    assert (run / "ranks" / "1.log").exists() and "-kl0.15-" in run.name
    command = json.loads((run / "run.json").read_text())["starts"][0]["command"].split()
    assert "kl.alpha=0.15" in command and "trainer=ddp_cpu" in command  # the job's own command, not the sweep's
    said = done.stderr[done.stderr.index("2 jobs: 1 finished, 1 not") :]
    assert "kl.alpha must be in [0, 1], got 1.5" in said and "/train/stage1-pre_hc_head-hc_gate-kl1.5-" in said

    again = sweep_here(*[o.replace("1.5,0.15", "0.15") for o in overrides])
    assert again.returncode == 0, again.stderr[-2000:]
    assert "nothing to do" in again.stdout and "1 jobs: 1 finished, 0 not" in again.stderr


def test_a_job_whose_name_cannot_be_resolved_stops_no_other(mini_target, tmp_path, sweep_here, monkeypatch):
    """Vanilla DFlash with more layers than the target has places for taps; the other job's mistake is found after its name."""
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path))
    done = sweep_here(f"target.path={mini_target}", "method=dflash", "drafter.num_layers=6,1", "kl.alpha=1.5")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = done.stderr[done.stderr.index("2 jobs: 0 finished, 2 not") :]
    assert "error: num_taps must be in 1..1 for a target of 4 layers" in said and "kl.alpha must be in [0, 1], got 1.5" in said
    assert "/train/stage1-layers-fc-kl1.5-" in said  # where the one that has a name would have been
    assert not list((tmp_path / "train").glob("*"))


@pytest.mark.slow
def test_four_jobs_of_two_ranks_in_four_directories(runs_here, prepared_overrides, tmp_path):
    runs = runs_here(tmp_path / "runs")
    swept = ["reducer=hc_gate,fc", "kl.alpha=0,0.15", "trainer=ddp_cpu", "trainer.devices=2"]
    overrides = [*swept, *prepared_overrides, "trainer.max_epochs=1"]
    assert sweep(runs, *overrides).returncode == 0
    finished = sorted(path.parent for path in (runs / "train").glob("*/result.json"))
    assert len(finished) == 4 and all((run / "ranks" / "1.log").exists() for run in finished)
    (finished[0] / "result.json").unlink()  # broken behind its last checkpoint
    again = sweep(runs, *overrides)
    assert again.returncode == 0
    assert again.stdout.count("nothing to do") == 3 and again.stdout.count("resuming from") == 1


@pytest.mark.slow
def test_submitit_runs_the_jobs(runs_here, prepared_overrides, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    runs = runs_here(tmp_path / "runs")
    one = [o for o in prepared_overrides if "max_epochs" not in o]
    done = sweep(runs, *one, "trainer.max_epochs=1", "hydra/launcher=submitit_local")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((runs / "train").glob("*/result.json"))) == 1 and list(runs.glob(".submitit/*"))
    assert "1 jobs: 1 finished, 0 not" in done.stderr


@pytest.mark.slow
def test_joblib_runs_the_jobs_side_by_side(runs_here, prepared_overrides, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    runs = runs_here(tmp_path / "runs")
    done = sweep(runs, *prepared_overrides, "trainer.max_epochs=1", "hydra/launcher=parallel", "kl.alpha=1.5,0,0.15")
    assert done.returncode == 1 and "3 jobs: 2 finished, 1 not" in done.stderr, done.stderr[-2000:]
    assert len(list((runs / "train").glob("*/result.json"))) == 2


@pytest.mark.slow
def test_optuna_searches_and_continues(runs_here, prepared_overrides, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    runs = runs_here(tmp_path / "runs")
    search = ["hydra/sweeper=tpe", "hydra.sweeper.n_trials=4", "kl.alpha=choice(0,1.5,0.15)", "trainer.max_epochs=1"]
    done = sweep(runs, *prepared_overrides, *search)
    taus = [json.loads(path.read_text())["val_tau"] for path in (runs / "train").glob("*/result.json")]
    assert "4 jobs:" in done.stderr and "failed: kl.alpha=1.5" in done.stderr and taus, done.stderr[-2000:]
    assert f"best_value: {max(taus)}" in (runs / "optimization_results.yaml").read_text()
    again = sweep(runs, *prepared_overrides, *search)  # proposes the same
    assert again.stderr[again.stderr.index("4 jobs:") :] == done.stderr[done.stderr.index("4 jobs:") :]
    assert "parameters," not in again.stdout and "nothing to do" in again.stdout


@pytest.mark.parametrize(
    ("group", "option", "plugin", "target", "values"),
    [
        ("launcher", "slurm", "hydra_submitit_launcher", "SlurmLauncher", {"tasks_per_node": 1, "max_num_timeout": 20}),
        ("launcher", "parallel", "hydra_joblib_launcher", "JoblibLauncher", {"n_jobs": 2}),
        ("sweeper", "tpe", "hydra_optuna_sweeper", "OptunaSweeper", {"direction": "maximize", "max_failure_rate": 1.0}),
    ],
)
def test_launchers_and_sweepers_compose(group, option, plugin, target, values, monkeypatch):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from hyperdflash.identity import CONF

    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("train", overrides=[f"hydra/{group}={option}"], return_hydra_config=True).hydra[group]
    assert config._target_.endswith(target)
    assert {name: config[name] for name in values} == values


def test_a_job_whose_process_was_lost_is_named(tmp_path):
    record = {"job": 1, "directory": "runs/x", "overrides": ["seed=1"], "status": "lost", "error": None, "seconds": 0}
    (tmp_path / "1.json").write_text(json.dumps(record))
    (tmp_path / "0.json").write_text(json.dumps({**record, "job": 0, "status": "finished"}))
    text = summary(tmp_path)
    assert "2 jobs: 1 finished, 1 not" in text and "lost: seed=1" in text and "runs/x" in text


def test_jobs_that_never_began_are_counted(tmp_path):
    """A sweep of 5 x 3 stopped in its second job."""
    params = {"kl.alpha": "0.1,0.2,0.3", "seed": "0,1,2"}
    record = {"job": 0, "directory": "runs/x", "overrides": [], "params": params, "error": None, "seconds": 0}
    (tmp_path / "0.json").write_text(json.dumps({**record, "status": "finished"}))
    (tmp_path / "1.json").write_text(json.dumps({**record, "job": 1, "status": "stopped", "error": "SIGTERM"}))
    words = ["-m", "sweep=kl", "kl.alpha=0.1,0.2,0.3,0.4,0.5", "hydra.sweeper.params.seed=0,1,2"]
    text = summary(tmp_path, words)
    assert text.startswith("15 jobs: 1 finished, 1 not, 13 never begun\n") and "goes on with the rest" in text
    (tmp_path / "1.json").unlink()
    (tmp_path / "0.json").write_text(json.dumps({**record, "status": "finished", "params": None}))
    assert summary(tmp_path, words) == "1 jobs: 1 finished, 0 not"  # a sweeper that searches
