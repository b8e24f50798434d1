"""The protocol of every drafter: settings that build it, and a module that training, replay, the loop and the checks call.
Nothing outside this folder depends on the kind of a drafter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from hyperdflash.contracts import BlockLayout, Slots, TargetStates
from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.drafting.heads.head import DraftHead, HeadConfig
from hyperdflash.drafting.heads.lm_head import LMHead
from hyperdflash.drafting.inputs import Inputs
from hyperdflash.drafting.lead import MTPLead
from hyperdflash.drafting.reducers.reducer import ReducerConfig
from hyperdflash.states.codecs import Codec
from hyperdflash.targets.adapter import NativeMTP
from hyperdflash.targets.heads import TargetHeads

if TYPE_CHECKING:
    from hyperdflash.drafting.proposer import Proposer


@dataclass(frozen=True, kw_only=True)
class DrafterParts:
    """The parts beside its own settings from which a drafter is built; those that a kind of drafter does not need may be None.
    ``layout`` is full or causal; ``inputs`` are a block drafter's additional ones; ``lead`` drafts its first slots if it is not
    None; ``load_mtp`` reads the target's MTP block, ``check_mtp`` raises ValueError if it has none."""

    conditioning: Conditioning | None
    reducer: ReducerConfig | None
    heads: TargetHeads
    mask_token_id: int
    head: HeadConfig = field(default_factory=LMHead)
    layout: str = "full"
    inputs: Inputs = field(default_factory=Inputs)
    lead: MTPLead | None = None
    load_mtp: Callable[[], NativeMTP] | None = None
    check_mtp: Callable[[], None] | None = None

    @property
    def on_meta(self) -> bool:
        """Tells whether the drafter shall have shapes but no memory."""
        return self.heads.embed_tokens.weight.is_meta

    def build_head(self, num_slots: int, *, chained: bool) -> DraftHead:
        """Returns a new draft head for ``num_slots``; with ``chained`` the MTP block gives it some slots one after another."""
        head = self.head.build(self.heads, num_slots)
        if chained and head.reads_block:
            raise ValueError("the draft head reads whole blocks, and the MTP block drafts slot by slot: run with head=lm_head")
        return head

    def mtp(self) -> NativeMTP:
        """Returns the target's MTP block; with meta heads one without parameters, if the target has one."""
        if self.on_meta:
            if self.check_mtp is not None:
                self.check_mtp()
            return NativeMTP()
        assert self.load_mtp is not None, "this drafter reads the target's MTP block"
        return self.load_mtp()


class DraftModel(Protocol):
    """A drafter's module, an ``nn.Module`` whose parameters train. ``num_slots`` S; ``layer_ids``, the target layers it reads;
    ``context_window``, how many of the newest states a block sees (None: all); ``layout`` of its blocks; ``head``, which turns
    its slots into logits; ``num_lead_slots`` that a lead drafts."""

    num_slots: int
    layer_ids: tuple[int, ...]
    context_window: int | None
    layout: BlockLayout
    head: DraftHead
    num_lead_slots: int

    def slots(self, states: TargetStates, heads: TargetHeads, anchors: Tensor, anchor_mask: Tensor) -> Slots:
        """Drafts from ``anchors`` [B, A] int64 on a known text; entries where ``anchor_mask`` [B, A] is False are ignored. Slot
        k of anchor a may use the states H[0..a-1], the tokens x[0..a], and in a chain x[a+1..a+k-1]; nothing later. A may cover
        all positions of a document, so a drafter processes a few anchors at a time."""
        ...

    def proposer(self, heads: TargetHeads, codec: Codec = ...) -> Proposer:
        """Returns its form for the draft-verify loop, with the same weights."""
        ...


class DraftModelConfig(Protocol):
    """``num_slots`` S; ``reads_conditioning``: whether the drafter uses a conditioning and a reducer."""

    num_slots: int
    reads_conditioning: bool

    def layer_ids(self, conditioning: Conditioning | None) -> tuple[int, ...]: ...

    def build(self, parts: DrafterParts, generator: torch.Generator | None = None) -> nn.Module:
        """Returns a new ``DraftModel``; with meta heads its shapes alone."""
        ...
