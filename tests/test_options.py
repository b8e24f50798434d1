"""Files that somebody else may have written are data: what they name is refused before it is called."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from hyperdflash import options
from hyperdflash.answers.answer_file import AnswerFile
from hyperdflash.engines.vllm import read_finished
from hyperdflash.evaluation.methods import method_of_run
from hyperdflash.identity import RECIPE
from hyperdflash.options import check_values
from hyperdflash.states.dataset import Index, open_dataset
from hyperdflash.states.manifest import FORMAT_VERSION, read_checked
from hyperdflash.states.shard_file import ShardFile
from hyperdflash.training.checkpoints import AtomicCheckpoints
from hyperdflash.training.run_index import load_drafter_weights
from tests.test_repository import ROOT

FINISHED = {"decided_by": {"recipe": RECIPE}, "best_checkpoint": "best.ckpt", "target": "x", "init_from": None}


@pytest.fixture
def made(tmp_path) -> Path:
    """The folder that a planted callable makes."""
    return tmp_path / "made"


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run's folder with its record alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(json.dumps(FINISHED))
    return tmp_path / "run"


@pytest.fixture
def run(finished, compose_config, mini_overrides) -> Path:
    """... and with its configuration."""
    OmegaConf.save(compose_config("train", mini_overrides), finished / "config.yaml", resolve=True)
    return finished


def plant(run: Path, place: str, target: str, made: Path) -> None:
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, place, {"_target_": target, "path": str(made), "name": str(made)}, force_add=True, merge=False)
    OmegaConf.save(config, run / "config.yaml")


def test_a_runs_own_configuration_is_read(run, mini_target):
    assert method_of_run(run, mini_target)[0].parts.drafter.num_slots == 6


@pytest.mark.parametrize("place", ["blocks", "drafter", "head", "reducer.init"])
def test_a_callable_of_a_runs_configuration_is_refused_by_name(place, run, made, mini_target):
    elsewhere = [] if "." in place else ["hyperdflash.targets.load.load_target"]  # a part, but of another group
    for target in ("os.mkdir", "hyperdflash.files.os.mkdir", "hyperdflash.files.write_text", *elsewhere):
        plant(run, place, target, made)
        with pytest.raises(ValueError, match=rf"_target_={target} is no part that an option file names"):
            method_of_run(run, mini_target)
        assert not made.exists()


def test_what_only_training_reads_is_not_called_where_a_run_is_used(run, made, mini_target):
    for place in ("cache", "objective.terms.kl", "objective.terms.more"):
        plant(run, place, "os.mkdir", made)
        with pytest.raises(ValueError, match=r"_target_=os\.mkdir"):
            options.instantiate(OmegaConf.load(run / "config.yaml")[place.partition(".")[0]])
    assert method_of_run(run, mini_target) and not made.exists()


@pytest.mark.parametrize("command", ["parity", "evaluate", "generate"])
def test_commands_that_use_a_run_refuse_it(command, run, made, mini_target, run_command):
    plant(run, "blocks", "os.mkdir", made)
    words = [f"target.path={mini_target}", f"run={run}", *(["prompt=Hi"] if command == "generate" else [])]
    done = run_command(command, *words)
    assert done.returncode == 1 and "_target_=os.mkdir" in done.stderr and "Traceback" not in done.stderr
    assert not made.exists()


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def directory_of(path: Path) -> Path:
    path.rename(path.with_name("dataset.json"))
    return path.parent


READERS = {
    "checkpoint of a drafter": lambda path: load_drafter_weights(torch.nn.Linear(1, 1), path.parent, "x"),
    "checkpoint of a resumed run": lambda path: AtomicCheckpoints().load_checkpoint(path, weights_only=True),
    "states": lambda path: ShardFile(path, {}),
    "index of a dataset": lambda path: Index(path, {}),
    "record of a dataset": lambda path: open_dataset(directory_of(path)),
    "manifest of a cache": lambda path: read_checked(path, FORMAT_VERSION, "cache", "capture again"),
    "file of an engine": lambda path: read_finished(path, 0.1),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("how", ["torch", "pickle", "json"])
def test_a_callable_in_a_file_is_refused(kind, how, finished, made):
    path, planted = finished / "best.ckpt", {"run": {"target": "x"}, "state_dict": Planted(made)}
    if how == "torch":
        torch.save(planted, path)
    else:
        text = json.dumps({"_target_": "os.mkdir", "path": str(made)})
        path.write_bytes(pickle.dumps(planted) if how == "pickle" else text.encode())
    with pytest.raises((ValueError, RuntimeError, pickle.UnpicklingError)):
        READERS[kind](path)
    assert not made.exists()


def test_a_callable_among_answers_is_no_answer(tmp_path, made):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"_target_": "os.mkdir", "path": str(made), "id": "a", "domain": "chat"}) + "\n")
    assert not AnswerFile(path).documents and not made.exists()


def test_a_part_of_ones_own_is_called_once_its_folder_is_given(tmp_path, made, monkeypatch):
    (tmp_path / "my.yaml").write_text("_target_: os.mkdir\n")
    with pytest.raises(ValueError, match=r"hydra\.searchpath"):
        options.instantiate({"_target_": "os.mkdir", "path": str(made)})
    monkeypatch.setattr(options, "accepted", set(options.accepted))
    options.accept(tmp_path)
    options.instantiate({"_target_": "os.mkdir", "path": str(made)})
    assert made.exists()


def test_every_target_passes_through_the_one_door():
    doors = ("hydra.utils", "hydra import utils", "_target_)", "get_class", "get_object", "get_method", "weights_only=False")
    named = {
        str(path.relative_to(ROOT)): door
        for folder in ("src", "tiny_target", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for door in doors
        if door in path.read_text()
    }
    # identity.py asks the class for one attribute, after `check_targets`
    assert named.keys() == {"src/hyperdflash/options.py", "src/hyperdflash/identity.py"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("kl.alpha=1.5", "kl.alpha must be in [0, 1], got 1.5"),
        ("drafter.num_layers=0", "drafter.num_layers must be a positive integer, got 0"),
        ("reducer.init=other", "reducer.init must be inherit or random, got 'other'"),
        ("optim.lr=much", "optim.lr must be a number above 0, got 'much'"),
        ("kl.teacher=nobody", "kl.teacher must be"),
    ],
)
def test_wrong_values_are_found_without_importing_the_parts(words, sentence, compose_config):
    config = compose_config("train", [words])
    with pytest.raises(ValueError) as caught:
        check_values(config)
    assert str(caught.value).startswith(sentence)


def test_right_values_pass(compose_config):
    for words in ([], ["method=best"], ["method=dflash"], ["objective=dspark", "head=markov_confidence"], ["cache=stream"]):
        check_values(compose_config("train", words))


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("train", "kl.alpha=1.5", "kl.alpha must be in [0, 1]"),
        ("train", "trainer.max_steps=-3", "trainer.max_steps must be a positive integer, got -3"),
        ("train", "corpus.max_length=0", "corpus.max_length must be a positive integer, got 0"),
        ("train", "logger.wandb=on", "logger.wandb must be auto or online or offline or off"),
        ("generate", "prompt=Hi temperature=-1", "temperature must be 0 (greedy) or positive, got -1"),
        ("export", "run=x to=vllm", "there is no out"),
        ("export", "run=x to=vllm out=x", "to must be dflash or speculators or transformers, got 'vllm'"),
        ("table1", "m=4", "unrecognized arguments: m=4"),
    ],
)
def test_a_wrong_value_ends_the_command_before_torch_is_imported(command, words, sentence, tmp_path):
    code = (
        "import sys\nfrom hyperdflash import commands\n"
        f"try:\n    commands.{command}()\nfinally:\n    print('torch' in sys.modules)"
    )
    environment = {**os.environ, "HYPERDFLASH_RUNS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode and sentence in done.stderr and done.stdout == "False\n", done
