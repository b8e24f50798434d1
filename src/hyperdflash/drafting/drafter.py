"""The DFlash block drafter: all S slots of a block in one pass, conditioned on the target's states.

Steps and shapes (legend: contracts.py; D' the drafter's width, N key-value heads, E width of a head)
    1. conditioning.gather   TargetStates -> [B, T, N streams, D]
    2. reducer, hidden_norm  -> context [B, T, D'], once
    3. project_context       every layer's own keys and values of that context, [B, T, N, E] each
    4. embed_blocks          [x_a, mask, ..., mask] at positions a..a+K-1 -> [B, A, K, D']
    5. layers, norm          -> features [B, A, S, D] without slot 0; slot k stands at a + k and predicts x[a + k]

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
from hyperdflash.drafting.attention import SHAPE_MULTIPLE, Angles, BlockAttention, BlockMask, KeyValue, attention_mask
from hyperdflash.drafting.draft_model import DrafterParts
from hyperdflash.drafting.layers import RMSNorm, SwiGLU, linear, rotary_angles
from hyperdflash.drafting.proposer import BlockProposer
from hyperdflash.drafting.visibility import context_mask
from hyperdflash.states.codecs import CODECS, Codec

if TYPE_CHECKING:
    from hyperdflash.drafting.config import DrafterConfig
    from hyperdflash.targets.heads import TargetHeads


ANCHORS_PER_PASS = 256  # anchors per document and pass without gradients


class DraftLayer(nn.Module):
    def __init__(self, config: DrafterConfig, hidden_size: int, layout: BlockLayout):
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.self_attn = BlockAttention(config, hidden_size, layout)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, angles: Angles, context: KeyValue, mask: Tensor | BlockMask) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, context, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Drafter(nn.Module):
    """Holds trainable parameters only, without buffers; every call takes the target's frozen heads."""

    def __init__(self, config: DrafterConfig, parts: DrafterParts):
        super().__init__()
        heads = parts.heads
        hidden_size = config.hidden_size or heads.hidden_size
        vocab_size = heads.config.vocab_size
        if not 0 <= parts.mask_token_id < vocab_size:
            raise ValueError(f"mask_token_id must be in 0..{vocab_size - 1}, got {parts.mask_token_id}")
        self.config = config
        self.conditioning = parts.conditioning
        self.mask_token_id = parts.mask_token_id
        self.layout = BlockLayout.chain(config.block_size, parts.layout)
        self.reducer = parts.reducer.build(parts.conditioning, heads, hidden_size)
        self.hidden_norm = RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DraftLayer(config, hidden_size, self.layout) for _ in range(config.num_layers))
        if config.compile:
            for layer in self.layers:
                layer.compile()
        self.norm = RMSNorm(hidden_size, eps=config.rms_norm_eps)
        same_width = hidden_size == heads.hidden_size
        self.embed_proj = None if same_width else linear(heads.hidden_size, hidden_size)
        self.out_proj = None if same_width else linear(hidden_size, heads.hidden_size)
        self.head = parts.head.build(heads)

    @torch.no_grad()
    def reset_parameters(self, heads: TargetHeads, generator: torch.Generator) -> None:
        """Draws matrices from normal(0, initializer_range), sets norms to 1, then applies the reducer's and head's rules."""
        own = [module for name, module in self.named_modules() if name.split(".")[0] != "head"]
        for module in own:
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
        self.reducer.reset_parameters(heads, generator)
        self.head.reset_parameters(generator, self.config.initializer_range)

    @property
    def num_slots(self) -> int:
        """S, the drafted tokens per round."""
        return self.config.num_slots

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The target layers whose outputs the drafter reads."""
        return self.config.layer_ids(self.conditioning)

    @property
    def context_window(self) -> int | None:
        """The number of newest states that a block sees; None for all."""
        return self.config.context_window

    def proposer(self, heads: TargetHeads, codec: Codec = CODECS["bf16"]) -> BlockProposer:
        """Returns the loop's form of this drafter, with the same weights."""
        return BlockProposer(self, heads, codec)

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def slots(self, states: TargetStates, heads: TargetHeads, anchors: Tensor, anchor_mask: Tensor) -> Slots:
        """Drafts all blocks of documents at ``anchors`` [B, A] int64; features are 0 where ``anchor_mask`` [B, A] is False."""
        context = self.context(states, heads, _seen_length(anchors, states.input_ids.shape[1]))
        positions = torch.arange(context.shape[1], device=anchors.device)  # [T]
        context_kv = self.project_context(context, positions)

        def draft(at: Tensor) -> Tensor:
            visible = context_mask(at, positions, self.config.context_window)
            return self.draft(states.input_ids.gather(1, at), at, context_kv, visible, heads)

        if torch.is_grad_enabled():
            features = draft(anchors)
        else:  # replay: every position of an answer is an anchor
            features = torch.cat([draft(at) for at in anchors.split(ANCHORS_PER_PASS, dim=1)], dim=1)
        features = features.masked_fill(~anchor_mask[..., None, None], 0.0)
        return Slots(features, previous_ids(states.input_ids, anchors, self.layout), self.layout)

    def context(self, states: TargetStates, heads: TargetHeads, length: int | None = None) -> Tensor:
        """Returns the reduced and normed context [B, T, D'], shared by all layers; ``length`` truncates or pads T.

        States stay in the cache's dtype until here: the reducer converts them once, to the drafter's dtype or to autocast's.
        """
        streams = self.conditioning.gather(states, heads)[:, :length]
        if length is not None and length > streams.shape[1]:
            streams = F.pad(streams, (0, 0, 0, 0, 0, length - streams.shape[1]))
        return self.hidden_norm(self.reducer(streams).to(self.dtype))

    def project_context(self, context: Tensor, positions: Tensor) -> list[KeyValue]:
        """Projects the context [B, T, D'] at ``positions`` [T] or [B, T] to each layer's keys and values [B, T, N, E].

        Positions are independent, so a loop may project new states alone and append them.
        """
        angles = self._angles(positions)
        return [layer.self_attn.project(context, angles) for layer in self.layers]

    def draft(
        self, anchor_ids: Tensor, anchors: Tensor, context_kv: list[KeyValue], visible: Tensor, heads: TargetHeads
    ) -> Tensor:
        """Drafts blocks with tokens ``anchor_ids`` [B, A] at positions ``anchors`` [B, A] in one pass -> features [B, A, S, D].

        ``visible`` [B, A, T] bool says which context states each block may read.
        """
        x = self.embed_blocks(anchor_ids, heads)
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

    def embed_blocks(self, anchor_ids: Tensor, heads: TargetHeads) -> Tensor:
        """Embeds [x_a, mask, ..., mask] by the target's frozen embedding: [B, A] -> [B, A, K, D']."""
        masks = anchor_ids.new_full((*anchor_ids.shape, self.config.num_slots), self.mask_token_id)
        x = heads.embed(torch.cat([anchor_ids[..., None], masks], dim=-1)).to(self.dtype)
        return x if self.embed_proj is None else self.embed_proj(x)


def _seen_length(anchors: Tensor, num_tokens: int) -> int:
    """Returns how many leading context states some anchor may see, rounded up, since oneDNN compiles code per new shape.

    On an accelerator it is all of them, because reading the anchors would wait for it.
    """
    return -(-max(1, int(anchors.max())) // SHAPE_MULTIPLE) * SHAPE_MULTIPLE if anchors.device.type == "cpu" else num_tokens
