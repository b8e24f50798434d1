"""The native MTP block as a drafter: a chain of S steps from every anchor, teacher-forced on the text.

One pass serves replay and, with gradients, fine-tuning, so that training sees what a decoding loop would draft.

Shapes: see contracts.py; G anchors per group, W the block's sliding window, C = head_dim of its single key/value head.

Index i of the block stands at rope position i, consumes H[i] and embed(x[i+1]) and predicts x[i+2]. From anchor a
(x[a] verified, H[0..a-1] known):

    slot 1       index a-1    H[a-1]                            embed(x[a])         sees keys of target states <= a-1
    slot k >= 2  index a+k-2  the block's output at slot k-1    embed(x[a+k-1])     and its own chained keys a..a+k-2

always within the window: index i sees j if i - W < j <= i. An index's key does not depend on what the index attends to, so the
keys of all target states come first, and the rest of the block runs from anchors alone. G neighboring anchors share a row: the
keys of target states once, the chained keys side by side, and a mask that shows each anchor its own. Running slot k in parallel
over the whole text would instead let it attend to keys of states that a decoding loop does not have yet.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hyperdflash.contracts import BlockLayout, Slots, TargetStates
from hyperdflash.drafting.anchors import previous_ids
from hyperdflash.drafting.conditioning import Conditioning
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.heads.head import DraftHead
from hyperdflash.drafting.heads.lm_head import LMDraftHead
from hyperdflash.drafting.inputs import Inputs
from hyperdflash.drafting.mtp_proposer import MTPProposer
from hyperdflash.settings import positive_int
from hyperdflash.states.codecs import CODECS, Codec
from hyperdflash.targets.adapter import NativeMTP
from hyperdflash.targets.heads import TargetHeads

INITIALIZER_RANGE = 0.02  # standard deviation of a new head's weights
GROUP = 16  # anchors per row: more of them share more keys but score more masked ones; 8 to 32 are equally fast


@dataclass(frozen=True, kw_only=True)
class MTPChainConfig:
    """``drafter=mtp``: fine-tunes a copy of the target's MTP block over ``num_slots`` steps, chained as in decoding."""

    num_slots: int
    reads_conditioning: ClassVar[bool] = False  # the block reads the states by its own projections

    def __post_init__(self):
        positive_int("drafter.num_slots", self.num_slots)

    def layer_ids(self, conditioning: Conditioning) -> tuple[int, ...]:
        return ()

    def build(self, parts: DrafterParts, generator: torch.Generator | None = None) -> "MTPChain":
        if parts.lead is not None or parts.inputs != Inputs():
            raise ValueError("drafter=mtp is the chain of the MTP block itself: run with lead=null inputs=null")
        return new_chain(parts, self.num_slots, generator)


def new_chain(
    parts: DrafterParts, num_slots: int, generator: torch.Generator | None = None, *, trainable: bool = True
) -> "MTPChain":
    """Returns the chain of the target's MTP block with a new draft head; with meta heads the block has no shapes."""
    head = parts.build_head(num_slots, chained=True)
    if not trainable and not any(True for _ in head.parameters()):
        raise ValueError(
            f"lead.steps={num_slots} covers every slot and lead.trainable=false leaves nothing to train: run with "
            "lead.trainable=true, with fewer steps, or evaluate method=mtp"
        )
    if generator is not None and not parts.on_meta:
        head.reset_parameters(generator, INITIALIZER_RANGE)
    return MTPChain(parts.mtp(), num_slots, head=head, trainable=trainable)


class MTPChain(nn.Module):
    """Chains ``block`` over ``num_slots`` slots. ``trainable`` enables its gradients; the caller then passes a copy of its own.
    Shapes follow from the anchors' positions, so every pass waits for an accelerator. ``indices_per_pass`` bounds the positions
    whose keys are computed together, ``rows_per_pass`` the anchors of a step."""

    def __init__(
        self,
        block: NativeMTP,
        num_slots: int,
        *,
        head: DraftHead | None = None,
        trainable: bool = False,
        indices_per_pass: int = 512,
        rows_per_pass: int = 2048,
    ):
        super().__init__()
        if num_slots < 1:
            raise ValueError(f"MTP needs at least one drafted step, got {num_slots}")
        self.block = block.requires_grad_(trainable)
        self.head = LMDraftHead() if head is None else head
        self.layout = BlockLayout.chain(num_slots + 1, "causal")
        self.num_slots = num_slots
        self.indices_per_pass = indices_per_pass
        self.groups_per_pass = max(1, rows_per_pass // GROUP)

    layer_ids = ()
    context_window = None
    num_lead_slots = 0

    def proposer(self, heads: TargetHeads, codec: Codec = CODECS["bf16"]) -> MTPProposer:
        return MTPProposer(self, heads, codec)

    def slots(self, states: TargetStates, heads: TargetHeads, anchors: Tensor, anchor_mask: Tensor) -> Slots:
        """Drafts from ``anchors`` [B, A] int64; entries where ``anchor_mask`` [B, A] is False have arbitrary features."""
        previous = previous_ids(states.input_ids, anchors, self.layout)
        return Slots(self._features(states, heads, anchors, anchor_mask), previous, self.layout)

    def _features(self, states: TargetStates, heads: TargetHeads, anchors: Tensor, anchor_mask: Tensor) -> Tensor:
        """Returns [B, A, S, D] for anchors [B, A]; ValueError for an anchor at position 0."""
        if bool(((anchors < 1) & anchor_mask).any()):
            raise ValueError("MTP drafts from the state before its anchor; an anchor at position 0 has none")
        last = anchors.masked_fill(~anchor_mask, -1).amax(dim=1, keepdim=True).clamp(min=1)
        anchors = torch.where(anchor_mask, anchors, last)  # padding stays near the row's own anchors
        origin, stop = max(0, int(anchors.min()) - self.block.sliding_window), int(anchors.max())
        keys = self._keys(states, heads, origin, stop)  # [B, I, C]
        batch, num_anchors = anchors.shape
        padding = -num_anchors % GROUP
        grouped = torch.cat([anchors, anchors[:, -1:].expand(-1, padding)], dim=1).view(-1, GROUP)  # [N, G]
        row = torch.arange(batch, device=anchors.device).repeat_interleave(grouped.shape[0] // batch)  # [N]
        parts = [
            self._chain(states, heads, keys, origin, *group)
            for group in zip(row.split(self.groups_per_pass), grouped.split(self.groups_per_pass), strict=True)
        ]
        return torch.cat(parts).view(batch, num_anchors + padding, self.num_slots, -1)[:, :num_anchors]

    def _keys(self, states: TargetStates, heads: TargetHeads, origin: int, stop: int) -> Tensor:
        """Returns the keys of indices origin..stop-1 of the text, [B, stop-origin, C]."""
        keys = []
        for begin in range(origin, stop, self.indices_per_pass):
            end = min(begin + self.indices_per_pass, stop)
            index = torch.arange(begin, end, device=states.residual.device).expand(len(states.input_ids), -1)
            embeds = heads.embed(states.input_ids[:, begin + 1 : end + 1])
            keys.append(self.block.keys(states.residual[:, begin:end], embeds, index))
        return torch.cat(keys, dim=2).squeeze(1)

    def _chain(self, states: TargetStates, heads: TargetHeads, keys: Tensor, origin: int, row: Tensor, at: Tensor) -> Tensor:
        """Runs slots 1..S of n groups: keys of the text [B, I, C], row [n], anchors ``at`` [n, G] -> [n, G, S, D]."""
        window, length = self.block.sliding_window, states.input_ids.shape[1]
        low = (at.amin(dim=1) - window).clamp(min=origin)  # the first key of a target state that a group can see
        span = int((at.amax(dim=1) - low).max())
        key_index = low[:, None] + torch.arange(span, device=at.device)  # [n, span]
        in_text = key_index.clamp(max=origin + keys.shape[1] - 1) - origin
        prefix = keys[row[:, None], in_text].unsqueeze(1)  # [n, 1, span, C]
        own = torch.eye(GROUP, dtype=torch.bool, device=at.device).expand(len(row), -1, -1)
        none = torch.zeros_like(own)
        residual, outputs = states.residual[row[:, None], at - 1], []  # [n, G, M, D]
        for slot in range(1, self.num_slots + 1):
            index = at + slot - 2  # [n, G]
            made = (key_index[:, None] < at[..., None]) & (key_index[:, None] > index[..., None] - window)
            # slot 1 stands in the text, whose keys have its own one
            chained = [own if slot - earlier < window else none for earlier in range(2, slot + 1)] or [none]
            keep = torch.cat([made, *chained], dim=-1)  # [n, G, span + (slot - 1) G], or G more for slot 1
            embeds = heads.embed(states.input_ids[row[:, None], (index + 1).clamp(max=length - 1)])  # [n, G, D]
            mask = embeds.new_zeros(keep.shape).masked_fill(~keep, float("-inf")).unsqueeze(1)
            residual, new = self.block.run(residual, embeds, index, mask, prefix)
            if slot > 1:
                prefix = torch.cat([prefix, new], dim=2)
            outputs.append(self.block.head(residual))
        return torch.stack(outputs, dim=2)
