"""Documents of a configuration and their target states: answers, capture, data sets."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from hyperdflash.answers.responses import AnswerSettings, answer_conversations
from hyperdflash.answers.served_answers import served_documents
from hyperdflash.cli import command_of, given_overrides
from hyperdflash.contracts import Conversation, Document
from hyperdflash.data.chat import ENCODING_VERSION, encode
from hyperdflash.data.tokenizer import tokenizer_fingerprint
from hyperdflash.drafting.anchors import eligible_anchors
from hyperdflash.engines.producer import engine_producer
from hyperdflash.identity import runs_dir
from hyperdflash.preparing.answers import answer_settings, answers_dir, served_file
from hyperdflash.preparing.corpus_account import count_documents, tell_corpus
from hyperdflash.states.datasets import ShardedStates
from hyperdflash.states.leases import alone
from hyperdflash.states.manifest import IN_PROCESS
from hyperdflash.states.modes import CacheMode, Stream
from hyperdflash.states.store import CacheKey, StateStore
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import Target, fingerprint, load_heads
from hyperdflash.targets.producer import InProcess, Producer
from hyperdflash.training.components import Parts, make_parts


class NoTarget(ValueError):
    """The cache's mode wants no target in this process."""


def lazy_target(config: DictConfig) -> Callable[[], Target]:
    """Loads on the first call; ValueError there where the cache's mode wants no target."""

    @cache
    def load() -> Target:
        mode = open_mode(config)
        if not mode.loads_target:
            raise NoTarget(f"cache={mode.name} loads no target here, and answers or states are missing: run `{fill_command()}`")
        print(f"loading the target from {config.target.path}", flush=True)
        return instantiate(config.target)

    return load


def open_mode(config: DictConfig) -> CacheMode:
    """The checked group ``cache``."""
    return instantiate(config.cache)


def fill_command() -> str:
    """What to run where a read-only cache lacks something: this command without training, and with a cache that is written."""
    name = HydraConfig.get().job.config_name if HydraConfig.initialized() else "train"
    command = command_of("src.capture" if name == "train" else f"src.{name}")
    return command.replace(" cache=offline", "")


def regenerate_command() -> str:
    """What makes the answers of a server that are missing."""
    name = HydraConfig.get().job.config_name if HydraConfig.initialized() else "train"
    return f"{command_of('src.regenerate')}{'' if name == 'regenerate' else ' server=http://host:port/v1'}"


def engine_checks_dir() -> Path:
    """Where `python -m src.check_engine` leaves its stamps."""
    return runs_dir() / "engine_checks"


def check_command(target: DictConfig) -> str:
    """What compares the engine of this job's ``target`` with the target in process."""
    if HydraConfig.initialized():
        kept = ("hydra.searchpath=", "target=", "target.", "target/")
        overrides = [override for override in given_overrides() if override.lstrip("+~").startswith(kept)]
    else:
        named = {name: target.get(name) for name in ("path", "dtype", "engine", "states_dir")}
        overrides = [f"target.{name}={value}" for name, value in named.items() if value is not None]
        overrides.append(f"target.servers=[{','.join(target.servers)}]")
    return shlex.join(["python", "-m", "src.check_engine", *overrides])


def lazy_producer(config: DictConfig, target: Callable[[], Target]) -> Callable[[], Producer]:
    """What fills a cache, made on the first call: the target in this process, or the servers of ``target.engine``."""

    @cache
    def make() -> Producer:
        if config.target.get("engine"):
            target_group = OmegaConf.to_container(config.target, resolve=True)
            return engine_producer(target_group, engine_checks_dir(), check_command(config.target))
        return InProcess(target())

    return make


def open_store(config: DictConfig, heads: TargetHeads) -> StateStore:
    """The cache directory of this target and dtype."""
    key = CacheKey(
        target=fingerprint(heads),
        target_dtype=config.target.dtype,
        num_paths=heads.num_paths,
        hidden_size=heads.hidden_size,
        dtype=config.cache.dtype,
        tokenizer=tokenizer_fingerprint(config.target.path),
        mode=config.mode,
        encoding_version=ENCODING_VERSION,
        engine=config.target.get("engine") or IN_PROCESS,
    )
    return open_mode(config).open(key)


def states_of_documents(
    config: DictConfig,
    documents: Sequence[Document],
    store: StateStore,
    producer: Callable[[], Producer],
    layer_ids: Sequence[int] = (),
    name: str = "data",
) -> ShardedStates:
    """Documents with their states, the way the cache's mode has them; in the order of their shards, not the one given."""
    return open_mode(config).states(documents, store, producer, layer_ids, command=fill_command(), name=name)


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
    elif corpus.server_model is not None:
        path = served_file(config, corpus, parts.tokenizer, fingerprint(heads))
        settings = answer_settings(config, corpus)
        documents = served_documents(conversations, path, parts.tokenizer, settings, regenerate_command())
    else:
        settings = answer_settings(config, corpus)
        documents = target_documents(config, conversations, target, fingerprint(heads), parts.tokenizer, settings)
    return with_supervised_pair(documents)


def target_documents(
    config: DictConfig,
    conversations: Sequence[Conversation],
    target: Callable[[], Target],
    target_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: AnswerSettings,
) -> list[Document]:
    """Documents with the target's own answers, kept on disk. Of several processes that want the same ones, one makes them; a
    training that makes none waits ``mode.patience_s`` for a capture process to do so."""
    wanted = repr((target_fingerprint, settings, [conversation.id for conversation in conversations]))
    claim = f"claims/{hashlib.sha256(wanted.encode()).hexdigest()[:20]}"
    mode = open_mode(config)
    started = time.monotonic()
    while True:
        with alone(answers_dir(), claim) if mode.name != "offline" else nullcontext():
            try:
                return answer_conversations(conversations, target, target_fingerprint, tokenizer, settings, answers_dir())
            except NoTarget:
                if time.monotonic() - started >= mode.patience_s:
                    raise
        time.sleep(1)


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


def training_documents(
    config: DictConfig, parts: Parts, heads: TargetHeads, target: Callable[[], Target]
) -> dict[str, list[Document]]:
    """``train`` and ``validation``; the target is called if an answer is missing."""
    documents, counts = {}, {}
    for name, conversations, source in splits(parts):
        documents[name] = make_documents(conversations, config, source, heads, target)
        counts[name] = count_documents(conversations, documents[name], parts.corpus.max_length)
    tell_corpus(config, parts.corpus.row_stats, counts)
    return documents


def splits(parts: Parts) -> Iterator[tuple[str, list[Conversation], Parts]]:
    """``train`` as configured; ``validation`` greedy: tau at temperature 0 is defined on the target's own greedy text, whatever
    is trained on."""
    yield "train", parts.corpus.train(), parts
    responses = parts.corpus.responses if parts.corpus.server_model is not None else "target"
    greedy = replace(parts.corpus, responses=responses, temperature=0.0, top_p=1.0)
    yield "validation", greedy.validation_conversations(), replace(parts, corpus=greedy)


def cached_data(config: DictConfig, parts: Parts, heads: TargetHeads, store: StateStore) -> dict[str, ShardedStates]:
    """Training and validation documents with their states; the target is loaded if anything is missing."""
    target = lazy_target(config)
    producer = lazy_producer(config, target)
    documents = training_documents(config, parts, heads, target)
    return {
        name: states_of_documents(config, found, store, producer, parts.layer_ids, name) for name, found in documents.items()
    }


def capture_states(config: DictConfig, *, stay: bool = False) -> None:
    """The first half of ``train``: answers and states of a configuration, on disk. With cache=stream, beside trainings:
    makes what they need until the last one is gone; ``stay``: until this process is ended."""
    mode = open_mode(config)
    if mode.name not in ("disk", "stream"):
        raise ValueError(f"cache={mode.name} writes nothing: run `python -m src.capture` with cache=disk or cache=stream")
    parts = make_parts(config)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    heads = load_heads(config.target.path, config.target.dtype)
    store = open_store(config, heads)
    if isinstance(mode, Stream):
        config = OmegaConf.merge(config, {"cache": {"in_process": True, "captures": 0}})  # whatever the training says
        target = lazy_target(config)
        documents = training_documents(config, parts, heads, target).values()
        mode.supply(list(documents), store, lazy_producer(config, target), parts.layer_ids, stay=stay)
        return
    cached_data(config, parts, heads, store)
    print(f"states are in {store.directory}")
