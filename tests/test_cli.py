"""The commands as a user types them: exit codes, one sentence for a mistake, and the README's own lines."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException
from omegaconf import OmegaConf

from hyperdflash import commands
from hyperdflash.cli import CONSOLE, entry_point, ignore_leftovers
from hyperdflash.training.loggers import make_loggers
from tests.cases.harness import sentences

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """The folder of everything that the commands write."""
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path))
    return tmp_path


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["reducer=nope"], "reducer=nope is no option: reducer takes fc, hc_gate"),
        (["kl.alfa=0.1"], "kl.alfa is no option (did you mean kl.alpha?): kl takes"),
        (["nope=1"], "nope is no option: this command takes blocks, cache"),
        (["seed=1,2"], "add --multirun"),
        (["kl.alpha=much"], "kl.alpha must be in [0, 1], got 'much'"),
        (["conditioning=layers", "conditioning.layer_ids=[0,2]"], "reducer=fc"),
        (["method=mtp"], "method=mtp_finetuned fine-tunes it"),
        (["method=mtp_finetuned", "drafter=tiny"], "give conditioning=NAME reducer=NAME"),
        (["experiment=stage2"], "run `python -m src.train experiment=stage1"),
    ],
)
def test_a_mistake_exits_with_one_sentence(overrides, sentence, run_command, runs, mini_target):
    done = run_command("train", f"target.path={mini_target}", *overrides)
    assert done.returncode != 0
    assert sentence in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list((runs / "train").glob("*"))


@pytest.mark.parametrize("name", [name for group in commands.COMMANDS.values() for name in group if name != "table1"])
def test_hydra_full_error_gives_the_traceback_in_every_command(name, runs, monkeypatch, run_command):
    (runs / "file").touch()
    words = [str(runs / "file" / "folder")] if name == "fetch_benchmarks" else ["+foo=1"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = run_command(name, *words)
    assert done.returncode == 1 and "Traceback (most recent call last)" in done.stderr, done.stderr
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    done = run_command(name, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr and len(sentences(done.stderr)) == 1, done.stderr


def test_training_from_the_shell_and_again(runs, mini_overrides, monkeypatch, run_command):
    monkeypatch.setenv("MPLCONFIGDIR", str(runs / "matplotlib"))  # no font cache yet
    overrides = [*mini_overrides, "logger=default", "trainer.max_epochs=1"]
    first = run("src.train", "experiment=stage1", *overrides)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "Loading weights" not in first.stderr and "font" not in first.stdout + first.stderr
    (result,) = (runs / "train").glob("*/result.json")
    own = {"checkpoints", "config.yaml", "corpus.json", "metrics.csv", "result.json", "run.json", "validation.json", "wandb"}
    assert {path.name for path in result.parent.iterdir()} == own and list(result.parent.glob("wandb/offline-run-*"))
    again = run_command("train", "experiment=stage1", *overrides)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    second = run_command("train", "experiment=stage2", "reducer=hc_gate", "kl.alpha=0.15", *overrides)
    assert second.returncode == 0, second.stderr[-2000:]
    assert str(result.parent) in second.stdout


def test_multirun_gives_every_job_its_own_directory(runs, mini_overrides, run_command):
    overrides = [*mini_overrides, "trainer.max_epochs=1", "experiment=stage1", "reducer=hc_gate,fc"]
    done = run_command("train", "-m", *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    names = sorted(path.parent.name for path in (runs / "train").glob("*/result.json"))
    assert len(names) == 2 and "-fc-" in names[0] and "-hc_gate-" in names[1]


def test_capture_alone_then_a_training_that_loads_no_target(runs, mini_overrides, run_command):
    captured = run_command("capture", "experiment=stage1", *mini_overrides)
    assert captured.returncode == 0 and "loading the target" in captured.stdout
    assert not list((runs / "train").glob("*"))
    trained = run_command("train", "experiment=stage1", *mini_overrides, "trainer.max_epochs=1")
    assert trained.returncode == 0 and "loading the target" not in trained.stdout


def test_a_message_names_the_command_that_the_user_typed(runs, run_command, monkeypatch):
    monkeypatch.setenv(CONSOLE, "")
    del os.environ[CONSOLE]  # the console script sets it, and the test's end removes it
    failed = run_command(commands.main, "train", "experiment=stage2")
    assert failed.returncode == 1 and "run `hyperdflash train experiment=stage1" in failed.stderr, failed.stderr


SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"RANK": "1"}, False),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, False),
        ({**SRUN, "SLURM_TASK_PID": "1234567890"}, False),  # of a step that has ended
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_TASK_PID": str(os.getppid())}, False),  # a batch script without srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, True),  # one task: nothing to ignore
        ({**SRUN, "SLURM_TASK_PID": str(os.getpid())}, True),
        ({**SRUN, "SLURM_TASK_PID": str(os.getppid())}, True),  # a task that started a shell
    ],
)
def test_variables_of_a_launcher_count_where_it_started_this_process(given, kept, monkeypatch, capsys):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    ignore_leftovers()
    ranks = [name for name in given if name not in ("SLURM_STEP_ID", "SLURM_TASK_PID")]
    assert [name in os.environ for name in ranks] == [kept] * len(ranks)
    assert ("neither torchrun nor srun started" in capsys.readouterr().out) is not kept


def test_ranks_of_torchrun_keep_their_variables():
    program = "import os; from hyperdflash.cli import ignore_leftovers; ignore_leftovers(); print(os.environ['RANK'])"
    agent = f"exec -a torchrun bash -c '{sys.executable} -c \"$PROGRAM\"; true'"
    environment = {**os.environ, "RANK": "1", "TORCHELASTIC_RUN_ID": "x", "PROGRAM": program}
    done = subprocess.run(["bash", "-c", agent], env=environment, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(("words", "shown"), [((), ["67,108,864", "65,541"]), (("--help",), ["Prints the paper's Table 1"])])
def test_table_1_is_printed_and_explained(words, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table1", *words])
    with suppress(SystemExit):  # of --help
        commands.table1()
    out = capsys.readouterr().out
    assert all(text in out for text in shown) and ("65,541" in out) == (not words)


@pytest.mark.parametrize(
    ("module", "extra"), [("wandb", "wandb"), ("matplotlib", "figures"), ("tensorboard", "tensorboard"), ("datasets", "hub")]
)
def test_a_missing_library_is_one_sentence_that_names_its_extra(module, extra, monkeypatch):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert any(need.split(">")[0] == module for need in project["optional-dependencies"][extra])
    monkeypatch.setitem(sys.modules, module, None)  # what an import of an absent module meets
    job = entry_point("train")(lambda config: importlib.import_module(module))
    with pytest.raises(CompactHydraException) as caught:
        job(OmegaConf.create())
    assert str(caught.value) == f"error: {module} is not installed: run `pip install 'hyperdflash[{extra}]'`"


def test_a_run_without_wandb_needs_no_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = OmegaConf.create({"csv": True, "tensorboard": False, "wandb": "off", "artifacts": False})
    assert len(make_loggers(config, tmp_path, "run")) == 1
    config.update({"wandb": "offline", "project": "p"})
    with pytest.raises(ModuleNotFoundError) as caught:
        make_loggers(config, tmp_path, "run")
    assert caught.value.name == "wandb"
