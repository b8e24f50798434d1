"""The encoding and the loss mask, token by token."""

from __future__ import annotations

import pytest

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.chat import encode, encode_prompt
from hyperdflash.data.tokenizer import SPECIAL_TOKENS, special_ids
from tiny_target.card.measure import answer_text


def conversation(*contents: str, system: str | None = None) -> Conversation:
    roles = ("user", "assistant")
    turns = [Turn(roles[index % 2], content) for index, content in enumerate(contents)]
    return Conversation("chat/x", "chat", tuple([Turn("system", system)] * (system is not None) + turns))


def by_hand(tokenizer, pieces):
    """(ids, mask) of pieces such as ("<user>", 0) or ("plain text", 1), written out as the document should be."""
    names = special_ids(tokenizer)
    ids, mask = [], []
    for text, supervised in pieces:
        control = getattr(names, text[1:-1], None) if text.startswith("<") else None
        piece = [control] if control is not None else tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        mask += [bool(supervised)] * len(piece)
    return ids, mask


ONE = ("add 2 and 3", "2 + 3 = 5.")
TWO = (*ONE, "and 4?", "<think>5 and 4</think>9.")

CASES = [
    ("non_think", ONE, None, [
        ("<bos>", 0), ("<user>", 0), (ONE[0], 0), ("<assistant>", 0), ("<think_end>", 0), (ONE[1], 1), ("<eos>", 1)]),
    ("non_think", TWO, "Be kind.", [
        ("<bos>", 0), ("Be kind.", 0),
        ("<user>", 0), (TWO[0], 0), ("<assistant>", 0), ("<think_end>", 0), (TWO[1], 1), ("<eos>", 1),
        ("<user>", 0), (TWO[2], 0), ("<assistant>", 0), ("<think_end>", 0), ("9.", 1), ("<eos>", 1)]),
    ("think_high", ONE, None, [
        ("<bos>", 0), ("<user>", 0), (ONE[0], 0), ("<assistant>", 0), ("<think>", 0),
        ("<think_end>", 1), (ONE[1], 1), ("<eos>", 1)]),
    ("think_high", TWO, None, [
        ("<bos>", 0), ("<user>", 0), (TWO[0], 0), ("<assistant>", 0), ("<think_end>", 0), (TWO[1], 1), ("<eos>", 1),
        ("<user>", 0), (TWO[2], 0), ("<assistant>", 0), ("<think>", 0),
        ("5 and 4", 1), ("<think_end>", 1), ("9.", 1), ("<eos>", 1)]),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "contents", "system", "pieces"), CASES)
def test_ids_and_loss_mask_token_by_token(tokenizer, mode, contents, system, pieces):
    document = encode(conversation(*contents, system=system), tokenizer, mode)
    ids, mask = by_hand(tokenizer, pieces)
    assert document.input_ids.tolist() == ids
    assert document.loss_mask.tolist() == mask


def test_reasoning_of_earlier_answers_is_dropped_in_both_modes(tokenizer):
    for mode in ("non_think", "think_high"):
        plain = encode(conversation("a", "b", "c", "d"), tokenizer, mode)
        reasoned = encode(conversation("a", "<think>long thoughts</think>b", "c", "d"), tokenizer, mode)
        assert reasoned.input_ids.tolist() == plain.input_ids.tolist()


@pytest.mark.parametrize("mode", ["non_think", "think_high"])
def test_a_prompt_is_the_document_before_its_last_supervised_part(tokenizer, mode):
    whole = conversation(*TWO)
    document = encode(whole, tokenizer, mode)
    prompt = encode_prompt(conversation(*TWO[:3]), tokenizer, mode)
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert not document.loss_mask[len(prompt) - 1] and document.loss_mask[len(prompt) :].all()
    assert answer_text(document.input_ids[len(prompt) :], tokenizer) == "9."


def test_truncation_keeps_the_start(tokenizer):
    whole = encode(conversation(*TWO), tokenizer)
    cut = encode(conversation(*TWO), tokenizer, max_length=9)
    assert cut.input_ids.tolist() == whole.input_ids[:9].tolist()
    assert cut.loss_mask.tolist() == whole.loss_mask[:9].tolist()


@pytest.mark.parametrize(
    "spelled", [*SPECIAL_TOKENS.values(), "<<think>", "<think><think>x</think>", "<｜User｜><｜Assistant｜></think>"]
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_spelled_in_text_stay_text(tokenizer, spelled, role):
    text = f"say {spelled} please"
    turns = {"system": "s", "user": "u", "assistant": "a"} | {role: text}
    given = conversation(turns["user"], turns["assistant"], system=turns["system"])
    ids = encode(given, tokenizer).input_ids.tolist()
    control = [index for index in ids if index < len(SPECIAL_TOKENS)]
    names = special_ids(tokenizer)
    assert control == [names.bos, names.user, names.assistant, names.think_end, names.eos]
    assert tokenizer.decode([index for index in ids if index >= len(SPECIAL_TOKENS)]).count(spelled) == text.count(spelled)


def test_answer_text_stops_at_the_end_token(tokenizer):
    plain = tokenizer.encode("yes 1", add_special_tokens=False)
    assert answer_text([*plain, 1, *plain], tokenizer) == "yes 1"
    assert answer_text([*plain, 5, *plain[:1], 1], tokenizer) == tokenizer.decode(plain[:1])
    assert answer_text([], tokenizer) == ""


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "user"], ["user", "system"], ["system"], ["user", "assistant", "assistant"]]
)
def test_roles_out_of_order_are_refused(tokenizer, roles):
    with pytest.raises(ValueError, match="wanted an optional system turn"):
        encode(Conversation("chat/bad", "chat", tuple(Turn(role, "x") for role in roles)), tokenizer)


def test_wrong_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="got 'thinking'"):
        encode(conversation(*ONE), tokenizer, "thinking")
    with pytest.raises(ValueError, match="ends at an assistant turn"):
        encode_prompt(conversation(*ONE), tokenizer)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        encode(conversation(*ONE), tokenizer, max_length=0)
