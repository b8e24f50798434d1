"""The benchmark of the training step: the order of steps, failures, ratios, thresholds, FLOPs; never a time."""

from __future__ import annotations

import ast
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step
from benchmarks.duel import Measured, Terms, duel
from benchmarks.own_step import build, drafter_config, training_step
from benchmarks.products import products
from benchmarks.shapes import QUICK, SHAPES, Case, StepShape
from benchmarks.step import OWN, PEER
from hyperdflash.drafting.flops import step_flops
from hyperdflash.report.tables import markdown

FAKE = Path(__file__).with_name("fake_worker.py")
CASE = Case(QUICK, "fp32", "own")
FORWARD = {"reducer": 2, "context": 3, "blocks": 3, "attention": 3}  # products of a step per product of a forward pass


def fakes(log: Path, own: tuple = (0.01,), peer: tuple = (0.03,)) -> dict[str, list[str]]:
    sides = {OWN: ("own", *own), PEER: ("peer", *peer)}
    return {
        side: [sys.executable, str(FAKE), name, str(seconds), str(log), *mode] for side, (name, seconds, *mode) in sides.items()
    }


def test_sides_step_in_turn_and_only_measured_steps_count(tmp_path):
    log = tmp_path / "log"
    results = duel(CASE, fakes(log), Terms(rounds=3, warm_up=2))
    steps = [(name, anchors) for name, do, anchors in map(json.loads, log.read_text().splitlines()) if do == "step"]
    assert [name for name, _ in steps] == ["own", "peer"] * 5
    assert [a for _, a in steps[::2]] == [a for _, a in steps[1::2]] == [QUICK.anchors(n) for n in range(5)]
    assert results[OWN].seconds == pytest.approx([0.03, 0.04, 0.05])  # the fake takes longer every time
    assert (results[PEER].anchors, results[PEER].slots) == (8, 48)
    assert results[PEER].peak_bytes - results[PEER].imports_bytes == 30_000_000


def test_short_steps_are_taken_for_a_while_unless_they_fail(tmp_path, monkeypatch):
    turns, sleep = [], time.sleep
    monkeypatch.setattr("benchmarks.duel.time.sleep", lambda seconds: (turns.append(1), sleep(seconds)))
    terms = Terms(rounds=2, warm_up=1, least_s=0.5)
    own, peer = duel(CASE, fakes(tmp_path / "log"), terms).values()
    assert len(own.seconds) == len(peer.seconds) > 2 and len(turns) > 6
    failed = duel(CASE, fakes(tmp_path / "full", (0.01, "full"), (0.03, "full")), replace(terms, least_s=600.0))
    assert all(result.error for result in failed.values())


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("full", "can't allocate memory"),
        ("wrong", "ran 8 anchors with 47 supervised slots, wanted 8 with 48"),
        ("dies", "ended with code 1: ValueError: the last line"),
    ],
)
def test_a_side_that_cannot_run_is_reported_and_the_other_goes_on(tmp_path, mode, error):
    record = step.compare(fakes(tmp_path / "log", peer=(0.03, mode)), [CASE], Terms(rounds=2, warm_up=0))
    own, peer = record["cases"][0][OWN], record["cases"][0][PEER]
    assert peer["error"] == error and own["error"] is None and len(own["seconds"]) == 2
    text = markdown(step.blocks(record))
    assert f"- speculators, quick, fp32, own: {error}" in text and "did not run" in text
    assert "0 of 0 hold" in text


def measured(side: str, seconds: float, megabytes: int, case: Case) -> dict:
    memory = {"imports_bytes": 500_000_000, "peak_bytes": 500_000_000 + megabytes * 1_000_000}
    return asdict(Measured(side, case, seconds=[seconds] * 3, slots=case.shape.drafted, **memory))


def test_ratios_are_held_against_the_bounds_of_the_dtype():
    def cells(dtype: str, own_s: float, own_mb: int) -> list[str]:
        case = Case(QUICK, dtype, "own")
        table, note, *_ = step._comparison([{OWN: measured(OWN, own_s, own_mb, case), PEER: measured(PEER, 6.0, 300, case)}])
        (row,) = table.rows
        missed = sum("not met" in row[column] for column in (8, 11))
        assert f"{2 - missed} of 2 hold" in note
        return [row[8], row[11]]

    assert cells("fp32", 3.0, 100) == ["2.00", "0.33"]
    assert cells("fp32", 3.01, 101) == ["1.99 **not met**", "0.34 **not met**"]
    assert cells("bf16", 2.0, 100) == ["3.00", "0.33"]
    assert cells("bf16", 2.5, 100) == ["2.40 **not met**", "0.33"]


def test_flops_by_hand():
    """T 15, A 3 (12 positions before the last block: 9 states seen, 6 each), K 3, V 10, D 4, 2 heads, 1 layer, I 8, M 2."""
    shape = StepShape(
        name="hand", num_tokens=15, num_anchors=3, vocab_size=10, hidden_size=4, num_layers=1, num_heads=2,
        intermediate_size=8, block_size=3, num_streams=2,
    )  # fmt: skip
    assert {p.name: p.flops for p in products(shape)} == {
        "context, streams to D": 2 * 9 * 8 * 4,
        "context, keys and values": 2 * 9 * 4 * 8,
        "blocks, q k v o": 2 * 9 * 4 * 16,
        "blocks, MLP in": 2 * 9 * 4 * 16,
        "blocks, MLP out": 2 * 9 * 8 * 4,
        "context scores": 2 * 3 * 18 * 4,
        "context values": 2 * 3 * 18 * 4,
        "block scores": 2 * 9 * 3 * 4,
        "block values": 2 * 9 * 3 * 4,
        "LM head": 2 * 6 * 4 * 10,
    }


def flops_of(shape: StepShape):
    return step_flops(
        drafter_config(shape),
        target_width=shape.hidden_size,
        vocab_size=shape.vocab_size,
        num_tokens=shape.num_seen,
        num_anchors=shape.num_anchors,
        num_taught=2,
        reducer_weights=shape.num_streams * shape.hidden_size**2,
        mean_visible=shape.anchor_sum / shape.num_anchors,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_products_add_up_to_the_drafters_formula(shape):
    step = flops_of(shape)
    heads = 2 * shape.drafted * shape.vocab_size * shape.hidden_size
    assert sum(p.flops for p in products(shape)) == sum(getattr(step, name) / n for name, n in FORWARD.items()) + heads


def test_the_step_needs_the_flops_that_the_formula_counts():
    """torch counts the products of a step: at least those of the formula, and less than twice as many."""
    setup = build(CASE)
    counter = FlopCounterMode(display=False)
    with counter:
        loss, slots = training_step(setup, QUICK.anchors(0))
    assert slots.tolist() == [QUICK.num_anchors] * QUICK.num_slots and torch.isfinite(loss)
    assert 0.9 < counter.get_total_flops() / flops_of(QUICK).total < 2.0
    assert all(p.grad is not None for p in setup.drafter.parameters())
    assert not any(p.requires_grad for p in setup.heads.parameters())


def test_both_sides_get_anchors_with_a_whole_block():
    for shape in SHAPES:
        anchors = shape.anchors(0)
        assert len(set(anchors)) == shape.num_anchors and anchors == sorted(anchors) == shape.anchors(0) != shape.anchors(1)
        assert anchors[0] >= 1 and anchors[-1] + shape.block_size <= shape.num_tokens
    with pytest.raises(ValueError, match="56 anchors whose block of 7 lies inside it, got num_anchors=60"):
        replace(QUICK, num_anchors=60)


def test_the_peer_loads_nothing_of_this_project():
    tree = ast.parse(Path(step.__file__).with_name("peer_step.py").read_text())
    names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    assert "speculators.models.dflash" in names
    assert not [name for name in names if name.split(".")[0] == "src" or Path(step.__file__).with_name(f"{name}.py").exists()]


def test_quick_measures_a_real_step(tmp_path, capsys):
    step.main(["--quick", "--threads", "1", "--rounds", "2", "--out", str(tmp_path)])
    (case,) = json.loads((tmp_path / "step.json").read_text())["cases"]
    own = case[OWN]
    assert own["error"] is None and own["slots"] == 48 and len(own["seconds"]) == 2
    assert own["peak_bytes"] > own["built_bytes"] >= own["imports_bytes"] > 0
    text = (tmp_path / "step.md").read_text()
    assert "| quick | fp32 | own | 2 |" in text and text in capsys.readouterr().out


def test_without_the_peer_it_says_what_makes_one(tmp_path):
    with pytest.raises(SystemExit, match="no nowhere/python: run make bench-step"):
        step.main(["--peer-python", "nowhere/python", "--out", str(tmp_path)])
