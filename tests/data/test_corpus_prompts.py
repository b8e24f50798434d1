"""The committed evaluation prompts, and the command that writes them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from hyperdflash.contracts import DOMAINS, Conversation, Turn
from hyperdflash.data.chat import encode_prompt
from hyperdflash.data.prompts import eval_prompts_file, load_eval_prompts
from tiny_target.corpus import __main__ as command
from tiny_target.corpus.eval_prompts import as_prompt, final_number, write_prompts


def test_committed_prompts_are_enough_and_end_at_a_user_turn(tokenizer):
    prompts = load_eval_prompts()
    counts = Counter(prompt.domain for prompt in prompts)
    assert set(counts) == set(DOMAINS) and min(counts.values()) >= 300
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert prompt.turns[-1].role == "user"
        encode_prompt(prompt, tokenizer)
    assert len(load_eval_prompts("code")) == counts["code"]
    with pytest.raises(ValueError, match="got 'maths'"):
        load_eval_prompts("maths")


def reference_answers(path) -> dict[str, int]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row["answer"] for row in rows if "answer" in row}


def test_every_maths_prompt_has_its_number_and_both_kinds_are_there():
    prompts = load_eval_prompts("math")
    answers = reference_answers(eval_prompts_file())
    assert {prompt.id for prompt in prompts} == set(answers)
    kinds = Counter(prompt.id.split("/")[1] for prompt in prompts)
    assert min(kinds["seen"], kinds["unseen"]) >= 150


def heldout(count: int) -> list[Conversation]:
    question, answer = Turn("user", "1 + 1?"), Turn("assistant", "1 + 1 = 2. The answer is 2.")
    ids = [f"{kind}/{n}" for kind in ("math/seen", "math/unseen", "code", "chat") for n in range(count)]
    return [Conversation(name, name.split("/")[0], (question, answer)) for name in ids]


def test_prompts_are_written_and_read_back(tmp_path):
    path = tmp_path / "prompts.jsonl"
    assert write_prompts(heldout(4), path, per_domain=4) == 12
    prompts = load_eval_prompts(path=path)
    assert Counter(prompt.domain for prompt in prompts) == {"math": 4, "code": 4, "chat": 4}
    assert all(prompt.turns == (Turn("user", "1 + 1?"),) for prompt in prompts)
    assert set(reference_answers(path).values()) == {2} and len(reference_answers(path)) == 4
    assert all("answer" not in json.loads(line) for line in path.read_text().splitlines() if '"code"' in line)
    with pytest.raises(ValueError, match="3 of code"):
        write_prompts(heldout(1), path, per_domain=4)


def test_prompt_helpers():
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    assert as_prompt(Conversation("x", "chat", turns)).turns == turns[:3]
    assert as_prompt(Conversation("x", "chat", turns[:3])).turns == turns[:3]
    assert final_number("2 + 2 = 4. The answer is 4.") == 4
    assert final_number("no number") is None


def test_the_command_prints_counts_and_writes_the_prompts(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "load_embedded", lambda split: heldout(3))
    monkeypatch.setattr(command, "write_prompts", lambda rows: write_prompts(rows, tmp_path / "prompts.jsonl", per_domain=3))
    command.main(["--write-prompts"])
    assert "heldout, math: 6 conversations, 0.00 MB" in capsys.readouterr().out
    assert len(load_eval_prompts(path=tmp_path / "prompts.jsonl")) == 9
