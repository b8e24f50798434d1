"""Block attention: every block attends to the context it may see and to itself.

E width of a head, H query heads, N key-value heads, G = H / N query heads a key-value head; the rest in
contracts.py. Attention to the context and to the own block run apart; their log-sum-exps join them into one softmax over
both, so nothing is quadratic in anchors. Scores of the context, [anchors, context], exist for a few anchors at a time and only
for the span of context that these see. The backward pass recomputes all scores (FlashAttention, arXiv 2205.14135).

In training on CUDA ``flex_block_attention`` computes the same in one kernel, from the same mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hyperdflash.contracts import BlockLayout
from hyperdflash.drafting.layers import RMSNorm, linear, rotate
from hyperdflash.numerics import fast_fp32_products

if TYPE_CHECKING:
    from hyperdflash.drafting.config import DrafterConfig

KeyValue = tuple[Tensor, Tensor]
Angles = tuple[Tensor, Tensor]

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # fp32 scores of a few anchors; on a CPU they fit in its cache
SHAPE_MULTIPLE = 64  # of lengths: oneDNN compiles half a megabyte of code per new shape of a product
UNSEEN = -1e30  # a score whose share of any softmax is 0; finite, because an anchor may see no context at all


# A block may attend to the context strictly before its anchor and to what its layout shows of itself, never to another block.


def own_mask(layout: BlockLayout, device: torch.device | str) -> Tensor | None:
    """Returns [K, K] bool, True where own-block position i attends to j; None if every position sees the whole block."""
    if layout.visible is None:
        return None
    if layout == BlockLayout.chain(layout.size, "causal"):  # computed on the device, because a copy to it would wait
        return torch.ones(layout.size, layout.size, dtype=torch.bool, device=device).tril()
    return torch.tensor(layout.visible, device=device)


def context_mask(anchors: Tensor, context_positions: Tensor, window: int | None = None) -> Tensor:
    """Returns which context states each block sees: [B, A] anchors, [T] or [B, T] positions of states -> [B, A, T] bool.

    A block sees positions strictly before its anchor: in decoding the anchor is the newest token and has no target state yet.
    Padding of a document lies after every anchor and is never seen. With ``window`` W a block sees only the W newest states, at
    positions a - W to a - 1, so that a decoding loop may drop older ones.
    """
    distance = anchors[..., None] - context_positions[..., None, :]
    return distance > 0 if window is None else (distance > 0) & (distance <= window)


def block_attention(
    query: Tensor, context: KeyValue, block: KeyValue, visible: Tensor, own_visible: Tensor | None = None
) -> Tensor:
    """Attends to visible context and own block by one softmax in fp32 -> [B, A, K, H * E]. ``query`` [B, A, K, H, E];
    ``context`` keys and values [B, T, N, E]; ``block`` keys and values [B, A, K, N, E]; ``visible`` [B, A, T] bool and
    ``own_visible`` [K, K] bool, None for all."""
    if not torch.is_grad_enabled() and 4 * visible.numel() * query[0, 0, ..., 0].numel() <= _chunk_bytes(query):
        return reference_block_attention(query, context, block, visible, own_visible)  # a round of decoding is faster at once
    query = _by_kv_head(query * query.shape[-1] ** -0.5, block[0].shape[3]).contiguous()  # [B, N, A, R, E]
    context = [x.transpose(1, 2).contiguous() for x in context]  # [B, N, T, E]
    block = [x.permute(0, 3, 1, 2, 4).contiguous() for x in block]  # [B, N, A, K, E]
    return attend(query, *context, *block, visible, own_visible).flatten(3)


def reference_block_attention(
    query: Tensor, context: KeyValue, block: KeyValue, visible: Tensor, own_visible: Tensor | None = None
) -> Tensor:
    """Computes ``block_attention`` by its formula, with all scores at once: [B, N, G, A, K, T] and [B, N, G, A, K, K]."""
    num_kv_heads, num_context = context[0].shape[2], visible.shape[2]
    query = query.unflatten(3, (num_kv_heads, -1)).permute(0, 3, 4, 1, 2, 5) * query.shape[-1] ** -0.5  # [B, N, G, A, K, E]
    context_key, context_value = (x.transpose(1, 2)[:, :, None, None] for x in context)  # [B, N, 1, 1, T, E]
    block_key, block_value = (x.permute(0, 3, 1, 2, 4)[:, :, None] for x in block)  # [B, N, 1, A, K, E]
    of_context = (query @ context_key.mT).float().masked_fill(~visible[:, None, None, :, None], float("-inf"))
    of_block = (query @ block_key.mT).float()
    if own_visible is not None:
        of_block = of_block.masked_fill(~own_visible, float("-inf"))
    weights = torch.cat([of_context, of_block], dim=-1).softmax(dim=-1).to(block_value.dtype)
    output = weights[..., :num_context] @ context_value + weights[..., num_context:] @ block_value
    return output.permute(0, 3, 4, 1, 2, 5).flatten(3)


@torch.compiler.disable  # it reads spans of context on the host
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    visible: Tensor,
    own_visible: Tensor | None = None,
) -> Tensor:
    """Computes ``block_attention`` by key-value heads -> [B, A, K, H, E]. ``query`` [B, N, A, R, E], scaled, with R = G * K
    rows per anchor; ``key`` and ``value`` [B, N, T, E]; ``block_key`` and ``block_value`` [B, N, A, K, E]; ``visible`` [B, A,
    T]; ``own_visible`` [K, K]."""
    hidden = None if own_visible is None else ~own_visible.repeat(query.shape[3] // len(own_visible), 1)  # [R, K]
    return _Attention.apply(query, key, value, block_key, block_value, visible, hidden)


def _by_kv_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """Groups the rows of an anchor that read the same keys: [B, A, K, H, E] -> [B, N, A, R, E]."""
    return x.unflatten(3, (num_kv_heads, -1)).permute(0, 3, 1, 4, 2, 5).flatten(3, 4)


class _Attention(torch.autograd.Function):
    """Saves its arguments, its result (which the next product saves anyway), the log-sum-exps of the whole softmax and the
    context's share in it. The backward pass recomputes the scores, and from these the weights."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_key: Tensor,
        block_value: Tensor,
        visible: Tensor,
        hidden: Tensor | None,
    ) -> Tensor:
        of_context, spans = torch.empty_like(query), _spans(query, visible)
        context_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        with fast_fp32_products():
            for anchors, span in spans:
                # contiguous, because a product would copy them, transposed where it reads them so
                keys, values = key[:, :, span].contiguous(), value[:, :, span].contiguous()
                scores = _scores(query[:, :, anchors], keys, visible[:, anchors, span])
                top = scores.amax(dim=-1)
                weights = torch.softmax(scores, dim=-1, out=scores)
                log_sum = top - weights.amax(dim=-1).log()  # the largest weight is exp(top) / sum
                of_anchors = of_context[:, :, anchors]
                of_anchors.copy_((weights.to(value.dtype) @ values).view_as(of_anchors))
                context_sum[:, :, anchors] = log_sum.view_as(context_sum[:, :, anchors])
            scores = (query @ block_key.mT).float()  # [B, N, A, R, K]
            if hidden is not None:
                scores.masked_fill_(hidden, UNSEEN)
            log_sum = torch.logaddexp(context_sum, scores.logsumexp(dim=-1))
            weights = scores.sub_(log_sum[..., None]).exp_().to(value.dtype)
            share = (context_sum - log_sum).exp_()[..., None]
            output = (share * of_context).add_(weights @ block_value).to(query.dtype)
        by_group = output.unflatten(3, (-1, block_key.shape[3]))  # [B, N, A, G, K, E]
        output = by_group.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).contiguous()
        ctx.save_for_backward(query, key, value, block_key, block_value, visible, output, log_sum, share)
        ctx.spans, ctx.hidden = spans, hidden
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output: Tensor):
        query, key, value, block_key, block_value, visible, output, log_sum, share = ctx.saved_tensors
        # d scores = weights * (d_output value^T - delta), with delta the mean of d_output value^T under the weights. The
        # context's weights are its own softmax times its share, which is faster than an exponential of the scores.
        delta = _by_kv_head((d_output.float() * output.float()).sum(dim=-1, keepdim=True), key.shape[1])
        d_output = _by_kv_head(d_output, key.shape[1]).contiguous()
        d_context, context_delta = (share * d_output).to(query.dtype), share * delta
        with fast_fp32_products():
            weights = (query @ block_key.mT).float().sub_(log_sum[..., None]).exp_()
            if ctx.hidden is not None:
                weights.masked_fill_(ctx.hidden, 0.0)
            d_block_value = weights.to(value.dtype).mT @ d_output
            d_scores = (d_output @ block_value.mT).float().sub_(delta).mul_(weights).to(query.dtype)
            d_query, d_block_key = d_scores @ block_key, d_scores.mT @ query

            d_key, d_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
            for anchors, span in ctx.spans:
                rows, d_rows = query[:, :, anchors].flatten(2, 3), d_context[:, :, anchors].flatten(2, 3)
                keys, values = key[:, :, span].contiguous(), value[:, :, span].contiguous()
                weights = _scores(query[:, :, anchors], keys, visible[:, anchors, span])
                torch.softmax(weights, dim=-1, out=weights)
                d_value[:, :, span] += weights.to(value.dtype).mT @ d_rows
                d_scores = (d_rows @ values.mT).float()
                d_scores = d_scores.sub_(context_delta[:, :, anchors].flatten(2, 3)).mul_(weights).to(query.dtype)
                of_anchors = d_query[:, :, anchors]
                of_anchors += (d_scores @ keys).view_as(of_anchors)
                d_key[:, :, span] += d_scores.mT @ rows
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_block_key, d_block_value, None, None


def _chunk_bytes(tensor: Tensor) -> int:
    return CHUNK_BYTES.get(tensor.device.type, CHUNK_BYTES["cpu"])


def _spans(query: Tensor, visible: Tensor) -> list[tuple[slice, slice]]:
    """Returns slices of a few anchors each, with the span of context that at least one of them sees, in eighths of the whole.
    On an accelerator the span is the whole context, because reading the mask would wait for it."""
    batch, num_kv_heads, num_anchors, rows, _ = query.shape
    num_context = max(1, visible.shape[2])
    size = max(8, _chunk_bytes(query) // (4 * batch * num_kv_heads * rows * num_context))
    size = 1 << size.bit_length() - 1
    eighth = -(-num_context // (8 * SHAPE_MULTIPLE)) * SHAPE_MULTIPLE
    seen = visible.any(dim=0)  # [A, T]
    spans = []
    for first in range(0, num_anchors, size):
        anchors = slice(first, first + size)
        if visible.device.type != "cpu":
            spans.append((anchors, slice(0, num_context)))
            continue
        columns = seen[anchors].any(dim=0).nonzero().squeeze(1).tolist() or [0]
        spans.append((anchors, slice(columns[0] // eighth * eighth, (columns[-1] // eighth + 1) * eighth)))
    return spans


def _scores(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """Returns scores [B, N, a * R, t] in fp32, UNSEEN where not visible: [B, N, a, R, E], [B, N, t, E], [B, a, t]."""
    scores = (query.flatten(2, 3) @ key.mT).float()
    bias = torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, UNSEEN)  # adding a bias is faster than filling
    scores.unflatten(2, query.shape[2:4]).add_(bias[:, None, :, None])
    return scores


def attention_mask(visible: Tensor, layout: BlockLayout) -> Tensor | BlockMask:
    """Converts ``visible`` [B, A, T] once for the ``BlockAttention`` of all layers: to a mask of FlexAttention in training on
    CUDA. Elsewhere it stays as it is; in decoding, lengths change every round and each would need a compilation."""
    if visible.is_cuda and torch.is_grad_enabled():
        return flex_mask(visible, layout, torch.compile(create_block_mask))
    return visible


def flex_mask(visible: Tensor, layout: BlockLayout, create: Callable = create_block_mask) -> BlockMask:
    """Returns the mask of queries [A * K] over keys [T + A * K], from ``visible`` [B, A, T] and ``layout``."""
    batch, num_anchors, num_context = visible.shape
    block_size, own_visible = layout.size, own_mask(layout, visible.device)

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        of_context = visible[b, q // block_size, kv.clamp(max=num_context - 1)]
        of_block = (kv - num_context) // block_size == q // block_size
        if own_visible is not None:
            of_block = of_block & own_visible[q % block_size, (kv - num_context).clamp(min=0) % block_size]
        return torch.where(kv < num_context, of_context, of_block)

    rows = num_anchors * block_size
    return create(seen, batch, None, rows, num_context + rows, device=visible.device)


def flex_block_attention(
    query: Tensor, context: KeyValue, block: KeyValue, mask: BlockMask, attend: Callable = flex_attention
) -> Tensor:
    """Computes ``block_attention`` by FlexAttention, from ``flex_mask`` in place of ``visible``."""
    key, value = (torch.cat([c, x.flatten(1, 2)], dim=1).transpose(1, 2) for c, x in zip(context, block, strict=True))
    output = attend(query.flatten(1, 2).transpose(1, 2), key, value, block_mask=mask, enable_gqa=True)
    return output.transpose(1, 2).reshape(*query.shape[:3], -1)


class BlockAttention(nn.Module):
    """Projections, q/k norms and RoPE around ``block_attention``. Context and block share the key and value weights."""

    def __init__(self, config: DrafterConfig, hidden_size: int, layout: BlockLayout):
        super().__init__()
        self.layout = layout
        self.head_dim = config.head_dim
        self.q_proj = linear(hidden_size, config.num_heads * config.head_dim)
        self.k_proj = linear(hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = linear(hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = linear(config.num_heads * config.head_dim, hidden_size)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def project(self, x: Tensor, angles: Angles) -> KeyValue:
        """Projects [..., D] to keys, normed and rotated to their positions, and values, [..., N, E] each."""
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.k_norm(key), *angles), value

    def forward(self, x: Tensor, angles: Angles, context: KeyValue, mask: Tensor | BlockMask) -> Tensor:
        """Attends from blocks [B, A, K, D] -> [B, A, K, D]; ``mask`` comes from ``attention_mask``."""
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, A, K, H, E]
        query, block = rotate(self.q_norm(query), *angles), self.project(x, angles)
        if isinstance(mask, BlockMask):
            return self.o_proj(flex_block_attention(query, context, block, mask, torch.compile(flex_attention)))
        return self.o_proj(block_attention(query, context, block, mask, own_mask(self.layout, mask.device)))
