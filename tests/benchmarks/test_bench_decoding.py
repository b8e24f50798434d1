"""The decoding bench measures places and methods in turn, and writes down what was measured and by which command."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import decoding
from benchmarks.decoding import EARLY, LATE, REPEATS, SPAN
from hyperdflash.decoding.loop import FirstToken, Generation, Round, Seconds
from hyperdflash.drafting.proposer import Autoregressive


def generation(anchor: int, tokens: int, seconds: float) -> Generation:
    """One token a round, each round ``seconds`` drafting and twice that verifying."""
    times = Seconds(draft=seconds, verify=2 * seconds, rest=0.001)
    rounds = tuple(Round(anchor + i, (), 0, (7,), times) for i in range(tokens - 1))
    return Generation((7,) * tokens, "length", FirstToken(7, Seconds(verify=0.5)), rounds)


def test_growth_alternates_between_early_and_late(monkeypatch):
    calls = []

    def decode(model, drafter, prompt, *, stop_ids, max_new_tokens):
        assert stop_ids == ()
        calls.append((drafter, len(prompt), max_new_tokens))
        late = len(prompt) > LATE
        return generation(len(prompt), max_new_tokens, 0.02 if late else 0.01)

    monkeypatch.setattr(decoding, "decode", decode)
    prompts, drafters = [[1] * 5, [2] * 9], {"AR": object(), "X": object()}
    found = decoding.growth(SimpleNamespace(model=None), drafters, prompts)
    grown, measured = calls[:2], calls[2:]
    assert [(length, tokens) for _, length, tokens in grown] == [(5, LATE), (9, LATE)]
    assert all(isinstance(drafter, Autoregressive) for drafter, *_ in grown)
    assert len(measured) == REPEATS * len(prompts) * len(drafters) * 2
    for one, two in zip(measured[::2], measured[1::2], strict=True):  # the same method and text, one place after the other
        assert one[0] is two[0] and {one[1] - two[1], two[1] - one[1]} == {LATE - EARLY, EARLY - LATE}
        assert one[2] == two[2] == SPAN
    per_repeat = len(measured) // REPEATS
    first = [measured[repeat * per_repeat][0] for repeat in range(REPEATS)]
    assert first == [drafters[name] for name in ("AR", "X", "AR", "X")]
    assert {calls[2][1] > LATE, calls[2 + len(measured) // REPEATS][1] > LATE} == {True, False}
    assert [g.method for g in found] == ["AR", "X"]
    assert found[0].early == pytest.approx((10, 20, 1)) and found[0].late == pytest.approx((20, 40, 1))
    assert "| AR | 10.00 | 20.00 | 1.00 | 20.00 | 40.00 | 1.00 | 1.97 | 2.00 | 1.91 |" in decoding.growth_lines(found)


def test_a_small_run_records_its_rounds_and_its_command(mini_target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoding, "LATE", 24)
    monkeypatch.setattr(decoding, "EARLY", 8)
    monkeypatch.setattr(decoding, "SPAN", 4)
    out = tmp_path / "out"
    options = f"--out {out} --prompts 1 --long-prompts 1 --batch-sizes 1 2 --max-new-tokens 6 --overrides"
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
    assert [grown["method"] for grown in record["growth"]] == ["AR", "M"]
    text = (out / "decoding.md").read_text()
    assert text.count("| M |") == 3 and f"`{command}`" in text
    assert (out / "decoding.png").read_bytes().startswith(b"\x89PNG")
