"""The bench of the training step: who steps when, what a failure becomes, ratios, exponents, FLOPs; never a time."""

from __future__ import annotations

import ast
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step, tables
from benchmarks.duel import Measured, Terms, duel
from benchmarks.flops import products, step_flops
from benchmarks.own_step import build, drafter_config, training_step
from benchmarks.shapes import QUICK, SHAPES, Case, StepShape, grown
from benchmarks.tables import OWN, PEER, Run
from benchmarks.verdict import exponent, growths, over_peak, thresholds
from hyperdflash.drafting.flops import step_flops as drafter_flops

FAKE = Path(__file__).with_name("fake_worker.py")
CASE = Case(QUICK, "fp32", "own")


def fakes(log: Path, own: tuple = (0.01,), peer: tuple = (0.03,)) -> dict[str, list[str]]:
    sides = {OWN: ("own", *own), PEER: ("peer", *peer)}
    return {
        side: [sys.executable, str(FAKE), name, str(seconds), str(log), *mode] for side, (name, seconds, *mode) in sides.items()
    }


def test_sides_step_in_turn_and_only_measured_steps_count(tmp_path):
    log, seen = tmp_path / "log", []
    results = duel(CASE, fakes(log), Terms(rounds=3, warm_up=2), progress=lambda: seen.append(1))
    steps = [(name, anchors) for name, do, anchors in map(json.loads, log.read_text().splitlines()) if do == "step"]
    assert [name for name, _ in steps] == ["own", "peer"] * 5 and len(seen) == 10
    assert [a for _, a in steps[::2]] == [a for _, a in steps[1::2]] == [QUICK.anchors(n) for n in range(5)]
    assert results[OWN].seconds == pytest.approx([0.03, 0.04, 0.05])  # the fake takes longer every time
    assert len(results[PEER].stages["loss"]) == 3
    assert (results[PEER].anchors, results[PEER].slots) == (8, 48)
    assert results[PEER].peak_bytes - results[PEER].imports_bytes == 30_000_000


def test_short_steps_are_taken_for_a_while_unless_they_fail(tmp_path, monkeypatch):
    turns, ticks, sleep = [], [], time.sleep
    monkeypatch.setattr("benchmarks.duel.time.sleep", lambda seconds: (turns.append(1), sleep(seconds)))
    terms = Terms(rounds=2, warm_up=1, least_s=0.5)
    own, peer = duel(CASE, fakes(tmp_path / "log"), terms, rates=True, progress=lambda: ticks.append(1)).values()
    assert len(own.seconds) == len(peer.seconds) == len(own.beside_peak) > 2
    assert len(ticks) == 6 < len(turns)  # what a bar was promised
    turns.clear()
    failed = duel(CASE, fakes(tmp_path / "full", (0.01, "full"), (0.03, "full")), replace(terms, least_s=600.0))
    assert len(turns) == 6 and all(result.error for result in failed.values())


def test_the_peak_is_that_of_the_fastest_product_beside_each_step(tmp_path):
    log = tmp_path / "log"
    own = duel(CASE, fakes(log), Terms(rounds=3, warm_up=2), rates=True)[OWN]
    asked = [do for name, do, _ in map(json.loads, log.read_text().splitlines()) if name == "own"]
    assert asked[-8:] == ["memory", "rates", "step", "peak", "step", "peak", "step", "peak"]  # memory before anything else
    fastest = sum(len(product.parts) for product in products(CASE))  # in the fake
    assert [s for s, _ in own.beside_peak] == pytest.approx([0.06, 0.07, 0.08]) and len(own.seconds) == 3
    assert [s * peak for s, peak in own.beside_peak] == pytest.approx([0.01 * fastest] * 3)  # a drift that both have is gone
    assert over_peak(own) == pytest.approx(0.01 * fastest / step_flops(CASE))


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("full", "can't allocate memory"),
        ("wrong", "ran 8 anchors with 47 supervised slots, wanted 8 with 48"),
        ("dies", "ended with code 1: ValueError: the last line"),
    ],
)
def test_a_side_that_cannot_run_is_reported_and_the_other_goes_on(tmp_path, mode, error):
    run = Run(Terms(rounds=2, warm_up=0), {"cpu": "x", "cores": 2, "load_before": 0.0})
    step.run_bench(run, fakes(tmp_path / "log", peer=(0.03, mode)), [CASE], {}, run.terms)
    own, peer = run.cases[0][OWN], run.cases[0][PEER]
    assert peer.error == error and len(own.seconds) == 2
    text = "\n".join(tables.markdown(run))
    assert f"- speculators, quick, fp32, own: {error}" in text
    assert f"cannot be said (speculators: {error})" in text
    (case,) = tables.record(run)["cases"]
    assert [case[side]["error"] for side in (OWN, PEER)] == [None, error]


def test_a_peak_that_cannot_be_measured_leaves_the_comparison(tmp_path):
    run = Run(Terms(rounds=2, warm_up=0), {"cpu": "x", "cores": 2, "load_before": 0.0})
    step.run_bench(run, fakes(tmp_path / "log", own=(0.01, "no_peak")), [CASE], {}, run.terms)
    own = run.cases[0][OWN]
    assert own.error is None and own.extras_error == "no room" and len(own.seconds) == 2 and own.beside_peak == []
    assert {found.name: found.met for found in run.thresholds()} == {
        "slots/s beside speculators": True,
        "peak memory beside speculators": True,
        "step time / FLOPs at peak": None,
    }
    text = "\n".join(tables.markdown(run))
    assert "cannot be said (no room)" in text and "- rates, quick, fp32, own: no room" in text


def measured(side: str, seconds: float, megabytes: int, case: Case = CASE) -> Measured:
    return Measured(
        side,
        case,
        seconds=[seconds] * 3,
        slots=case.shape.drafted,
        imports_bytes=500_000_000,
        peak_bytes=500_000_000 + megabytes * 1_000_000,
    )


def test_thresholds_compare_with_the_bounds_of_the_dtype():
    def verdicts(dtype: str, own_s: float, own_mb: int) -> list[bool | None]:
        case = Case(QUICK, dtype, "own")
        own = measured(OWN, own_s, own_mb, case)
        # a machine half as fast for one step, of which the median of the ratios knows nothing
        own.beside_peak = [(own_s, step_flops(case)), (2 * own_s, step_flops(case) / 2), (own_s, step_flops(case))]
        return [found.met for found in thresholds(own, measured(PEER, 6.0, 300, case))]

    assert verdicts("fp32", 2.0, 100) == [True, True, True]
    assert verdicts("fp32", 3.01, 101) == [False, False, False]
    assert verdicts("bf16", 2.0, 100) == [True, True, True]
    assert verdicts("bf16", 2.5, 100) == [False, True, True]


def test_growth_finds_the_powers(tmp_path):
    base = StepShape(name="base", num_tokens=512, num_anchors=8, vocab_size=1000)
    axes = {"num_tokens": [grown(base, "num_tokens", t) for t in (256, 512, 1024)]}
    results = {
        s: {
            OWN: measured(OWN, s.num_tokens**0.5, s.num_tokens, Case(s, "fp32", "own")),
            PEER: measured(PEER, s.num_tokens**1.5, 100, Case(s, "fp32", "own")),
        }
        for s in axes["num_tokens"]
    }
    own, peer = growths(results, axes)
    assert own.time_exponent == pytest.approx(0.5) and own.memory_exponent == pytest.approx(1.0) and own.within
    assert peer.time_exponent == pytest.approx(1.5) and not peer.within
    assert 0 < own.flops_exponent < 1
    assert exponent([1, 10, 100], [3, 300, 30_000]) == pytest.approx(2.0)


def test_growth_becomes_a_table_and_a_picture(tmp_path):
    run = Run(Terms(rounds=1, warm_up=0), {"cpu": "x", "cores": 2, "load_before": 0.0})
    axes = {"num_anchors": (64, 128, 256), "hidden_size": (128, 256, 512)}
    step.run_bench(run, fakes(tmp_path / "log"), [CASE], axes, run.terms)
    assert len(run.growth) == 5  # the base lies on both axes and is measured once
    step.write(run, tmp_path, {"command": "bench", "git_revision": None, "load_before": 0.0})
    text = (tmp_path / "step.md").read_text()
    assert "| A | this project | 64, 128, 256 | 10, 10, 10 | 10, 10, 10 | 0.00 | 0.00 |" in text
    assert "| D | speculators | 128, 256, 512 | 30, 30, 30 | 30, 30, 30 | 0.00 | 0.00 |" in text
    assert (tmp_path / "step_growth.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "step.json").read_text())["growth"]) == 5


def test_flops_by_hand():
    """T 15, A 3 (12 positions before the last block: 9 states seen, 6 each), K 3, V 10, D 4, 2 heads, 1 layer, I 8, M 2."""
    shape = StepShape(
        name="hand", num_tokens=15, num_anchors=3, vocab_size=10, hidden_size=4, num_layers=1, num_heads=2,
        intermediate_size=8, block_size=3, num_streams=2,
    )  # fmt: skip
    assert {p.name: p.flops for p in products(Case(shape, "fp32", "own"))} == {
        "context, streams to D": 2 * 9 * 8 * 4 * 2,
        "context, keys and values": 2 * 9 * 4 * 8 * 3,
        "blocks, q k v o": 2 * 9 * 4 * 16 * 3,
        "blocks, MLP in": 2 * 9 * 4 * 16 * 3,
        "blocks, MLP out": 2 * 9 * 8 * 4 * 3,
        "context scores": 2 * 3 * 18 * 4 * 3,
        "context values": 2 * 3 * 18 * 4 * 3,
        "block scores": 2 * 9 * 3 * 4 * 3,
        "block values": 2 * 9 * 3 * 4 * 3,
        "LM head": 2 * 6 * 4 * 10 * 2,
        "teacher's LM head": 2 * 6 * 4 * 10,
    }


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_products_add_up_to_the_drafters_formula(shape):
    config = drafter_config(shape)
    formula = drafter_flops(
        config,
        target_width=shape.hidden_size,
        vocab_size=shape.vocab_size,
        num_tokens=shape.num_seen,
        num_anchors=shape.num_anchors,
        num_taught=2,
        reducer_weights=shape.num_streams * shape.hidden_size**2,
        mean_visible=shape.anchor_sum / shape.num_anchors,
    )
    assert step_flops(Case(shape, "bf16", "own")) == formula.total


def test_the_step_needs_the_flops_that_the_formula_counts():
    """torch counts what the step does: that much at least, and less than twice as much."""
    setup = build(CASE)
    setup.sampler.anchors = QUICK.anchors(0)
    counter = FlopCounterMode(display=False)
    with counter:
        loss, slots = training_step(setup, lambda name: None)
    assert slots.tolist() == [QUICK.num_anchors] * QUICK.num_slots and torch.isfinite(loss)
    assert 0.9 < counter.get_total_flops() / step_flops(CASE) < 2.0
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
    assert "step time / FLOPs at peak" in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "step.json").read_text())["cases"]
    own = case[OWN]
    assert own["error"] is None and own["slots"] == 48 and len(own["seconds"]) == 2
    assert own["peak_bytes"] > own["built_bytes"] >= own["imports_bytes"] > 0
    text = (tmp_path / "step.md").read_text()
    assert "2 * A S * D * V           x 2" in text
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_without_the_peer_it_says_what_makes_one(tmp_path):
    with pytest.raises(SystemExit, match="no nowhere/python: run make bench-step"):
        step.main(["--peer-python", "nowhere/python", "--out", str(tmp_path)])
