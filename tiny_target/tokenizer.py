"""Trains the tiny target's tokenizer: byte-level BPE with DeepSeek-V4's control tokens."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hyperdflash.data.tokenizer import SPECIAL_TOKENS

# A word includes one leading space or sign (" return", "_name", ".append", "(self"); signs include the line break and the
# indentation after them (":\n        "), so that a Python line starts with one token for its layout.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?:\n+ *)?|\n+ *| +(?! )|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Trains on ``texts``: exactly ``vocab_size`` entries, control tokens first, one entry per digit.

    ValueError where ``vocab_size`` is below the bytes and control tokens, or the texts give fewer entries.
    """
    least = len(SPECIAL_TOKENS) + 256
    if vocab_size < least:
        raise ValueError(
            f"vocab_size must be at least {least} (256 bytes, {len(SPECIAL_TOKENS)} control tokens), got {vocab_size}; "
            "pass 2048 for the tiny target"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"the texts gave only {tokenizer.get_vocab_size()} entries, wanted {vocab_size}; "
            "pass more text or a smaller vocab_size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS["bos"],
        eos_token=SPECIAL_TOKENS["eos"],
        pad_token=SPECIAL_TOKENS["pad"],
        mask_token=SPECIAL_TOKENS["mask"],
        additional_special_tokens=[SPECIAL_TOKENS[name] for name in ("user", "assistant", "think", "think_end")],
        clean_up_tokenization_spaces=False,
        model_max_length=1_000_000,
    )
