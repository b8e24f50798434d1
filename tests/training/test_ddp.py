"""Ranks and micro-batches compute what one process with the same global batch computes, and none is lost silently."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hyperdflash.identity import train_run_dir
from hyperdflash.launch import captures, child, launcher
from hyperdflash.training import checkpoints
from hyperdflash.training.checkpoints import Checkpoints, Stopped
from hyperdflash.training.job import strategy_of, train
from tests.training.run_differences import run_differences

# 23 documents, 8 per step: 3 steps per epoch, one of them with 7 documents for 8 places
SAME = ["trainer.precision=64-true", "trainer.max_epochs=5", "trainer.val_check_interval=5", "trainer.log_every_n_steps=1"]
LONG = [*SAME, "trainer.max_epochs=17", "trainer.val_check_interval=17"]


def curves(run: Path) -> tuple[list[list[float]], list[dict]]:
    """(loss and norm of the gradient by step, validation rows)."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    validations = [{k: v for k, v in row.items() if k.startswith("val/")} for row in rows if row["val/tau"]]
    return [[float(row[f"train/{name}"]) for name in ("loss", "grad_norm")] for row in rows if row["train/loss"]], validations


def test_two_ranks_in_micro_batches_train_as_one_process_does(runs_here, prepared_overrides, compose_config, tmp_path):
    runs_here(tmp_path / "runs")
    one = compose_config("train", [*prepared_overrides, *SAME, "optim.batch_size=8"])
    ranks = compose_config(
        "train", ["trainer=ddp_cpu", *prepared_overrides, *SAME, "optim.batch_size=1", "trainer.accumulate_grad_batches=4"]
    )
    train(one)
    assert train(ranks)["steps"] == 15
    losses, validations = curves(train_run_dir(one))
    found, found_validations = curves(train_run_dir(ranks))
    assert len(losses) == 15 and len(validations) == 3
    # Cross-entropy is a softmax in fp32 (2**-24 = 6e-8 a term); all else is fp64.
    # The norms are compared too: Muon's and Adam's steps would not show a gradient of another scale.
    assert torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-6, atol=0)
    assert found_validations == validations  # counts of every validation text, once


@pytest.mark.parametrize("lead", [["lead.steps=1"], ["lead.steps=2", "lead.trainable=false"]], ids=["trained", "frozen"])
def test_ranks_train_a_lead_as_one_process_does(lead, runs_here, prepared_overrides, compose_config, tmp_path):
    """One micro-batch of the epoch has no document; a rank without gradients of the lead would keep the others waiting."""
    runs_here(tmp_path / "runs")
    words = [*prepared_overrides, "method=best", *lead, "trainer.max_epochs=1", "trainer.log_every_n_steps=1"]
    one = compose_config("train", [*words, "optim.batch_size=8"])
    ranks = compose_config("train", ["trainer=ddp_cpu", *words, "optim.batch_size=1", "trainer.accumulate_grad_batches=4"])
    train(one)
    assert train(ranks)["steps"] == 3
    losses, found = (curves(train_run_dir(config))[0] for config in (one, ranks))
    assert torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-4, atol=0)
    checkpoint = torch.load(train_run_dir(one) / "checkpoints" / "best.ckpt", weights_only=True)
    assert any(".lead.block.layer.self_attn." in name for name in checkpoint["state_dict"]) == (
        "lead.trainable=false" not in lead
    )


@pytest.mark.slow
def test_ranks_that_get_a_signal_save_and_continue(runs_here, prepared_overrides, compose_config, tmp_path, capfd):
    ranks = compose_config("train", ["trainer=ddp_cpu", *prepared_overrides, *LONG])
    runs_here(tmp_path / "undisturbed")
    train(ranks)
    undisturbed = train_run_dir(ranks)
    runs_here(tmp_path / "runs")
    capfd.readouterr()
    rows = train_run_dir(ranks) / "metrics.csv"

    def stop_it() -> None:
        while not rows.exists() or rows.read_text().count("\n") < 8:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_it, daemon=True).start()
    with pytest.raises(Stopped):
        train(ranks)
    assert "stopped by SIGTERM after step" in capfd.readouterr().out
    assert train(ranks)["steps"] == 51
    assert "resuming from" in capfd.readouterr().out
    assert run_differences(undisturbed, train_run_dir(ranks), 51) == []
    assert len(curves(undisturbed)[0]) == 51


def stand_in(monkeypatch, scripts: list[str]) -> None:
    """Ranks that are these programs, with RANKS the folder of the ranks' files."""

    def start(run: Path, rank: int, count: int, port: int) -> subprocess.Popen:
        program = f"import json, os, signal, sys, time\nRANKS = {str(run / 'ranks')!r}\n{scripts[rank]}"
        return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)

    monkeypatch.setattr(launcher, "_start", start)
    monkeypatch.setattr(launcher, "GRACE_S", 0.5)
    monkeypatch.setattr(launcher, "SAVE_S", 0.5)


TELL = "json.dump({'time_s': time.time(), 'error': %r}, open(f'{RANKS}/%d.json', 'w')); sys.exit(1)"


@pytest.mark.parametrize(
    ("scripts", "sentence"),
    [
        (["time.sleep(60)", TELL % ("the disk is full", 1)], "rank 1 of 2 failed: the disk is full"),
        (["time.sleep(60)", "os.kill(os.getpid(), signal.SIGKILL)"], "rank 1 of 2 was ended by SIGKILL"),
        (["time.sleep(0.3)\n" + TELL % ("connection closed by peer", 0), TELL % ("bad row", 1)], "rank 1 of 2 failed: bad row"),
        (["time.sleep(60)", "sys.exit(3)"], "rank 1 of 2 ended with exit code 3"),
        (["time.sleep(60)", "os.kill(os.getpid(), signal.SIGTERM)"], "rank 1 of 2 was ended by SIGTERM"),
        (["time.sleep(60)", "sys.exit(143)"], "rank 1 of 2 ended with exit code 143"),
    ],
)
def test_a_rank_that_dies_ends_the_run_with_its_error(scripts, sentence, monkeypatch, tmp_path, compose_config):
    stand_in(monkeypatch, scripts)
    started = time.monotonic()
    with pytest.raises(ValueError, match=sentence):
        launcher.launch_ranks(compose_config("train", ["trainer=ddp_cpu"]), tmp_path)
    assert time.monotonic() - started < 55  # the ranks that sleep were not waited for


def test_ranks_get_the_signal_and_all_stop(monkeypatch, tmp_path, compose_config):
    wait = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\nopen(f'{RANKS}/ready%d', 'w')\ntime.sleep(60)"
    stand_in(monkeypatch, [wait % 0, wait % 1])

    def stop_it() -> None:
        while len(list((tmp_path / "ranks").glob("ready*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_it, daemon=True).start()
    with pytest.raises(Stopped) as stopped:
        launcher.launch_ranks(compose_config("train", ["trainer=ddp_cpu"]), tmp_path)
    assert stopped.value.code == 143


@pytest.mark.parametrize("at", ["capture", 0, 1])
def test_a_signal_while_captures_and_ranks_are_started_stops_the_run(at, monkeypatch, tmp_path, compose_config):
    """Whom it came too early for would train on and never hear of it."""
    stand_in(monkeypatch, ["time.sleep(2)"] * 2)
    started, start = [], launcher._start

    def signalled(who: str | int, process: subprocess.Popen) -> subprocess.Popen:
        started.append(process)
        if who == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    def start_capture(*given) -> subprocess.Popen:
        return signalled("capture", subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE))

    monkeypatch.setattr(launcher, "_start", lambda run, rank, *rest: signalled(rank, start(run, rank, *rest)))
    monkeypatch.setattr(captures, "start_child", start_capture)
    monkeypatch.setattr(child, "END_S", 0.1)
    with pytest.raises(Stopped, match="SIGTERM"):
        launcher.launch_ranks(compose_config("train", ["trainer=ddp_cpu", "cache=stream", "cache.captures=1"]), tmp_path)
    assert len(started) == (1 if at == "capture" else at + 2) and all(process.returncode is not None for process in started)


def test_the_others_may_save_after_the_first_rank_has_stopped(monkeypatch, tmp_path, compose_config):
    """A signal that the launcher did not get. A rank that is ended sees the end of its pipe, and does not save."""
    saves = (
        "import select\nif select.select([sys.stdin], [], [], 1.5)[0]: sys.exit(1)\nopen(f'{RANKS}/saved', 'w')\nsys.exit(143)"
    )
    stand_in(monkeypatch, [saves, "sys.exit(143)"])
    monkeypatch.setattr(launcher, "SAVE_S", 50)
    with pytest.raises(Stopped, match="SIGTERM"):
        launcher.launch_ranks(compose_config("train", ["trainer=ddp_cpu"]), tmp_path)
    assert (tmp_path / "ranks" / "saved").exists()


def test_ranks_that_stop_together_without_the_launcher_are_a_stop(monkeypatch, tmp_path, compose_config):
    stand_in(monkeypatch, ["sys.exit(143)", "sys.exit(143)"])
    with pytest.raises(Stopped, match="SIGTERM"):
        launcher.launch_ranks(compose_config("train", ["trainer=ddp_cpu"]), tmp_path)


def test_the_terminals_ctrl_c_reaches_no_rank_directly(tmp_path):
    (tmp_path / "ranks").mkdir()
    process = launcher._start(tmp_path, 1, 2, 0)
    try:
        assert os.getpgid(process.pid) == process.pid != os.getpgrp()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def test_a_timed_checkpoint_is_written_once_however_late_the_requests_arrive(monkeypatch, tmp_path):
    """Wishes of several ranks are read one step later: that of the step that saves must not save again."""
    monkeypatch.setattr(checkpoints.dist, "all_reduce", lambda *_, **__: SimpleNamespace(wait=lambda: None))
    saver = Checkpoints(tmp_path, every_steps=None, every_s=5.0, command="")
    saver._group, saver._saved_s, saver._saved_step = object(), 0.0, 0
    saved = []

    def save(trainer, module) -> None:
        saved.append(trainer.global_step)
        saver._saved_s, saver._saved_step = checkpoints.time.monotonic(), trainer.global_step

    monkeypatch.setattr(saver, "_save", save)
    for step in range(24):  # a second each
        monkeypatch.setattr(checkpoints.time, "monotonic", lambda step=step: float(step))
        trainer = SimpleNamespace(global_step=step, is_global_zero=True)
        saver.on_train_batch_start(trainer, SimpleNamespace(check_finite=lambda: None), None, step)
    assert saved == [6, 12, 18]


@pytest.mark.parametrize(
    ("environment", "options", "launches"),
    [
        ({}, ["trainer=ddp_cpu"], True),
        ({}, ["trainer=cpu"], False),
        ({}, ["trainer=ddp8"], True),
        ({"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}, ["trainer=ddp_cpu"], False),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}, ["trainer=ddp_cpu"], False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, ["trainer=ddp_cpu"], True),  # one task of a batch script
    ],
)
def test_ranks_are_started_once(environment, options, launches, monkeypatch, compose_config):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher.must_launch(compose_config("train", options).trainer) is launches


def test_ranks_wait_for_each_other_longer_than_for_a_shard(prepared_overrides, compose_config, monkeypatch):
    joined = {}

    def join(backend, **options):
        joined.update(options)
        raise InterruptedError

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    stream = ["trainer=ddp_cpu", *prepared_overrides, "cache=stream", "cache.wait_s=5000"]
    with pytest.raises(InterruptedError):
        train(compose_config("train", stream))
    assert joined["timeout"].total_seconds() >= 5000 + 60


def test_impossible_devices_and_machines_are_refused(compose_config):
    with pytest.raises(ValueError, match=r"trainer\.devices must be a number"):
        launcher.must_launch(compose_config("train", ["trainer.devices=some"]).trainer)
    with pytest.raises(ValueError, match="srun"):
        launcher.must_launch(compose_config("train", ["trainer=ddp8", "trainer.num_nodes=2"]).trainer)


@pytest.mark.parametrize(
    "environment",
    [
        {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"},
        {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"},
    ],
)
def test_as_many_ranks_are_started_as_the_trainer_wants(environment, monkeypatch, compose_config):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not launcher.must_launch(compose_config("train", ["trainer=cpu", "trainer.devices=2"]).trainer)
    for options in (["trainer=cpu"], ["trainer=ddp_cpu", "trainer.num_nodes=2"]):
        with pytest.raises(ValueError, match=r"2 rank\(s\) were started .* are [14]: start"):
            launcher.must_launch(compose_config("train", options).trainer)


def test_several_ranks_never_exchange_buffers(compose_config):
    """Ranks may validate unequal numbers of batches: an exchange at every forward would wait for ever."""
    assert strategy_of(compose_config("train", ["trainer=cpu"]).trainer) == "auto"
    for options in (["trainer=cpu", "trainer.devices=2"], ["trainer=gpu", "trainer.devices=4"], ["trainer=ddp8"]):
        assert strategy_of(compose_config("train", options).trainer)._ddp_kwargs["broadcast_buffers"] is False


def test_the_step_draws_the_same_blocks_however_it_is_shared(runs_here, prepared_overrides, compose_config, tmp_path):
    from hyperdflash.targets.load import load_heads
    from hyperdflash.training.dataset import training_data
    from hyperdflash.training.job import make_data

    runs_here(tmp_path / "runs")
    config = compose_config("train", [*prepared_overrides, "optim.batch_size=8"])
    from hyperdflash.training.components import make_parts

    parts, heads = make_parts(config), load_heads(config.target.path)
    data = make_data(config, parts, training_data(config, heads, parts.layer_ids)[2], 6, 1)
    for step in range(3):
        whole = data.batch(step, 0, 1)
        (only,) = whole.micro
        shared = [data.batch(step, rank, 8) for rank in range(8)]
        supervised = torch.cat([micro.blocks.label_mask.sum((1, 2)) for batch in shared for micro in batch.micro])
        assert supervised[supervised > 0].tolist() == only.blocks.label_mask.sum((1, 2)).tolist()
        assert all(torch.equal(batch.counts.slot_count, whole.counts.slot_count) for batch in shared)
        assert torch.equal(only.blocks.label_mask.sum((0, 1)), whole.counts.slot_count)
        empty = [not batch.micro[0].states.loss_mask.any() for batch in shared]
        assert sum(empty) == 8 - len(whole.ids)
    assert {len(data.ids(step)) for step in range(3)} == {7, 8}
