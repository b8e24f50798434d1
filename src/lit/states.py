"""Documents of a configuration and their target states: answers, capture, data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from src.blocks.anchors import eligible_anchors
from src.cache.capture import CachedStates, capture
from src.cache.store import CacheKey, StateStore
from src.contracts import Conversation, Document
from src.corpus.chat import encode
from src.entry import runs_dir
from src.lit.parts import Parts, make_parts
from src.target.heads import TargetHeads
from src.target.load import Target, fingerprint, load_heads
from src.target.producer import InProcess, Producer
from src.target.responses import AnswerSettings, answer_conversations


def lazy_target(config: DictConfig) -> Callable[[], Target]:
    """Loads on the first call."""

    @cache
    def load() -> Target:
        print(f"loading the target from {config.target.path}", flush=True)
        return instantiate(config.target)

    return load


def lazy_producer(target: Callable[[], Target]) -> Callable[[], Producer]:
    """The same, as what fills a cache."""
    return lambda: InProcess(target())


def open_store(config: DictConfig, heads: TargetHeads) -> StateStore:
    """The cache directory of this target and dtype."""
    key = CacheKey(
        target=fingerprint(heads),
        target_dtype=config.target.dtype,
        num_paths=heads.num_paths,
        hidden_size=heads.hidden_size,
        dtype=config.cache.dtype,
    )
    return StateStore(Path(config.cache.directory) / f"{key.target}-{key.target_dtype}-{key.dtype}", key)


def make_documents(
    conversations: Sequence[Conversation],
    config: DictConfig,
    parts: Parts,
    heads: TargetHeads,
    target: Callable[[], Target],
) -> list[Document]:
    """Encoded conversations with the target's or the corpus's answers; those without a supervised pair are dropped."""
    corpus = parts.corpus
    if corpus.responses == "original":
        documents = [encode(c, parts.tokenizer, config.mode, corpus.max_length) for c in conversations]
    else:
        settings = AnswerSettings(
            temperature=corpus.temperature,
            top_p=corpus.top_p,
            max_new_tokens=corpus.max_new_tokens,
            max_length=corpus.max_length,
            mode=config.mode,
            seed=config.seed if corpus.temperature > 0 else 0,
            dtype=config.target.dtype,
        )
        documents = answer_conversations(
            conversations, target, fingerprint(heads), parts.tokenizer, settings, runs_dir() / "responses"
        )
    return with_supervised_pair(documents)


def with_supervised_pair(documents: Sequence[Document]) -> list[Document]:
    """Documents that can give an anchor; says how many cannot, and ValueError where none can."""
    kept = [d for d in documents if eligible_anchors(d.loss_mask[None], torch.tensor([len(d.loss_mask)])).any()]
    if not kept:
        raise ValueError(
            f"none of {len(documents)} documents has two supervised tokens in a row, so there is nothing to train on: "
            "check corpus.stage1 or corpus.stage2, corpus.max_length and the loss mask of the source"
        )
    if len(kept) < len(documents):
        print(f"{len(documents) - len(kept)} of {len(documents)} documents have no two supervised tokens in a row: dropped")
    return kept


def cached_data(config: DictConfig, parts: Parts, heads: TargetHeads, store: StateStore) -> dict[str, CachedStates]:
    """Training and validation documents with their states in the cache; the target is loaded if anything is missing."""
    target = lazy_target(config)
    data = {}
    # tau at temperature 0 is defined on the target's own greedy text, whatever is trained on
    greedy = replace(parts, corpus=replace(parts.corpus, responses="target", temperature=0.0, top_p=1.0))
    for name, conversations, source in (
        ("train", parts.corpus.train(), parts),
        ("validation", parts.corpus.validation_conversations(), greedy),
    ):
        documents = make_documents(conversations, config, source, heads, target)
        tokens = sum(len(d.input_ids) for d in documents)
        supervised = sum(int(d.loss_mask.sum()) for d in documents)
        print(f"{name}: {len(documents):,} documents, {tokens:,} tokens, {supervised:,} supervised", flush=True)
        per_shard = config.cache.documents_per_shard
        shards = capture(documents, store, lazy_producer(target), layer_ids=parts.layer_ids, documents_per_shard=per_shard)
        data[name] = CachedStates(store, shards, parts.layer_ids)
    return data


def capture_states(config: DictConfig) -> None:
    """The first half of ``train``: answers and states of a configuration, on disk."""
    parts = make_parts(config)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    heads = load_heads(config.target.path)
    store = open_store(config, heads)
    cached_data(config, parts, heads, store)
    print(f"states are in {store.directory}")
