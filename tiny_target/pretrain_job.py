"""Pretrains a tiny DeepSeek-V4 target on the embedded corpus: tokenizer, documents, training, files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from hyperdflash.data.chat import encode
from hyperdflash.identity import runs_dir
from hyperdflash.options import instantiate
from hyperdflash.settings import positive_int
from tiny_target.build import build_target, count_parameters, save_target, tiny_config
from tiny_target.corpus.embedded import load_embedded
from tiny_target.pretraining import pretrain
from tiny_target.tokenizer import train_tokenizer


def pretrain_target(config: DictConfig) -> None:
    """Writes the trained target into ``config.out``; a killed run continues from its last checkpoint."""
    torch.set_num_threads(positive_int("threads", config.threads))
    settings, recipe = instantiate(config.settings), config.recipe
    run, out = runs_dir() / "pretrain" / recipe.name, Path(config.out)
    conversations = load_embedded("train", cache_dir=Path(config.corpus_dir))
    texts = (turn.content for conversation in conversations for turn in conversation.turns)
    tokenizer = train_tokenizer(texts, vocab_size=recipe.vocab_size)
    documents = [encode(conversation, tokenizer).input_ids for conversation in conversations]
    tokens = sum(map(len, documents))
    fields = OmegaConf.to_container(recipe.model, resolve=True)
    model, mtp = build_target(tiny_config(vocab_size=len(tokenizer), **fields), seed=recipe.seed)
    print(
        f"pretrain {recipe.name}: {len(documents):,} documents, {tokens:,} tokens, "
        f"{count_parameters(model, mtp):,} parameters with the MTP block, {settings.steps:,} steps"
    )
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log.jsonl").open("a") as log:

        def write(record: dict) -> None:
            log.write(json.dumps(record) + "\n")
            log.flush()

        digest = hashlib.sha256((tokenizer.backend_tokenizer.to_str() + model.config.to_json_string()).encode())
        for document in documents:
            digest.update(document.numpy().tobytes())
        control_ids = tokenizer.all_special_ids
        last = pretrain(model, mtp, documents, settings, run / "checkpoint.pt", digest.hexdigest(), control_ids, write)
    tokenizer.save_pretrained(out)
    path = save_target(out, model, mtp)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB) after {last.get('elapsed_s', 0) / 60:.0f} minutes")
