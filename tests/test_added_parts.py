"""The parts that docs/add_a_*.md show draft, learn, train, are swept and reported, with nothing but what these pages show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from hyperdflash.contracts import TargetStates
from hyperdflash.decoding.loop import decode, loop_rounds
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.anchors import all_anchors, make_blocks
from hyperdflash.evaluation.report_job import make_report
from hyperdflash.identity import run_name
from hyperdflash.launch.sweep_plan import plan_sweep
from hyperdflash.targets.load import load_target
from hyperdflash.targets.session import TargetSession
from hyperdflash.training.components import make_parts
from hyperdflash.training.job import train
from tests.test_documented_commands import ROOT

SEARCHPATH = "hydra.searchpath=[file://my_conf]"


@pytest.mark.parametrize("part", ["head", "loss", "conditioning", "reducer"])
def test_the_shown_part_drafts_learns_and_agrees_with_its_loop(part, shown_files, compose_config, mini_overrides, mini_target):
    text = (ROOT / "docs" / f"add_a_{part}.md").read_text()
    (command,) = re.findall(r"^python -m src\.train .*experiment=stage1 (.*)$", text, flags=re.MULTILINE)
    words = [SEARCHPATH, "experiment=stage1", *mini_overrides, *command.split()]
    config = compose_config("train", words)
    parts, target = make_parts(config), load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")
    drafter = parts.build(target.heads, config.target, seed=0)
    prompt = [0, 2, *range(40, 60)]
    proposer = drafter.eval().proposer(target.heads)
    generation = decode(target.model, proposer, prompt, max_new_tokens=20, stop_ids={1})

    ids = torch.tensor([[*prompt, *generation.token_ids]])
    with TargetSession(target.model, drafter.layer_ids) as session:
        step = session.prefill(ids)
    mask, lengths = torch.arange(ids.shape[1])[None] >= len(prompt), torch.tensor([ids.shape[1]])
    states = TargetStates(("a",), ("code",), ids, mask, lengths, step.residual.bfloat16())
    replayed = replay(drafter, states, target.heads, 0.0)
    assert torch.equal(replayed.accepted, loop_rounds([generation], drafter.num_slots).accepted)

    blocks = make_blocks(ids, mask, lengths, *all_anchors(mask, lengths), block_size=drafter.num_slots + 1)
    with torch.enable_grad():
        logits = drafter.head.logits(drafter.slots(states, target.heads, blocks.anchors, blocks.anchor_mask), target.heads)
        sums = parts.objective.sums(logits, blocks, states.residual, target.heads)
        parts.objective.loss(sums).backward()
    assert not [name for name, p in drafter.named_parameters() if p.grad is None]


def test_the_reducer_trains(shown_files, compose_config, mini_overrides):
    words = ["experiment=stage1", *mini_overrides, "reducer=path_weights", "reducer.first=0.1"]
    config = compose_config("train", [SEARCHPATH, *words])
    assert run_name(config).startswith("stage1-pre_hc_head-path_weights-")
    train(config)
    weight = torch.load(next(shown_files.glob("train/*/checkpoints/step*.ckpt")), weights_only=True)["state_dict"]
    assert weight["drafter.reducer.weight"].shape == (4,) and (weight["drafter.reducer.weight"] != 0.1).all()


def test_an_evaluation_names_a_methods_training_with_its_own_options(shown_files, run_command, monkeypatch):
    monkeypatch.setenv("HYPERDFLASH_RUNS", str(shown_files))
    result = run_command("evaluate", SEARCHPATH, "methods=[projected]")
    wanted = f"`python -m src.train '{SEARCHPATH}' method=projected experiment=stage2` first"
    assert result.returncode == 1 and "method 'projected' has no finished run in" in result.stderr and wanted in result.stderr


def test_the_method_is_trained_and_found_by_its_name(shown_files, compose_config, mini_overrides, run_command):
    config = compose_config("train", [SEARCHPATH, *mini_overrides, "trainer.max_epochs=1", "method=projected"])
    assert "-pre_hc_head-fc-kl0.1-" in run_name(config)
    train(config)
    few = ["benchmarks.per_domain=1", "benchmarks.max_new_tokens=8", "temperature=[0]", "num_resamples=20", "threads=1"]
    words = ["methods=[projected]", 'training="experiment=stage1"', mini_overrides[0], *few, f"out={shown_files}/out"]
    result = run_command("evaluate", SEARCHPATH, *words)
    assert result.returncode == 0, result.stderr
    assert json.loads((shown_files / "out/metrics.json").read_text())["runs"] == {
        "HyperDFlash, projected (6)": run_name(config)
    }


def test_the_command_that_an_error_tells_finds_the_options(shown_files, mini_target):
    """From the shell of a user, who stands in a folder of their own."""
    target = f"target.path={mini_target}"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "src.train", SEARCHPATH, "experiment=stage2", "reducer=path_weights", target]
    environment = {**os.environ, "PYTHONPATH": path, "HYPERDFLASH_RUNS": str(shown_files)}
    result = subprocess.run(command, cwd=shown_files, env=environment, capture_output=True, text=True, check=False)
    wanted = f"`python -m src.train experiment=stage1 '{SEARCHPATH}' reducer=path_weights {target}` first"
    assert result.returncode == 1 and wanted in result.stderr and "Traceback" not in result.stderr


def test_the_reducer_is_swept_and_reported(shown_files, compose_config, mini_overrides):
    words = [SEARCHPATH, *mini_overrides]
    assert len(plan_sweep([*words, "sweep=my_reducers"]).jobs) == 6
    for reducer in ("hc_gate", "path_weights"):
        train(compose_config("train", [*words, f"reducer={reducer}", "seed=0"]))
    report, folder = make_report([*words, "sweep=my_reducers", "seed=0", "num_resamples=50"])
    assert [cell.choices["reducer"] for cell in report.cells] == ["hc_gate", "path_weights"]
    assert "| path_weights |" in (folder / "sweep.md").read_text()


def test_the_source_trains(shown_files, compose_config, mini_overrides):
    words = [SEARCHPATH, "experiment=stage1", *mini_overrides, "conditioning=final_and_token", "reducer=fc"]
    train(compose_config("train", words))
    weights = torch.load(next(shown_files.glob("train/*/checkpoints/step*.ckpt")), weights_only=True)["state_dict"]
    width = len(weights["drafter.hidden_norm.weight"])
    assert weights["drafter.reducer.fc.weight"].shape == (width, 2 * width)
