"""A target that answers several user turns: what each turn sees, and which documents come out, in both modes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hyperdflash.answers import responses
from hyperdflash.answers.exchange import AnswerSettings
from hyperdflash.answers.responses import answer_conversations
from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.chat import encode_prompt
from hyperdflash.data.tokenizer import load_tokenizer, special_ids

MT_BENCH = Conversation("mt-bench/x", "mt-bench", (Turn("user", "adds 3 rows"), Turn("user", "joins 4 names")))
ONE = Conversation("gsm8k/x", "gsm8k", (Turn("user", "counts 5"),))


@pytest.fixture
def answer(mini_target, tmp_path, monkeypatch):
    """answer(mode, {(conversation's row, turn): text}) -> (documents, prompts asked); texts may spell </think> and <eos>."""
    tokenizer = load_tokenizer(mini_target)
    names = special_ids(tokenizer)
    control = {"</think>": names.think_end, "<eos>": names.eos}

    def ids(text):
        out = []
        for part in text.replace("</think>", "|</think>|").replace("<eos>", "|<eos>|").split("|"):
            out += [control[part]] if part in control else tokenizer.encode(part, add_special_tokens=False)
        return out

    def run(mode, turns, conversations=(MT_BENCH,), **limits):
        asked, script = [], iter(turns)

        def generate_batch(model, prompts, **_):
            asked.append(prompts)
            yield from enumerate([ids(text) for text in next(script)])

        monkeypatch.setattr(responses, "generate_batch", generate_batch)
        target = SimpleNamespace(model=SimpleNamespace(device="cpu"), fingerprint="f")
        settings = AnswerSettings(mode=mode, **({"max_length": 200} | limits))
        arguments = (conversations, lambda: target, "f", tokenizer, settings, tmp_path / "answers")
        found = answer_conversations(*arguments)
        again = answer_conversations(*arguments)  # from disk: the script has no more
        assert [(d.id, d.input_ids.tolist(), d.loss_mask.tolist()) for d in again] == [
            (d.id, d.input_ids.tolist(), d.loss_mask.tolist()) for d in found
        ]
        return found, asked

    run.ids, run.names, run.tokenizer = ids, names, tokenizer
    return run


def supervised(document):
    return document.input_ids[document.loss_mask].tolist()


def test_non_think_is_one_document(answer):
    documents, asked = answer("non_think", [["It adds.<eos>"], ["It joins.<eos>"]])
    (document,) = documents
    first = encode_prompt(Conversation("x", "chat", MT_BENCH.turns[:1]), answer.tokenizer)
    assert asked[0] == [first]
    assert asked[1][0][: len(first)] == first
    assert document.id == "mt-bench/x"
    assert document.input_ids.tolist() == asked[1][0] + answer.ids("It joins.<eos>")
    assert supervised(document) == answer.ids("It adds.<eos>") + answer.ids("It joins.<eos>")


def test_think_high_is_a_document_a_turn_and_drops_earlier_reasoning(answer):
    documents, asked = answer("think_high", [["hm 7</think>It adds.<eos>"], ["so</think>It joins.<eos>"]])
    names, ids = answer.names, answer.ids
    header = [names.assistant, names.think]
    first = [names.bos, names.user, *ids("adds 3 rows"), *header]
    history = [*first[:-1], names.think_end, *ids("It adds."), names.eos]
    second = [*history, names.user, *ids("joins 4 names"), *header]
    assert asked == [[first], [second]]
    assert [document.id for document in documents] == ["mt-bench/x#1", "mt-bench/x"]
    assert documents[0].input_ids.tolist() == first + ids("hm 7</think>It adds.<eos>")
    assert documents[1].input_ids.tolist() == second + ids("so</think>It joins.<eos>")
    assert [supervised(document) for document in documents] == [
        ids("hm 7</think>It adds.<eos>"),
        ids("so</think>It joins.<eos>"),
    ]
    assert {document.domain for document in documents} == {"mt-bench"}


@pytest.mark.parametrize("mode", ["non_think", "think_high"])
def test_an_unfinished_answer_ends_the_conversation(answer, mode, capsys):
    documents, asked = answer(mode, [["It adds 3 and"]])
    assert len(asked) == 1 and [document.id for document in documents] == ["mt-bench/x"]
    assert "1 of 1 end at max_new_tokens=192 or max_length=200: mt-bench/x" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["non_think", "think_high"])
def test_a_prompt_without_room_is_named(answer, mode, capsys):
    long = Conversation("gsm8k/long", "gsm8k", (Turn("user", "counts 5 dates " * 20),))
    documents, _ = answer(mode, [["It counts.<eos>"]], conversations=(long, ONE), max_length=40)
    assert [document.id for document in documents] == ["gsm8k/x"]
    printed = capsys.readouterr().out
    assert "1 of 2 prompts left out, no room for an answer within max_length=40: gsm8k/long" in printed
    assert "not asked" not in printed


def test_an_answer_that_a_crash_cut_is_made_again(answer, tmp_path):
    script = [["It counts.<eos>", "It adds.<eos>"], ["It joins.<eos>"]]
    documents, _ = answer("non_think", script, conversations=(MT_BENCH, ONE))
    (kept,) = (tmp_path / "answers").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-9])
    again, asked = answer("non_think", script, conversations=(MT_BENCH, ONE))
    assert len(asked) == 2 and [d.input_ids.tolist() for d in again] == [d.input_ids.tolist() for d in documents]
    assert kept.read_bytes() == whole[: whole.index(b"\n") + 1] + whole  # the batch as a whole


def test_the_model_itself_answers_both_turns_in_think_high(mini_target, tmp_path):
    from hyperdflash.targets.load import load_target

    target = load_target(path=mini_target, dtype="fp32", attention="windowed", experts="dense")
    tokenizer = load_tokenizer(mini_target)
    settings = AnswerSettings(mode="think_high", max_new_tokens=6, max_length=120)
    documents = answer_conversations([MT_BENCH, ONE], lambda: target, target.fingerprint, tokenizer, settings, tmp_path)
    assert documents[-1].id == "gsm8k/x"
    for document in documents:
        start = document.prompt_length
        assert document.input_ids[start - 1] == special_ids(tokenizer).think
        assert torch.equal(document.loss_mask, torch.arange(len(document.input_ids)) >= start)
