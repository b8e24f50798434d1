"""Byte-level BPE with DeepSeek-V4's control tokens, and the ids of those tokens in any tokenizer that has them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# order = ids in the tiny tokenizer
SPECIAL_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "user": "<｜User｜>",
    "assistant": "<｜Assistant｜>",
    "think": "<think>",
    "think_end": "</think>",
    "pad": "<｜▁pad▁｜>",
    "mask": "<｜mask｜>",
}
DEEPSEEK_V4_MASK_ID = 128799  # reserved in DeepSeek-V4's vocabulary; the released DSpark drafter uses it too

# A word keeps one leading space or sign (" return", "_name", ".append", "(self"); signs take the line break and the
# indentation after them (":\n        "), so that a Python line starts with one token for its layout.
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+(?:\n+ *)?|\n+ *| +(?! )|\s+"


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the control tokens. ``mask`` fills the drafter's unknown slots."""

    bos: int
    eos: int
    user: int
    assistant: int
    think: int
    think_end: int
    pad: int
    mask: int


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train on ``texts``: exactly ``vocab_size`` entries, control tokens first, every digit on its own."""
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


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load from a folder with ``tokenizer.json`` (never from the hub)."""
    path = Path(path)
    if not (path / "tokenizer.json").is_file():
        raise ValueError(
            f"no tokenizer.json in {path}; wanted a folder written by save_pretrained; "
            "make the tiny one with `python -m src.pretrain`"
        )
    return PreTrainedTokenizerFast.from_pretrained(path)


def tokenizer_fingerprint(path: str | Path) -> str:
    """16 hex digits over tokenizer.json, which decides every id that text becomes."""
    return hashlib.sha256((Path(path) / "tokenizer.json").read_bytes()).hexdigest()[:16]


def special_ids(tokenizer: PreTrainedTokenizerBase, mask_id: int | None = None) -> SpecialIds:
    """Ids by token text. ``mask_id`` serves a tokenizer without ``<｜mask｜>`` (DeepSeek-V4: 128799)."""
    vocabulary = tokenizer.get_vocab()
    found = {name: vocabulary.get(token) for name, token in SPECIAL_TOKENS.items()}
    if mask_id is not None:
        if not 0 <= mask_id < max(vocabulary.values()) + 1:
            raise ValueError(f"mask_id must be an id of the tokenizer (0 to {max(vocabulary.values())}), got {mask_id}")
        found["mask"] = mask_id
    if found["pad"] is None:
        found["pad"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else found["eos"]
    absent = [SPECIAL_TOKENS[name] for name, value in found.items() if value is None]
    if absent:
        hint = f"; pass mask_id={DEEPSEEK_V4_MASK_ID} for DeepSeek-V4" if found["mask"] is None else ""
        raise ValueError(f"the tokenizer has no {', '.join(absent)}; wanted DeepSeek-V4's control tokens{hint}")
    return SpecialIds(**found)
