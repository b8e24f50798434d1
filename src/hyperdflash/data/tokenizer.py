"""DeepSeek-V4's control tokens, and their ids in any tokenizer that has them."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hyperdflash.files import REFETCH, read_json, reading, sha256_of

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
DEEPSEEK_V4_MASK_ID = 128799  # a reserved id of DeepSeek-V4's vocabulary; the released DSpark drafter uses it too


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the control tokens; ``mask`` stands for the tokens that the drafter predicts."""

    bos: int
    eos: int
    user: int
    assistant: int
    think: int
    think_end: int
    pad: int
    mask: int


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a folder with ``tokenizer.json``, never from the hub; ValueError where the file is absent."""
    path = Path(path)
    if not (path / "tokenizer.json").is_file():
        advice = "wanted a folder written by save_pretrained; make the tiny one with `python -m src.pretrain`"
        raise ValueError(f"no tokenizer.json in {path}; {advice}")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).exists():
            read_json(path / name, REFETCH)
    with reading(path / "tokenizer.json", REFETCH):
        return PreTrainedTokenizerFast.from_pretrained(path)


def tokenizer_fingerprint(path: str | Path) -> str:
    """Returns 16 hexadecimal digits of the hash of tokenizer.json, which decides the ids of every text."""
    return sha256_of(Path(path) / "tokenizer.json")[:16]


def special_ids(tokenizer: PreTrainedTokenizerBase, mask_id: int | None = None) -> SpecialIds:
    """Looks the ids up by the tokens' text; ValueError where one is absent.

    ``mask_id`` is the mask of a tokenizer without ``<｜mask｜>`` (DeepSeek-V4: 128799).
    """
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
