"""What does not fit is left out, counted and named; nothing is cut."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.chat import encode_rounds
from hyperdflash.data.prompts import Prompts, named, needed_tokens


def prompt(name: str, *texts: str) -> Conversation:
    return Conversation(f"{name}/{len(texts)}-{len(texts[0])}", name, tuple(Turn("user", text) for text in texts))


@dataclass(frozen=True, kw_only=True)
class Given(Prompts):
    rows: list

    def conversations(self):
        return self.rows


def test_the_rule_by_hand():
    encoded = [[[1] * 10], [[1] * 11], [[1] * 4, [1] * 3], [[1] * 2, [1] * 9]]
    assert [needed_tokens(rounds, 20) for rounds in encoded] == [10 + 20, 11 + 20, 7 + 40, 11 + 40]


@pytest.mark.parametrize("mode", ["non_think", "think_high"])
def test_long_prompts_are_left_out_whole_and_named(tokenizer, mode, caplog):
    prompts = [prompt("gsm8k", "add 2"), prompt("gsm8k", "add 2 and 3 " * 9), prompt("mt-bench", "a", "b")]
    needed = [sum(map(len, encode_rounds(p, tokenizer, mode))) + 8 * len(p.turns) for p in prompts]
    kept = Given(rows=prompts, max_length=needed[1], max_new_tokens=8).fitting(tokenizer, mode)
    assert kept == prompts and not caplog.records
    kept = Given(rows=prompts, max_length=needed[1] - 1, max_new_tokens=8).fitting(tokenizer, mode)
    assert kept == [prompts[0], prompts[2]]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    line = caplog.messages[0]
    assert line.startswith("benchmark gsm8k: 1 of 2 prompts left out: longer than max_length=")
    assert prompts[1].id in line and f"needs {needed[1]}" in line
    kept = Given(rows=prompts, max_length=needed[1], max_new_tokens=8).fitting(tokenizer, mode, context=needed[1] - 1)
    assert kept == [prompts[0], prompts[2]] and f"longer than the target's context of {needed[1] - 1}" in caplog.messages[1]


def test_a_benchmark_without_any_fitting_prompt_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"none of the 1 prompts of mt-bench fits max_length=21.*raise benchmarks\.max_length"):
        rows = [prompt("mt-bench", "a", "b"), prompt("gsm8k", "a")]
        Given(rows=rows, max_length=21, max_new_tokens=8).fitting(tokenizer, "non_think")


def test_many_names_are_counted():
    assert named(["a", "b"]) == "a, b"
    assert named([str(n) for n in range(23)]).endswith("18, 19 and 3 more")


def test_both_options_of_benchmarks_share_it(tokenizer, caplog):
    from hyperdflash.data.prompts import HeldoutPrompts

    benchmark = HeldoutPrompts(per_domain=3, max_new_tokens=8, max_length=10_000)
    assert benchmark.fitting(tokenizer, "think_high") == benchmark.conversations()
    shorter = HeldoutPrompts(per_domain=3, max_new_tokens=8, max_length=150)
    assert 0 < len(shorter.fitting(tokenizer, "non_think")) < 9 and "left out" in caplog.text
