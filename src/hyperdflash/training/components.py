"""The cheap parts of a training configuration, checked before the training reads any weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from hyperdflash.drafting.anchors import BlockSampler
from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.drafting.draft_model import DrafterParts, DraftModelConfig
from hyperdflash.drafting.heads.head import HeadConfig
from hyperdflash.drafting.reducers.reducer import ReducerConfig
from hyperdflash.identity import source_names
from hyperdflash.objectives.objective import Objective
from hyperdflash.settings import natural_int, one_of, positive_int, positive_number
from hyperdflash.targets.adapter import TargetConfig
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import DTYPES as TARGET_DTYPES
from hyperdflash.targets.load import load_mtp, read_config
from hyperdflash.training.loggers import WANDB_MODES
from hyperdflash.training.module import OptimSettings


@dataclass(frozen=True)
class Parts:
    """The instantiated, checked groups of a training configuration; making them reads no weight and no text."""

    target_config: TargetConfig
    mask_token_id: int | None  # None: that of the tokenizer
    conditioning: Conditioning | None
    reducer: ReducerConfig | None
    drafter: DraftModelConfig
    head: HeadConfig
    blocks: BlockSampler
    objective: Objective
    optim: OptimSettings

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return self.drafter.layer_ids(self.conditioning)

    def build(self, heads: TargetHeads, target: DictConfig, seed: int, mask_token_id: int | None = None) -> nn.Module:
        """Builds a new drafter; with meta heads, only its shapes. ``mask_token_id`` None: that of the target's tokenizer."""
        parts = DrafterParts(
            conditioning=self.conditioning,
            reducer=self.reducer,
            head=self.head,
            layout=self.blocks.layout,
            heads=heads,
            mask_token_id=mask_id(target.path, self.mask_token_id) if mask_token_id is None else mask_token_id,
            load_mtp=lambda: load_mtp(target.path, experts=target.experts),
        )
        return self.drafter.build(parts, torch.Generator().manual_seed(seed))


def make_parts(config: DictConfig) -> Parts:
    """Instantiates every cheap group and builds the drafter on the meta device; ValueError within a second."""
    target_config = read_config(config.target.path)
    source_names(config)  # ValueError when a drafter lacks the conditioning or the reducer that it reads
    parts = {
        name: instantiate(config.get(name))  # None for a group that the method does not read
        for name in ["conditioning", "reducer", "drafter", "head", "blocks", "objective", "optim"]
    }
    made = Parts(target_config=target_config, mask_token_id=config.target.mask_token_id, **parts)
    wrong = [i for i in made.layer_ids if i >= target_config.num_hidden_layers]
    if wrong:
        raise ValueError(
            f"conditioning.layer_ids={list(made.layer_ids)} but the target has layers "
            f"0..{target_config.num_hidden_layers - 1}: give ids in that range"
        )
    natural_int("seed", config.seed)
    one_of("logger.wandb", config.logger.wandb, WANDB_MODES)
    instantiate(config.cache)
    one_of("target.dtype", config.target.dtype, tuple(TARGET_DTYPES))
    check_trainer(config.trainer)
    with torch.device("meta"):
        heads = TargetHeads(target_config)
    drafter = made.build(heads, config.target, config.seed, mask_token_id=0)
    made.objective.check(drafter.num_slots, drafter.head.has_confidence)
    return made


def mask_id(target_path: str, given: int | None) -> int:
    """Returns the token that fills unknown slots, by the target's tokenizer; a training takes it from its dataset."""
    from hyperdflash.data.tokenizer import load_tokenizer, special_ids

    return special_ids(load_tokenizer(target_path), given).mask


def check_trainer(trainer: DictConfig) -> None:
    """Raises ValueError for a wrong option of the trainer group."""
    for name in ("max_epochs", "accumulate_grad_batches", "num_nodes", "log_every_n_steps"):
        positive_int(f"trainer.{name}", trainer[name])
    one_of("trainer.precision", trainer.precision, ("32-true", "64-true", "bf16-mixed"))
    if trainer.checkpoint_every_steps is not None:
        positive_int("trainer.checkpoint_every_steps", trainer.checkpoint_every_steps)
    for name in ("gradient_clip_val", "checkpoint_every_s"):
        if trainer[name] is not None:
            positive_number(f"trainer.{name}", trainer[name])
    if isinstance(trainer.val_check_interval, int):
        positive_int("trainer.val_check_interval", trainer.val_check_interval)
    else:
        positive_number("trainer.val_check_interval", trainer.val_check_interval)
