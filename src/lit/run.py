"""One training run from a configuration: parts, data, drafter, trainer, record.

1. parts        everything that is cheap, checked with the drafter's shapes on the meta device: a mistake fails here
2. directory    a finished run is reported and left alone; a broken one goes on from its last checkpoint
3. documents    conversations -> the target's own answers (kept on disk)
4. states       captured where the cache misses them; the target is loaded only if something is missing
5. fit          best checkpoint by validation tau
6. record       result.json last: a directory that has it is finished
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import DeepseekV4Config, PreTrainedTokenizerBase

from src.blocks.anchors import BlockSampler, eligible_anchors
from src.cache.capture import CachedStates, capture
from src.cache.store import DTYPES as STATE_DTYPES
from src.cache.store import CacheKey, StateStore
from src.contracts import Conversation, Document
from src.corpus.chat import MODES, encode
from src.corpus.mixture import Corpus
from src.corpus.tokenizer import load_tokenizer, special_ids
from src.drafter.conditioning import Conditioning
from src.drafter.config import DrafterConfig
from src.drafter.model import build_drafter
from src.drafter.mtp_chain import MTPChain, MTPChainConfig
from src.drafter.reducers.reducer import ReducerConfig
from src.entry import command_of, decided_by, run_name, runs_dir, train_run_dir
from src.lit.data import TargetStatesData
from src.lit.lineage import check_target, load_drafter_weights, parent_of, read_record
from src.lit.loggers import WANDB_MODES, make_loggers
from src.lit.module import DraftingModule, OptimSettings
from src.lit.progress import StepBar
from src.lit.record import environment_record, write_json
from src.loss.cross_entropy import PositionWeighted
from src.loss.distillation import KLConfig
from src.settings import natural_int, one_of, positive_int
from src.target.heads import TargetHeads
from src.target.load import DTYPES as TARGET_DTYPES
from src.target.load import Target, fingerprint, load_heads, load_mtp, read_config
from src.target.responses import AnswerSettings, answer_conversations


@dataclass(frozen=True)
class Parts:
    """The instantiated, checked groups of a training configuration; nothing here has read a weight."""

    target_config: DeepseekV4Config
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    corpus: Corpus
    conditioning: Conditioning
    reducer: ReducerConfig
    drafter: DrafterConfig | MTPChainConfig
    blocks: BlockSampler
    kl: KLConfig
    loss: PositionWeighted
    optim: OptimSettings

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return () if isinstance(self.drafter, MTPChainConfig) else tuple(self.conditioning.layer_ids)

    def build(self, heads: TargetHeads, target: DictConfig, seed: int) -> nn.Module:
        """A new drafter; on meta heads its shapes only."""
        if isinstance(self.drafter, MTPChainConfig):
            return MTPChain(load_mtp(target.path, experts=target.experts), self.drafter.num_slots, trainable=True)
        return build_drafter(
            conditioning=self.conditioning,
            reducer=self.reducer,
            drafter=self.drafter,
            heads=heads,
            mask_token_id=self.mask_token_id,
            generator=torch.Generator().manual_seed(seed),
        )


def make_parts(config: DictConfig) -> Parts:
    """Instantiate every cheap group and try the drafter on the meta device; ValueError within a second."""
    parts = {
        name: instantiate(config[name])
        for name in ["corpus", "conditioning", "reducer", "drafter", "blocks", "kl", "loss", "optim"]
    }
    target_config = read_config(config.target.path)
    tokenizer = load_tokenizer(config.target.path)
    mask_token_id = special_ids(tokenizer, config.target.mask_token_id).mask
    made = Parts(target_config=target_config, tokenizer=tokenizer, mask_token_id=mask_token_id, **parts)
    wrong = [i for i in made.layer_ids if i >= target_config.num_hidden_layers]
    if wrong:
        raise ValueError(
            f"conditioning.layer_ids={list(made.layer_ids)} but the target has layers "
            f"0..{target_config.num_hidden_layers - 1}: give ids in that range"
        )
    natural_int("seed", config.seed)
    one_of("mode", config.mode, MODES)
    one_of("logger.wandb", config.logger.wandb, WANDB_MODES)
    one_of("cache.dtype", config.cache.dtype, tuple(STATE_DTYPES))
    one_of("target.dtype", config.target.dtype, tuple(TARGET_DTYPES))
    positive_int("cache.documents_per_shard", config.cache.documents_per_shard)
    positive_int("trainer.max_epochs", config.trainer.max_epochs)
    if config.trainer.get("accumulate_grad_batches", 1) != 1:
        raise ValueError("trainer.accumulate_grad_batches is not supported: raise optim.batch_size instead")
    made.kl.check_slots(made.drafter.num_slots)
    if isinstance(made.drafter, DrafterConfig):
        with torch.device("meta"):
            heads = TargetHeads(target_config)
        made.build(heads, config.target, config.seed)
    return made


def lazy_target(config: DictConfig) -> Callable[[], Target]:
    """Loads on the first call."""

    @cache
    def load() -> Target:
        print(f"loading the target from {config.target.path}", flush=True)
        return instantiate(config.target)

    return load


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
        shards = capture(
            documents, store, target, layer_ids=parts.layer_ids, documents_per_shard=config.cache.documents_per_shard
        )
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


def train(config: DictConfig) -> dict:
    """Run or resume one training; returns the record in result.json."""
    parts = make_parts(config)
    run = train_run_dir(config)
    result = run / "result.json"
    if result.exists():
        record = read_record(run)
        check_target(record["target"], fingerprint(load_heads(config.target.path)), run)
        print(f"{run} is finished (validation tau {record['val_tau']:.3f}): nothing to do")
        return record
    init_from = parent_of(config, run)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)

    heads = load_heads(config.target.path)
    if init_from is not None:
        check_target(read_record(init_from)["target"], fingerprint(heads), init_from)
    store = open_store(config, heads)
    data = cached_data(config, parts, heads, store)

    drafter = parts.build(heads, config.target, config.seed)
    if init_from is not None:
        load_drafter_weights(drafter, init_from, store.key.target)
    trainable = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    print(f"{run_name(config)}: {trainable:,} trainable parameters", flush=True)
    module = DraftingModule(
        drafter=drafter,
        heads=heads,
        blocks=parts.blocks,
        weights=parts.loss,
        kl=parts.kl,
        optim=parts.optim,
        seed=config.seed,
        meta={"target": store.key.target, "name": run_name(config)},
    )
    run.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run / "config.yaml", resolve=True)
    write_json(run / "environment.json", environment_record(command_of("src.train")))
    directory = run / "checkpoints"
    shared = {"dirpath": directory, "enable_version_counter": False}
    best = ModelCheckpoint(filename="best", monitor="val/tau", mode="max", **shared)
    latest = ModelCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **shared)
    trainer = L.Trainer(
        **{k: v for k, v in config.trainer.items() if k != "threads"},
        default_root_dir=run,
        logger=make_loggers(config.logger, run, run_name(config)),
        callbacks=[best, latest, StepBar()],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    last = directory / "last.ckpt"
    if last.exists():
        print(f"resuming from {last}")
    data_module = TargetStatesData(data["train"], data["validation"], batch_size=parts.optim.batch_size, seed=config.seed)
    trainer.fit(module, data_module, ckpt_path=last if last.exists() else None, weights_only=True)
    record = {
        "name": run_name(config),
        "val_tau": float(best.best_model_score),
        "best_checkpoint": str(Path(best.best_model_path).relative_to(run.resolve())),
        "steps": trainer.global_step,
        "trainable_parameters": trainable,
        "target": store.key.target,
        "init_from": str(init_from) if init_from else None,
        "command": command_of("src.train"),
        "decided_by": decided_by(config),
    }
    if not trainer.is_global_zero:
        return record
    write_json(result, record)
    print(f"{run}: best validation tau {record['val_tau']:.3f}")
    return record
