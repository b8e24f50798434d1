"""Control tokens at fixed ids, single digits, nothing lost."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hyperdflash.data.tokenizer import SPECIAL_TOKENS, SpecialIds, load_tokenizer, special_ids
from tiny_target.tokenizer import train_tokenizer


def test_control_tokens_have_fixed_ids_and_survive_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for candidate in (tokenizer, loaded):
        assert special_ids(candidate) == SpecialIds(bos=0, eos=1, user=2, assistant=3, think=4, think_end=5, pad=6, mask=7)
        assert len(candidate) == 300
        assert (candidate.bos_token_id, candidate.eos_token_id, candidate.pad_token_id) == (0, 1, 6)
    text = "def add(a, b):\n    return a + 145"
    assert loaded.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    "text",
    ["x = 1\n\n\n    y\t é 漢字 \x01 ½", "  leading", "trailing  ", "\r\n", "a" * 50, "if a:\n        return 'ß'\n"],
)
def test_any_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_digit_is_a_token(tokenizer):
    texts = ["1234567890", "x12", "3 + 14 = 17", "1.5", "a_1b22"]
    trained = train_tokenizer(["12 12 12 123 123 1234 1234 12.5 the value of a name"] * 50 + texts, vocab_size=270)
    for text in texts:
        tokens = trained.convert_ids_to_tokens(trained.encode(text, add_special_tokens=False))
        assert [token for token in tokens if any(map(str.isdigit, token))] == [sign for sign in text if sign.isdigit()]


def test_indentation_is_one_token():
    code = "a = b\n    c = d\n        e = f\n            g = h\n" * 3 + "def value(name): return other"
    trained = train_tokenizer([code] * 20, vocab_size=290)
    for width in (4, 8, 12):
        assert len(trained.encode("\n" + " " * width, add_special_tokens=False)) == 1


def test_training_is_deterministic():
    texts = ["return the value of a", "return the name of b", "def f(a):\n    return a"] * 4
    assert train_tokenizer(texts, 290).get_vocab() == train_tokenizer(texts, 290).get_vocab()


def test_vocabulary_size_is_exact_or_refused():
    with pytest.raises(ValueError, match="at least 264"):
        train_tokenizer(["a"], vocab_size=100)
    with pytest.raises(ValueError, match="gave only"):
        train_tokenizer(["ab"], vocab_size=2048)


def deepseek_like(*, with_user: bool = True) -> PreTrainedTokenizerFast:
    """DeepSeek-V4's ids for the control tokens; it has no mask token."""
    vocabulary = {f"w{index}": index for index in range(128825)}
    placed = {"bos": 0, "eos": 1, "pad": 2, "user": 128803, "assistant": 128804, "think": 128821, "think_end": 128822}
    for name, index in placed.items():
        if name != "user" or with_user:
            del vocabulary[f"w{index}"]
            vocabulary[SPECIAL_TOKENS[name]] = index
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w3")))


def test_ids_of_a_tokenizer_without_mask_token():
    tokenizer = deepseek_like()
    with pytest.raises(ValueError, match="mask_id=128799"):
        special_ids(tokenizer)
    found = special_ids(tokenizer, mask_id=128799)
    assert (found.user, found.assistant, found.think, found.think_end, found.mask) == (
        128803,
        128804,
        128821,
        128822,
        128799,
    )
    with pytest.raises(ValueError, match="got 999999"):
        special_ids(tokenizer, mask_id=999999)
    with pytest.raises(ValueError, match="has no <｜User｜>"):
        special_ids(deepseek_like(with_user=False), mask_id=128799)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
