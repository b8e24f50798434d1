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

import pytest
import torch

from src.entry import train_run_dir
from src.lit import launcher
from src.lit.checkpoints import Stopped
from src.lit.run import train

# 23 documents, 8 a step: 3 steps an epoch, so 51 in all, one of three with 7 documents for 8 places
SAME = ["trainer.precision=64-true", "trainer.max_epochs=17", "trainer.val_check_interval=17", "trainer.log_every_n_steps=1"]


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
    assert train(ranks)["steps"] == 51
    losses, validations = curves(train_run_dir(one))
    found, found_validations = curves(train_run_dir(ranks))
    assert len(losses) == 51 and len(validations) == 3
    # Cross-entropy is a softmax in fp32 (2**-24 = 6e-8 a term); all else is fp64.
    # The norms are compared too: Muon's and Adam's steps would not show a gradient of another scale.
    assert torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-6, atol=0)
    assert found_validations == validations  # counts of every validation text, once


@pytest.mark.slow
def test_ranks_that_are_told_to_stop_save_and_go_on(runs_here, prepared_overrides, compose_config, tmp_path, capfd):
    runs_here(tmp_path / "runs")
    ranks = compose_config("train", ["trainer=ddp_cpu", *prepared_overrides, *SAME])
    rows = train_run_dir(ranks) / "metrics.csv"

    def stop_it() -> None:
        while not rows.exists() or rows.read_text().count("\n") < 8:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_it).start()
    with pytest.raises(Stopped):
        train(ranks)
    assert "stopped by SIGTERM after step" in capfd.readouterr().out
    assert train(ranks)["steps"] == 51
    assert "resuming from" in capfd.readouterr().out
    assert len(curves(train_run_dir(ranks))[0]) == 51


def stand_in(monkeypatch, scripts: list[str]) -> None:
    """Ranks that are these programs, with RANKS the folder of the ranks' files."""

    def start(run: Path, rank: int, count: int, port: int) -> subprocess.Popen:
        program = f"import json, os, signal, sys, time\nRANKS = {str(run / 'ranks')!r}\n{scripts[rank]}"
        return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)

    monkeypatch.setattr(launcher, "_start", start)
    monkeypatch.setattr(launcher, "GRACE_S", 0.5)


TELL = "json.dump({'time_s': time.time(), 'error': %r}, open(f'{RANKS}/%d.json', 'w')); sys.exit(1)"


@pytest.mark.parametrize(
    ("scripts", "sentence"),
    [
        (["time.sleep(60)", TELL % ("the disk is full", 1)], "rank 1 of 2 failed: the disk is full"),
        (["time.sleep(60)", "os.kill(os.getpid(), signal.SIGKILL)"], "rank 1 of 2 was ended by SIGKILL"),
        (["time.sleep(0.3)\n" + TELL % ("connection closed by peer", 0), TELL % ("bad row", 1)], "rank 1 of 2 failed: bad row"),
        (["time.sleep(60)", "sys.exit(3)"], "rank 1 of 2 ended with exit code 3"),
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

    threading.Thread(target=stop_it).start()
    with pytest.raises(Stopped) as stopped:
        launcher.launch_ranks(compose_config("train", ["trainer=ddp_cpu"]), tmp_path)
    assert stopped.value.code == 143


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


def test_devices_and_machines_that_cannot_be(compose_config):
    with pytest.raises(ValueError, match=r"trainer\.devices must be a number"):
        launcher.must_launch(compose_config("train", ["trainer.devices=some"]).trainer)
    with pytest.raises(ValueError, match="srun"):
        launcher.must_launch(compose_config("train", ["trainer=ddp8", "trainer.num_nodes=2"]).trainer)


def test_the_step_draws_the_same_blocks_however_it_is_shared(runs_here, prepared_overrides, compose_config, tmp_path):
    from src.lit.run import make_data
    from src.lit.states import cached_data, open_store
    from src.target.load import load_heads

    runs_here(tmp_path / "runs")
    config = compose_config("train", [*prepared_overrides, "optim.batch_size=8"])
    from src.lit.parts import make_parts

    parts, heads = make_parts(config), load_heads(config.target.path)
    data = make_data(config, parts, cached_data(config, parts, heads, open_store(config, heads)), 6, 1)
    whole = data.steps(0, 1)
    for step in range(3):
        (only,) = whole[step].micro
        shared = [data.steps(rank, 8)[step] for rank in range(8)]
        supervised = torch.cat([micro.blocks.label_mask.sum((1, 2)) for batch in shared for micro in batch.micro])
        assert supervised[supervised > 0].tolist() == only.blocks.label_mask.sum((1, 2)).tolist()
        assert all(torch.equal(batch.counts.slot_count, whole[step].counts.slot_count) for batch in shared)
        assert torch.equal(only.blocks.label_mask.sum((0, 1)), whole[step].counts.slot_count)
        empty = [not batch.micro[0].states.loss_mask.any() for batch in shared]
        assert sum(empty) == 8 - len(whole[step].ids)
    assert {len(whole[step].ids) for step in range(3)} == {7, 8}
