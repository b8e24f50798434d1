"""The DFlash block drafter: all S slots of a block in one pass, conditioned on the target's states.

Steps and shapes (legend: contracts.py; D' the drafter's width, N key-value heads, E width of a head)
    1. conditioning.gather   TargetStates -> [B, T, N streams, D]
    2. reducer, hidden_norm  -> context [B, T, D'], once
    3. project_context       every layer's own keys and values of that context, [B, T, N, E] each
    4. lead                  the first n slots' features [B, A, n, D], where a lead drafts them (lead.py)
    5. embed_blocks          [x_a, mask, ..., mask] at positions a..a+K-1 -> [B, A, K, D']
    6. layers, norm          -> features [B, A, S, D] without slot 0; slot k stands at a + k and predicts x[a + k]

``slots`` runs these steps for training, all anchors of a document at once, and for replay, ANCHORS_PER_PASS at a time. A
decoding loop calls them one by one and caches the result of step 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hyperdflash.contracts import BlockLayout, Slots, TargetStates
from hyperdflash.drafting.anchors import previous_ids
from hyperdflash.drafting.attention import (
    SHAPE_MULTIPLE,
    Angles,
    BlockAttention,
    BlockMask,
    KeyValue,
    attention_mask,
    context_mask,
)
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.layers import BlockConvolution, RMSNorm, SwiGLU, linear, rotary_angles
from hyperdflash.drafting.proposer import BlockProposer
from hyperdflash.states.codecs import CODECS, Codec
from hyperdflash.targets.heads import TargetHeads

if TYPE_CHECKING:
    from hyperdflash.drafting.config import DrafterConfig
    from hyperdflash.drafting.mtp_chain import MTPChain


ANCHORS_PER_PASS = 256  # anchors per document and pass without gradients
ADDITIONAL = ("anchor_proj", "token_norm", "token_proj", "lead_norm", "lead_proj")  # modules of inputs.py and lead.py


class DraftLayer(nn.Module):
    def __init__(self, config: DrafterConfig, hidden_size: int, layout: BlockLayout):
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.self_attn = BlockAttention(config, hidden_size, layout)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(hidden_size, config.intermediate_size)
        taps = config.convolution
        self.attention_conv, self.mlp_conv = (BlockConvolution(hidden_size, taps) if taps else None for _ in range(2))

    def forward(self, x: Tensor, angles: Angles, context: KeyValue, mask: Tensor | BlockMask) -> Tensor:
        def around(convolution: BlockConvolution | None, x: Tensor, sublayer: nn.Module, *others) -> Tensor:
            return sublayer(x, *others) if convolution is None else convolution(x, lambda x: sublayer(x, *others))

        x = x + around(self.attention_conv, self.input_layernorm(x), self.self_attn, angles, context, mask)
        return x + around(self.mlp_conv, self.post_attention_layernorm(x), self.mlp)


class Drafter(nn.Module):
    """Holds no weight of the target but a lead's; every call takes the target's frozen heads."""

    def __init__(self, config: DrafterConfig, parts: DrafterParts):
        super().__init__()
        heads = parts.heads
        hidden_size, eps = config.hidden_size or heads.hidden_size, config.rms_norm_eps
        vocab_size = heads.config.vocab_size
        if not 0 <= parts.mask_token_id < vocab_size:
            raise ValueError(f"mask_token_id must be in 0..{vocab_size - 1}, got {parts.mask_token_id}")
        self.config, self.conditioning = config, parts.conditioning
        self.num_slots, self.context_window = config.num_slots, config.context_window
        self.layer_ids = config.layer_ids(parts.conditioning)
        self.reads_next_token = parts.conditioning.reads_next_token or parts.inputs.next_token
        self.mask_token_id = parts.mask_token_id
        self.layout = BlockLayout.chain(config.block_size, parts.layout)
        self.reducer = parts.reducer.build(parts.conditioning, heads, hidden_size)
        self.hidden_norm = RMSNorm(hidden_size, eps=eps)
        self.layers = nn.ModuleList(DraftLayer(config, hidden_size, self.layout) for _ in range(config.num_layers))
        if config.compile:
            for layer in self.layers:
                layer.compile()
        self.norm = RMSNorm(hidden_size, eps=eps)
        same_width = hidden_size == heads.hidden_size
        self.embed_proj = None if same_width else linear(heads.hidden_size, hidden_size)
        self.out_proj = None if same_width else linear(hidden_size, heads.hidden_size)
        self.anchor_proj = linear(hidden_size, hidden_size) if parts.inputs.anchor_state else None
        self.token_norm = RMSNorm(heads.hidden_size, eps=eps) if parts.inputs.next_token else None
        self.token_proj = linear(heads.hidden_size, hidden_size) if parts.inputs.next_token else None
        self.lead: MTPChain | None = None  # set where the target's MTP block is read
        self.lead_norm = None if parts.lead is None else RMSNorm(heads.hidden_size, eps=eps)
        self.lead_proj = None if parts.lead is None else linear(heads.hidden_size, hidden_size)
        self.head = parts.build_head(config.num_slots, chained=parts.lead is not None)

    @torch.no_grad()
    def reset_parameters(self, heads: TargetHeads, generator: torch.Generator) -> None:
        """Draws matrices from normal(0, initializer_range); norms are 1, additional projections 0; reducer and head differ."""
        own = [module for name, module in self.named_modules() if name.split(".")[0] not in ("head", *ADDITIONAL)]
        for module in own:
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, BlockConvolution):
                module.reset_parameters()
        for name in ADDITIONAL:
            if getattr(self, name) is not None:
                getattr(self, name).weight.fill_(1.0 if name.endswith("norm") else 0.0)
        self.reducer.reset_parameters(heads, generator)
        self.head.reset_parameters(generator, self.config.initializer_range)

    @property
    def num_lead_slots(self) -> int:
        return 0 if self.lead is None else self.lead.num_slots

    def proposer(self, heads: TargetHeads, codec: Codec = CODECS["bf16"]) -> BlockProposer:
        return BlockProposer(self, heads, codec)

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def slots(self, states: TargetStates, heads: TargetHeads, anchors: Tensor, anchor_mask: Tensor) -> Slots:
        """Drafts all blocks of documents at ``anchors`` [B, A] int64; features are 0 where ``anchor_mask`` [B, A] is False."""
        previous = previous_ids(states.input_ids, anchors, self.layout)  # [B, A, S]
        lead = None if self.lead is None else self.lead.slots(states, heads, anchors, anchor_mask).features  # [B, A, n, D]
        length = states.input_ids.shape[1]  # of the context: on a CPU what some anchor sees; reading it on a device would wait
        if anchors.device.type == "cpu":
            length = -(-max(1, int(anchors.max())) // SHAPE_MULTIPLE) * SHAPE_MULTIPLE
        context = self.context(states, heads, length)
        positions = torch.arange(context.shape[1], device=anchors.device)  # [T]
        context_kv = self.project_context(context, positions)

        def draft(part: slice) -> Tensor:
            at, lead_states = anchors[:, part], None if lead is None else lead[:, part]
            ids = previous[:, part, : 1 + self.num_lead_slots]
            visible = context_mask(at, positions, self.config.context_window)
            newest = None if self.anchor_proj is None else _before(context, at)
            return self.draft(ids, at, context_kv, visible, heads, newest, lead_states)

        if torch.is_grad_enabled():
            features = draft(slice(None))
        else:  # replay: every position of an answer is an anchor
            parts = range(0, anchors.shape[1], ANCHORS_PER_PASS)
            features = torch.cat([draft(slice(first, first + ANCHORS_PER_PASS)) for first in parts], dim=1)
        if lead is not None:
            features = torch.cat([lead.to(features.dtype), features[:, :, self.num_lead_slots :]], dim=2)
        return Slots(features.masked_fill(~anchor_mask[..., None, None], 0.0), previous, self.layout)

    def context(self, states: TargetStates, heads: TargetHeads, length: int | None = None) -> Tensor:
        """Returns the reduced and normed context [B, T, D'], shared by all layers; ``length`` truncates or pads T. States stay
        in the cache's dtype until here: the reducer converts them once, to the drafter's dtype or to autocast's."""
        streams = self.conditioning.gather(states, heads)[:, :length]
        padding = 0 if length is None else max(0, length - streams.shape[1])
        if padding:
            streams = F.pad(streams, (0, 0, 0, 0, 0, padding))
        context = self.hidden_norm(self.reducer(streams).to(self.dtype))
        if self.token_proj is None:
            return context
        next_ids = F.pad(states.next_ids[:, :length], (0, padding))
        return context + self.token_proj(self.token_norm(heads.embed(next_ids).to(self.dtype))).to(self.dtype)

    def project_context(self, context: Tensor, positions: Tensor) -> list[KeyValue]:
        """Projects the context [B, T, D'] at ``positions`` [T] or [B, T] to each layer's keys and values [B, T, N, E].
        Positions are independent, so a loop may project new states alone and append them."""
        angles = self._angles(positions)
        return [layer.self_attn.project(context, angles) for layer in self.layers]

    def draft(
        self,
        known_ids: Tensor,
        anchors: Tensor,
        context_kv: list[KeyValue],
        visible: Tensor,
        heads: TargetHeads,
        newest: Tensor | None = None,
        lead: Tensor | None = None,
    ) -> Tensor:
        """Drafts blocks at positions ``anchors`` [B, A] in one pass -> features [B, A, S, D].

        ``known_ids`` [B, A, 1 + n] are the anchors' tokens and those of n lead slots, whose states are ``lead`` [B, A, n, D];
        ``visible`` [B, A, T] bool says which context states each block may read; ``newest`` [B, A, D'] is the context state
        before each anchor, if the blocks read it.
        """
        x = self.embed_blocks(known_ids, heads, newest, lead)
        positions = anchors[..., None] + torch.arange(self.config.block_size, device=anchors.device)  # [B, A, K]
        angles = self._angles(positions)
        mask = attention_mask(visible, self.layout)
        for layer, context in zip(self.layers, context_kv, strict=True):
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, angles, context, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, angles, context, mask)
        hidden = self.norm(x[:, :, 1:])  # [B, A, S, D']
        return hidden if self.out_proj is None else self.out_proj(hidden)

    def _angles(self, positions: Tensor) -> Angles:
        """Returns the rotary angles for all layers, rounded to the drafter's dtype once."""
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        return cos.to(self.dtype), sin.to(self.dtype)

    def embed_blocks(self, known_ids: Tensor, heads: TargetHeads, newest: Tensor | None, lead: Tensor | None) -> Tensor:
        """Embeds [x_a, x_1..x_n, mask, ..., mask] and adds the additional inputs: [B, A, 1 + n] -> [B, A, K, D']."""
        num_masks = self.config.block_size - known_ids.shape[-1]
        masks = known_ids.new_full((*known_ids.shape[:-1], num_masks), self.mask_token_id)
        x = heads.embed(torch.cat([known_ids, masks], dim=-1)).to(self.dtype)
        x = x if self.embed_proj is None else self.embed_proj(x)
        if self.anchor_proj is not None:
            x = x + self.anchor_proj(newest)[:, :, None]
        if lead is not None:
            of_lead = self.lead_proj(self.lead_norm(lead.to(self.dtype)))
            x = x + F.pad(of_lead, (0, 0, 1, num_masks))
        return x


def _before(context: Tensor, anchors: Tensor) -> Tensor:
    """Returns the context state before each anchor, 0 where there is none: [B, T, D'], [B, A] -> [B, A, D']."""
    index = (anchors - 1).clamp(min=0)[..., None].expand(-1, -1, context.shape[2])
    return context.gather(1, index).masked_fill((anchors == 0)[..., None], 0.0)
