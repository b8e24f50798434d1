"""The cheap parts of a training configuration, checked before the training reads any weight."""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import nn

from hyperdflash.drafting.anchors import BlockSampler
from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.drafting.draft_model import DrafterParts, DraftModelConfig
from hyperdflash.drafting.heads.head import HeadConfig
from hyperdflash.drafting.inputs import Inputs
from hyperdflash.drafting.lead import MTPLead
from hyperdflash.drafting.reducers.reducer import ReducerConfig
from hyperdflash.identity import source_names
from hyperdflash.objectives.objective import Objective
from hyperdflash.options import instantiate
from hyperdflash.settings import one_of
from hyperdflash.targets.adapter import TargetConfig
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import DTYPES, check_mtp, load_mtp, read_config
from hyperdflash.training.module import OptimSettings


@dataclass(frozen=True)
class Parts:
    """The checked groups of a training, made without weights or text; only a training has ``objective`` and ``optim``."""

    target_config: TargetConfig
    mask_token_id: int | None  # None: that of the tokenizer
    conditioning: Conditioning | None
    reducer: ReducerConfig | None
    inputs: Inputs | None
    lead: MTPLead | None
    drafter: DraftModelConfig
    head: HeadConfig
    blocks: BlockSampler
    objective: Objective | None
    optim: OptimSettings | None

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return self.drafter.layer_ids(self.conditioning)

    def build(self, heads: TargetHeads, target: DictConfig, seed: int, mask_token_id: int | None = None) -> nn.Module:
        """Builds a new drafter; with meta heads, only its shapes. ``mask_token_id`` None: that of the target's tokenizer."""
        if mask_token_id is None:
            from hyperdflash.data.tokenizer import load_tokenizer, special_ids

            mask_token_id = special_ids(load_tokenizer(target.path), self.mask_token_id).mask
        parts = DrafterParts(
            conditioning=self.conditioning,
            reducer=self.reducer,
            inputs=self.inputs or Inputs(),
            lead=self.lead,
            head=self.head,
            layout=self.blocks.layout,
            heads=heads,
            mask_token_id=mask_token_id,
            load_mtp=lambda: load_mtp(target.path, experts=target.experts),
            check_mtp=lambda: check_mtp(target.path),
        )
        return self.drafter.build(parts, torch.Generator().manual_seed(seed))


def make_parts(config: DictConfig, *, trains: bool = True) -> Parts:
    """Instantiates every cheap group and builds the drafter on the meta device; ValueError within a second. Without ``trains``,
    reads no option that only a training needs; objective and optimizer are None."""
    target_config = read_config(config.target.path)
    source_names(config)  # ValueError when a drafter lacks the conditioning or the reducer that it reads
    parts = {name: instantiate(config.get(name)) for name in ("conditioning", "reducer", "inputs", "lead")}  # None: not read
    parts |= {name: instantiate(config[name]) for name in ("drafter", "head", "blocks")}
    parts |= {name: instantiate(config[name]) if trains else None for name in ("objective", "optim")}
    made = Parts(target_config=target_config, mask_token_id=config.target.mask_token_id, **parts)
    last = target_config.num_hidden_layers - 1
    if any(layer > last for layer in made.layer_ids):
        ids = list(made.layer_ids)
        raise ValueError(f"conditioning.layer_ids={ids} but the target has layers 0..{last}: give ids in that range")
    if trains:
        one_of("target.dtype", config.target.dtype, tuple(DTYPES))
        instantiate(config.cache)
    with torch.device("meta"):
        heads = TargetHeads(target_config)
    drafter = made.build(heads, config.target, config.seed, mask_token_id=0)
    if drafter.num_slots >= (context := target_config.max_position_embeddings):
        raise ValueError(f"the drafter has {drafter.num_slots} slots and the target a context of {context:,}: give fewer slots")
    if trains:
        made.objective.check(drafter.num_slots, drafter.head.has_confidence, drafter.head.views)
    return made
