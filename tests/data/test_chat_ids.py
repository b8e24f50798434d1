"""DeepSeek-V4's encoding against ids and strings written out by hand, one and several turns, both modes."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.chat import encode, encode_prompt, encode_rounds, history_after
from hyperdflash.data.tokenizer import SPECIAL_TOKENS

# the ids that DeepSeek-V4's tokenizer is reported to have
BOS, EOS, USER, ASSISTANT, THINK, THINK_END = 0, 1, 128803, 128804, 128821, 128822
CONTROL = {"bos": BOS, "eos": EOS, "pad": 2, "mask": 128799, "user": USER, "assistant": ASSISTANT}
CONTROL |= {"think": THINK, "think_end": THINK_END}
WORDS = {"be": 11, "kind": 12, "add": 13, "two": 14, "five": 15, "and": 16, "nine": 17, "hm": 18, "so": 19}


@pytest.fixture(scope="module")
def deepseek():
    """A word a token."""
    vocabulary = {SPECIAL_TOKENS[name]: index for name, index in CONTROL.items()} | WORDS
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="hm"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(SPECIAL_TOKENS[name], special=True) for name in CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS["eos"])


def conversation(*contents: str, system: str | None = None) -> Conversation:
    turns = [Turn(("user", "assistant")[index % 2], content) for index, content in enumerate(contents)]
    return Conversation("chat/x", "chat", tuple([Turn("system", system)] * (system is not None) + turns))


TWO = ("add two", "<think>hm</think>five", "and two", "<think>so hm</think>nine")
FIRST = [BOS, 11, 12, USER, 13, 14, ASSISTANT]


@pytest.mark.parametrize(
    ("mode", "ids", "supervised"),
    [
        (
            "non_think",
            [*FIRST, THINK_END, 15, EOS, USER, 16, 14, ASSISTANT, THINK_END, 17, EOS],
            [8, 9, 15, 16],
        ),
        (
            "think_high",
            [*FIRST, THINK_END, 15, EOS, USER, 16, 14, ASSISTANT, THINK, 19, 18, THINK_END, 17, EOS],
            [8, 9, 15, 16, 17, 18, 19],
        ),
    ],
)
def test_two_turns_by_hand(deepseek, mode, ids, supervised):
    document = encode(conversation(*TWO, system="be kind"), deepseek, mode)
    assert document.input_ids.tolist() == ids
    assert document.loss_mask.nonzero().flatten().tolist() == supervised
    assert encode_prompt(conversation(*TWO[:3], system="be kind"), deepseek, mode) == ids[:15]


def test_one_turn_by_hand(deepseek):
    one = conversation(*TWO[:2])
    assert encode(one, deepseek, "non_think").input_ids.tolist() == [BOS, USER, 13, 14, ASSISTANT, THINK_END, 15, EOS]
    assert encode(one, deepseek, "think_high").input_ids.tolist() == [
        *[BOS, USER, 13, 14, ASSISTANT, THINK, 18, THINK_END, 15, EOS]
    ]


@pytest.mark.parametrize(("mode", "header"), [("non_think", THINK_END), ("think_high", THINK)])
def test_rounds_that_the_model_answers_itself(deepseek, mode, header):
    user_turns = Conversation("mt-bench/x", "mt-bench", (Turn("user", "add two"), Turn("user", "and two")))
    rounds = [[BOS, USER, 13, 14, ASSISTANT, header], [USER, 16, 14, ASSISTANT, header]]
    assert encode_rounds(user_turns, deepseek, mode) == rounds
    assert encode_rounds(conversation(*TWO[:3]), deepseek, mode) == rounds  # an answer in between is not the model's own
    with pytest.raises(ValueError, match="roles user, user"):
        encode(user_turns, deepseek, mode)


def test_reasoning_leaves_the_history(deepseek):
    prompt, history = [BOS, USER, 13, ASSISTANT, THINK], [BOS, USER, 13, ASSISTANT, THINK_END]
    assert history_after(prompt, [19, 18, THINK_END, 15, EOS], deepseek, "think_high") == [*history, 15, EOS]
    assert history_after(prompt, [19, THINK_END, 18, THINK_END, 15, EOS], deepseek, "think_high") == [*history, 15, EOS]
    assert history_after(prompt, [19, 18, EOS], deepseek, "think_high") == [*history, EOS]  # it never got to an answer
    with pytest.raises(ValueError, match="ends in <think>, got token 128822"):
        history_after(history, [15, EOS], deepseek, "think_high")
    # and is what encoding the finished turns as text gives
    first, second = encode_rounds(conversation(*TWO[:3]), deepseek, "think_high")
    answered = history_after(first, [18, THINK_END, 15, EOS], deepseek, "think_high")
    assert [*answered, *second] == encode_prompt(conversation(*TWO[:3]), deepseek, "think_high")


@pytest.mark.parametrize("mode", ["non_think", "think_high"])
@pytest.mark.parametrize("seed", range(8))
def test_the_mask_token_by_token(deepseek, mode, seed):
    """Against a reader of ids that knows no encoding: supervised is what stands between an assistant's header and the next
    turn, the header (two tokens) left out."""
    rng = random.Random(seed)

    def words(count):
        return " ".join(rng.choices(list(WORDS), k=count))

    contents = [words(rng.randint(1, 5)) for _ in range(rng.randint(1, 9))]
    for index in range(1, len(contents), 2):
        contents[index] = f"<think>{words(2)}</think>{contents[index]}" if rng.random() < 0.5 else contents[index]
    made = conversation(*contents, system=words(3) if rng.random() < 0.5 else None)
    document = encode(made, deepseek, mode)

    ids, supervised, left = document.input_ids.tolist(), [], None  # tokens left of an assistant's header
    for index in ids:
        left = 2 if index == ASSISTANT else None if index == USER else left
        supervised.append(left == 0)
        left = max(0, left - 1) if left is not None else None
    assert document.loss_mask.tolist() == supervised

    answers = [turn.content.split("</think>")[-1] for turn in made.turns if turn.role == "assistant"]
    assert ids.count(EOS) == len(answers) and all(supervised[i] for i, index in enumerate(ids) if index == EOS)
    last = made.turns[-1].content if made.turns[-1].role == "assistant" and mode == "think_high" else None
    reasoning = 0 if last is None else 1 + 2 * last.startswith("<think>")  # its end token and its two words
    assert sum(supervised) == sum(len(answer.split()) + 1 for answer in answers) + reasoning
    for length in range(1, len(document.input_ids), 3):  # a cut changes nothing before it
        cut = encode(made, deepseek, mode, length)
        assert cut.loss_mask.tolist() == document.loss_mask[:length].tolist()


def test_as_strings(tokenizer):
    def text(mode):
        return tokenizer.decode(encode(conversation(*TWO, system="Be kind."), tokenizer, mode).input_ids)

    start = "<｜begin▁of▁sentence｜>Be kind.<｜User｜>add two<｜Assistant｜></think>five<｜end▁of▁sentence｜><｜User｜>and two"
    assert text("non_think") == f"{start}<｜Assistant｜></think>nine<｜end▁of▁sentence｜>"
    assert text("think_high") == f"{start}<｜Assistant｜><think>so hm</think>nine<｜end▁of▁sentence｜>"
