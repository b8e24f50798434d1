"""Block attention: every block attends to the context before its anchor and to itself.

E width of a head, H query heads, N key-value heads, G = H / N query heads a key-value head; the rest in
src/contracts.py. Context and own block stay apart until the softmax, so nothing is quadratic in anchors:
scores are [B, N, G, A, K, T] and [B, N, G, A, K, K].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from src.drafter.config import DrafterConfig
from src.drafter.layers import RMSNorm, linear, rotate

KeyValue = tuple[Tensor, Tensor]
Angles = tuple[Tensor, Tensor]


def block_attention(query: Tensor, context: KeyValue, block: KeyValue, visible: Tensor) -> Tensor:
    """One softmax, in fp32, over visible context and own block.

    ``query`` [B, A, K, H, E], ``context`` keys and values [B, T, N, E], ``block`` keys and values [B, A, K, N, E],
    ``visible`` [B, A, T] bool (src/blocks/visibility.py) -> [B, A, K, H * E].
    """
    num_docs, num_anchors, block_size, num_heads, width = query.shape
    num_context, num_kv_heads = context[0].shape[1:3]
    groups = num_heads // num_kv_heads

    query = query.unflatten(3, (num_kv_heads, groups)).permute(0, 3, 4, 1, 2, 5) * width**-0.5  # [B, N, G, A, K, E]
    context_key, context_value = (x.transpose(1, 2) for x in context)  # [B, N, T, E]
    block_key, block_value = (x.permute(0, 3, 1, 2, 4).unsqueeze(2) for x in block)  # [B, N, 1, A, K, E]

    # One product for all anchors and heads of a group: [B, N, G * A * K, E] @ [B, N, E, T].
    context_scores = (query.flatten(2, 4) @ context_key.transpose(-1, -2)).view(*query.shape[:-1], num_context)
    context_scores = context_scores.float().masked_fill(~visible[:, None, None, :, None], float("-inf"))
    block_scores = (query @ block_key.transpose(-1, -2)).float()  # [B, N, G, A, K, K]

    weights = torch.cat([context_scores, block_scores], dim=-1).softmax(dim=-1).to(block_value.dtype)
    context_weights, block_weights = weights.split([num_context, block_size], dim=-1)
    from_context = context_weights.flatten(2, 4) @ context_value  # [B, N, G * A * K, E]
    output = from_context.view(query.shape) + block_weights @ block_value  # [B, N, G, A, K, E]
    return output.permute(0, 3, 4, 1, 2, 5).reshape(num_docs, num_anchors, block_size, num_heads * width)


class BlockAttention(nn.Module):
    """Projections, q/k norms and RoPE around ``block_attention``; the same k/v weights serve context and block."""

    def __init__(self, config: DrafterConfig, hidden_size: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = linear(hidden_size, config.num_heads * config.head_dim)
        self.k_proj = linear(hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = linear(hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = linear(config.num_heads * config.head_dim, hidden_size)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def project(self, x: Tensor, angles: Angles) -> KeyValue:
        """[..., D] -> keys (normed, rotated to their positions) and values, [..., N, E] each."""
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.k_norm(key), *angles), value

    def forward(self, x: Tensor, angles: Angles, context: KeyValue, visible: Tensor) -> Tensor:
        """Blocks [B, A, K, D] -> [B, A, K, D]."""
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, A, K, H, E]
        query = rotate(self.q_norm(query), *angles)
        return self.o_proj(block_attention(query, context, self.project(x, angles), visible))
