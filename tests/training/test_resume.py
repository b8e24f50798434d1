"""A run that is killed anywhere goes on by itself and ends as if nothing had happened: bit for bit."""

from __future__ import annotations

import csv
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hyperdflash.identity import train_run_dir
from hyperdflash.states.dataset import data_digest
from hyperdflash.training import job as runs
from hyperdflash.training.checkpoints import Stopped, check_same_run, checkpoint_path, damage, newest_checkpoint
from hyperdflash.training.epoch_plan import TrainingOrder
from hyperdflash.training.job import train
from hyperdflash.training.loggers import MetricsCSV
from hyperdflash.training.module import DraftingModule
from tests.states.random_states import key
from tests.training.run_differences import run_differences

STEPS = 18


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(step, how): ``how(module)`` is called instead of that step's computation."""
    whole = DraftingModule.training_step

    def arm(step: int | None, how=None) -> None:
        def dies(module, batch, batch_index):
            if module.global_step == step:
                how(module)
            return whole(module, batch, batch_index)

        monkeypatch.setattr(DraftingModule, "training_step", dies)

    return arm


def crash(module) -> None:
    raise RuntimeError("the machine is gone")


def sigterm(module) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def expected(prepared_overrides, prepared_runs, tmp_path_factory):
    """(record, directory) of an undisturbed run."""
    from hydra import compose, initialize_config_dir

    from hyperdflash.identity import CONF

    path = tmp_path_factory.mktemp("whole") / "runs"
    shutil.copytree(prepared_runs, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYPERDFLASH_RUNS", str(path))
        torch.set_num_threads(1)
        with initialize_config_dir(CONF, version_base="1.3"):
            config = compose("train", overrides=prepared_overrides)
            return train(config), train_run_dir(config)


def test_killed_anywhere_the_run_ends_the_same(
    runs_here, prepared_overrides, compose_config, killed_at, expected, tmp_path, capsys
):
    """Five times in one run: before the first checkpoint, on one, at an epoch's first step, after one, at the last step."""
    runs_here(tmp_path / "broken")
    config = compose_config("train", prepared_overrides)
    run = train_run_dir(config)
    for step, how, error, resumed in (
        (2, crash, RuntimeError, 0),
        (5, sigterm, Stopped, 4),
        (8, crash, RuntimeError, 8),
        (13, sigterm, Stopped, 12),
        (17, crash, RuntimeError, 16),
    ):
        killed_at(step, how)
        with pytest.raises(error):
            train(config)
        said = capsys.readouterr().out
        assert not (run / "result.json").exists()
        if how is sigterm:
            assert f"stopped by SIGTERM after step {step + 1}, saved" in said and "python -m src.train" in said
        assert newest_checkpoint(run / "checkpoints") == (
            checkpoint_path(run / "checkpoints", step + 1 if how is sigterm else resumed) if resumed else None
        )
        assert len(list((run / "checkpoints").glob("step*.ckpt"))) <= 2
    killed_at(None)
    with (run / "metrics.csv").open("a") as file:  # the row that was being written
        file.write("17,2,0.1")
    record = train(config)
    assert "resuming from" in capsys.readouterr().out
    whole, undisturbed = expected
    assert record["val_tau"] == whole["val_tau"] and record["steps"] == STEPS
    assert run_differences(undisturbed, run, STEPS) == []
    with (run / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]] == list(range(STEPS))

    (run / "result.json").unlink()  # killed between the last checkpoint and the record
    assert train(config)["val_tau"] == whole["val_tau"]
    assert run_differences(undisturbed, run, STEPS) == []


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    runs_here, prepared_overrides, compose_config, killed_at, expected, tmp_path, capsys
):
    runs_here(tmp_path / "damaged")
    config = compose_config("train", prepared_overrides)
    directory = train_run_dir(config) / "checkpoints"
    killed_at(10, crash)
    with pytest.raises(RuntimeError):
        train(config)
    older, newer = sorted(directory.glob("step*.ckpt"))
    flipped = bytearray(newer.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    newer.write_bytes(flipped)
    assert damage(newer) and not damage(older)
    older_bytes = older.read_bytes()
    cut = directory / "step00000009.ckpt"
    cut.write_bytes(older_bytes[: len(older_bytes) // 2])
    assert damage(cut)
    killed_at(None)
    train(config)
    said = capsys.readouterr().out
    assert f"{newer} is damaged" in said and f"{cut} is damaged" in said and f"resuming from {older}" in said
    assert run_differences(expected[1], directory.parent, STEPS) == []


@pytest.mark.parametrize(("changed", "what"), [("data", "with the data "), ("length", "with this number of steps: 18")])
def test_a_run_does_not_continue_with_other_data_or_another_length(
    changed, what, runs_here, prepared_overrides, rows_file, compose_config, killed_at, tmp_path, monkeypatch
):
    """A dataset that was prepared again from another text; more steps than the run of the checkpoint had."""
    runs_here(tmp_path / "changed")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows_file.read_text())
    options = [o.replace(str(rows_file), str(rows)) for o in prepared_overrides]
    config = compose_config("train", options)
    killed_at(5, crash)
    with pytest.raises(RuntimeError):
        train(config)
    killed_at(None)
    if changed == "length":
        monkeypatch.setattr(TrainingOrder, "__len__", lambda order: order.epochs * order.steps_per_epoch + 6)
    else:
        rows.write_text(rows.read_text().replace("return x +", "return x -"))
        shutil.rmtree(tmp_path / "changed" / "datasets")
    saved = train_run_dir(config) / "checkpoints"
    with pytest.raises(ValueError, match=f"step00000004.ckpt is of a run {what}") as refused:
        train(config)
    assert f"remove {saved} and run the command again" in str(refused.value)


def test_another_engine_is_named(tmp_path):
    own = {"target": "t", "engine": "none", "data": "0123", "steps": 18}
    check_same_run(tmp_path, own, own)
    with pytest.raises(ValueError, match=r"a run with the engine \(target\.engine; .*\) none, this one has vllm"):
        check_same_run(tmp_path, own, own | {"engine": "vllm", "data": "4567"})
    before = {name: own[name] for name in ("target", "data", "steps")}  # of a run before checkpoints named it
    check_same_run(tmp_path, before, own)
    with pytest.raises(ValueError, match="with the data"):
        check_same_run(tmp_path, before, own | {"engine": "vllm", "data": "4567"})


def test_the_datas_digest_is_of_the_key_and_of_all_documents_in_order():
    def shards(*names: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in names]

    train, validation = shards("a", "b"), shards("c")
    digests = [
        data_digest(key(), {"train": train, "validation": validation}),
        data_digest(key("fp8"), {"train": train, "validation": validation}),
        data_digest(replace(key(), engine="vllm"), {"train": train, "validation": validation}),
        data_digest(key(), {"train": train, "validation": shards("d")}),
        data_digest(key(), {"train": train, "validation": shards("c", "d")}),
        data_digest(key(), {"train": shards("b", "a"), "validation": validation}),
        data_digest(key(), {"train": shards("a"), "validation": shards("b", "c")}),
    ]
    assert len(set(digests)) == len(digests)
    assert data_digest(key(), {"validation": validation, "train": train}) == digests[0]


def test_a_loss_that_is_not_finite_stops_with_step_documents_and_checkpoint(
    runs_here, prepared_overrides, compose_config, killed_at, tmp_path
):
    runs_here(tmp_path / "nan")
    config = compose_config("train", prepared_overrides)

    def poison(module):
        with torch.no_grad():
            next(module.drafter.parameters()).fill_(float("nan"))

    killed_at(6, poison)
    with pytest.raises(ValueError, match="step 6 is not finite") as caught:
        train(config)
    message = str(caught.value)
    assert "step00000004.ckpt" in message and message.count(", ") >= 3 and "optim.lr" in message
    assert newest_checkpoint(train_run_dir(config) / "checkpoints").name == "step00000004.ckpt"


def test_no_two_processes_train_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LOCK_S", 0)
    with (
        runs.exclusive_run(tmp_path / "run"),
        pytest.raises(ValueError, match="another process"),
        runs.exclusive_run(tmp_path / "run"),
    ):
        pytest.fail("two at once")


def test_metrics_are_written_at_once_and_a_resume_drops_repeated_steps(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"train/loss": 2.0, "epoch": 0}, 0)
    log.log_metrics({"val/tau": 1.5, "epoch": 0}, 0)
    log.log_metrics({"train/loss": 1.0, "epoch": 1}, 1)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,epoch,train/loss,val/tau", "0,0,2.0,", "0,0,,1.5", "1,1,1.0,"
    ]  # fmt: skip
    again = MetricsCSV(tmp_path)
    again.restart_at(1)
    again.log_metrics({"train/loss": 1.0, "epoch": 1}, 1)
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 4
