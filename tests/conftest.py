"""Targets and texts made on the spot: the tests need no shipped weights, no network and no scan of installed packages."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VERBS = ("returns", "adds", "counts", "joins", "sorts", "drops")
NOUNS = ("numbers", "names", "rows", "words", "files", "dates")


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are tiny: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_rows(count: int) -> list[dict]:
    """Rows in EagleChat's schema, all different."""
    rows = []
    for i in range(count):
        verb, noun = VERBS[i % 6], NOUNS[(i // 6) % 6]
        answer = f"def f{i}(x):\n    return x + {i}" if i % 2 else f"It {verb} {i} {noun} and stops."
        rows.append(
            {
                "id": str(i),
                "conversations": [
                    {"role": "user", "content": f"Write a function that {verb} {i} {noun}."},
                    {"role": "assistant", "content": answer},
                ],
            }
        )
    return rows


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(60)))
    return path


@pytest.fixture(scope="session")
def mini_target(tmp_path_factory) -> Path:
    """A target directory with random weights: 4 layers of all kinds, hidden 32, window 16, a 512-entry tokenizer."""
    from src.corpus.tokenizer import train_tokenizer
    from src.target.build import build_target, tiny_config
    from src.target.load import save_target

    path = tmp_path_factory.mktemp("target")
    texts = [m["content"] for row in text_rows(400) for m in row["conversations"]]
    tokenizer = train_tokenizer(texts, vocab_size=320)
    config = tiny_config(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=4,
        moe_intermediate_size=16,
        num_attention_heads=2,
        head_dim=16,
        q_lora_rank=16,
        o_lora_rank=8,
        sliding_window=16,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        num_hash_layers=1,
        initializer_range=0.2,
    )
    model, mtp = build_target(config, seed=1)
    save_target(path, model, mtp)
    tokenizer.save_pretrained(path)
    return path
