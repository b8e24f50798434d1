"""The decoding benchmark records the rounds of every method and batch size, and the command."""

from __future__ import annotations

import json
import sys

from benchmarks import decoding


def test_a_small_run_records_its_rounds_and_its_command(mini_target, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = f"--out {out} --prompts 1 --batch-sizes 1 2 --max-new-tokens 6 --overrides"
    overrides = [f"target.path={mini_target}", "methods=[{name: M, native_steps: 2}]", "threads=1"]
    monkeypatch.setattr(sys, "argv", ["decoding.py", *options.split(), *overrides])
    decoding.main()
    record = json.loads((out / "decoding.json").read_text())
    command = record["environment"]["command"]
    assert command.startswith(f"python -m benchmarks.decoding --out {out} --prompts 1")
    assert "'methods=[{name: M, native_steps: 2}]'" in command
    costs = record["costs"]
    assert [(t["method"], t["batch_size"]) for t in costs] == [("AR", 1), ("M", 1), ("AR", 2), ("M", 2)]
    assert all(t["tau"] * t["rounds"] <= 3 * 5 for t in costs)  # tokens per row after the first ones
    text = (out / "decoding.md").read_text()
    assert text.count("| M |") == 2 and f"`{command}`" in text
