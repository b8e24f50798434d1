"""A training opens its dataset and knows no text; a missing one is prepared once; its name follows what decides it."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from hyperdflash.identity import dataset_name, run_name, train_run_dir
from hyperdflash.preparing.dataset import capture_states
from hyperdflash.states.dataset import open_dataset
from hyperdflash.training.job import train

ROOT = Path(__file__).resolve().parents[2]


def curve(run: Path) -> list[dict]:
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if "per_s" not in k and "time" not in k} for row in csv.DictReader(file)]


def train_without_text(config, path: Path) -> subprocess.CompletedProcess:
    OmegaConf.save(config, path, resolve=True)
    command = [sys.executable, "-m", "tests.training.without_text", str(path)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def heads_alone(target: Path, place: Path) -> None:
    """Config and the weights of the heads; no tokenizer, no layer."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from hyperdflash.targets.deepseek_v4.checkpoint import Checkpoint
    from hyperdflash.targets.deepseek_v4.official import head_names

    names = head_names(Checkpoint(target)).values()
    place.mkdir()
    shutil.copy(target / "config.json", place)
    with safe_open(target / "model.safetensors", framework="pt") as file:
        save_file({name: file.get_tensor(name) for name in names}, place / "model.safetensors", metadata={"format": "pt"})


def test_a_training_needs_no_text_no_answers_and_of_the_target_only_its_heads(
    prepared_overrides, rows_file, mini_target, compose_config, tmp_path, monkeypatch
):
    rows, target, runs = tmp_path / "rows.jsonl", tmp_path / "target", tmp_path / "runs"
    shutil.copy(rows_file, rows)
    shutil.copytree(mini_target, target)
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(runs))
    options = [o.replace(str(rows_file), str(rows)).replace(str(mini_target), str(target)) for o in prepared_overrides]
    config = compose_config("train", [*options, "corpus.responses=target", "trainer.max_epochs=1"])
    capture_states(config)
    shutil.copytree(runs, tmp_path / "reference")
    with monkeypatch.context() as patched:
        patched.setenv("HYPERDFLASH_RUNS", str(tmp_path / "reference"))
        train(config)
        expected = curve(train_run_dir(config))

    rows.unlink()
    shutil.rmtree(runs / "responses")
    shutil.rmtree(runs / "corpus")
    target.rename(tmp_path / "whole")
    heads_alone(tmp_path / "whole", target)
    done = train_without_text(config, tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert curve(train_run_dir(config)) == expected and len(expected) > 6
    assert "is missing" not in done.stdout

    shutil.rmtree(runs / "datasets")
    shutil.rmtree(runs / "train")
    refused = train_without_text(config, tmp_path / "config.yaml")
    assert refused.returncode != 0 and "hyperdflash.preparing is blocked" in refused.stderr  # the block blocks


def test_a_missing_dataset_is_prepared_once_and_recorded(prepared_overrides, compose_config, capsys, tmp_path):
    config = compose_config("train", [*prepared_overrides, "trainer.max_epochs=1"])
    record = train(config)
    said = capsys.readouterr().out
    (directory,) = (tmp_path / "datasets").glob(f"{dataset_name(config)}-*")
    assert said.count(f"{directory} is missing: this process prepares it\n") == 1
    dataset = open_dataset(directory)
    assert record["dataset"] == {"name": directory.name, "digest": dataset.digest}
    run = train_run_dir(config)
    checkpoint = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["run"]["data"] == dataset.digest
    rows = json.loads((run / "corpus.json").read_text())
    assert rows == dataset.rows and rows["sources"][0]["read"] == 60 and rows["train"]["documents"] == 23

    train(compose_config("train", [*prepared_overrides, "trainer.max_epochs=1", "seed=1"]))
    said = capsys.readouterr().out
    assert "is missing" not in said and "train: 23 documents" in said and "60 rows read" not in said


def test_processes_that_capture_at_once_prepare_one_dataset(prepared_overrides, compose_config, tmp_path, capfd):
    config = compose_config("train", [*prepared_overrides, "corpus.responses=target"])
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=capture_states, args=(config,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    said = capfd.readouterr().out
    assert said.count("60 rows read") == 1 and said.count("train: 23 documents") == 2
    assert len(list((tmp_path / "datasets").glob("*/dataset.json"))) == 1
    assert not list((tmp_path / "datasets").rglob("leases/*"))


def test_offline_refuses_without_a_dataset_and_says_what_to_run(prepared_overrides, compose_config):
    with pytest.raises(ValueError, match=r"cache=offline loads no target.*datasets.* is missing: run `python -m src\.capture"):
        train(compose_config("train", [*prepared_overrides, "cache=offline"]))


def test_an_edited_source_file_is_refused_and_a_touched_or_missing_one_is_not(
    prepared_overrides, rows_file, compose_config, tmp_path, monkeypatch
):
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path / "runs"))
    rows = tmp_path / "rows.jsonl"
    shutil.copy(rows_file, rows)
    options = [option.replace(str(rows_file), str(rows)) for option in prepared_overrides]
    config = compose_config("train", [*options, "trainer.max_epochs=1"])
    run, text = train_run_dir(config), rows.read_text()
    capture_states(config)
    (directory,) = (tmp_path / "runs" / "datasets").glob(f"{dataset_name(config)}-*")
    edited = rf"{rows} was edited after its rows were prepared: remove {directory}, then run `python -m src\.capture.*` to prep"

    rows.write_text(text.replace("function", "Function"))  # as long as before
    for command in (train, capture_states):
        with pytest.raises(ValueError, match=edited):
            command(config)
    rows.write_text(text)
    os.utime(rows, ns=(0, 0))
    train(config)  # touched, with equal content
    rows.unlink()
    train(config)  # finished, and the dataset stands for itself

    rows.write_text(text.replace("function", "Function"))
    with pytest.raises(ValueError, match=edited):  # a finished run of the old rows
        train(config)
    shutil.rmtree(directory)
    capture_states(config)
    with pytest.raises(ValueError, match=rf"{run} was trained on other rows than {directory} holds: remove {run} and run"):
        train(config)


def test_another_tokenizer_than_the_dataset_s_is_refused(prepared_overrides, compose_config, mini_target, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(mini_target, target)
    config = compose_config("train", [o.replace(str(mini_target), str(target)) for o in prepared_overrides])
    capture_states(config)
    text = (target / "tokenizer.json").read_text()
    (target / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer of .*: remove .* and capture again"):
        train(config)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ("corpus.max_length=65", True),
        ("corpus.responses=target", True),
        ("mode=think_high", True),
        ("cache.dtype=fp8", True),
        ("cache.documents_per_shard=5", True),
        ("target.dtype=bf16", True),
        ("target.engine=sglang", True),
        ("cache=stream", False),
        ("seed=1", False),
        ("kl.alpha=0.3", False),
        ("corpus.directory=elsewhere", False),
    ],
)
def test_the_name_of_a_dataset_follows_what_decides_it(change, differs, prepared_overrides, compose_config):
    """And the name of a run follows the name of its dataset."""
    plain, changed = compose_config("train", prepared_overrides), compose_config("train", [*prepared_overrides, change])
    assert (dataset_name(plain) != dataset_name(changed)) is differs
    assert not differs or run_name(plain) != run_name(changed)


def test_the_seed_decides_answers_that_are_sampled(prepared_overrides, compose_config):
    sampled = [*prepared_overrides, "corpus.temperature=1"]
    assert dataset_name(compose_config("train", sampled)) != dataset_name(compose_config("train", [*sampled, "seed=1"]))
