"""Attention and experts in forms that are faster on a CPU, registered by name with transformers.

``attn_implementation="windowed"``   DeepSeek-V4 attention without the dense [T, T] scores: a query block of W tokens reads
                                     its own and the previous block plus the compressed entries. Anything but a plain forward
                                     from position 0 runs transformers' eager function.
``experts_implementation="dense"``   every expert on every token in two matrix products, gated by the router's weights. For
                                     the few experts of a tiny target this is faster than sorting tokens by expert.

Both agree with transformers' own modules (tests/targets/test_target.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperdflash.targets.deepseek_v4.compat import apply_expert_gate, eager_attention_forward, register


def windowed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """V4 attention with sinks over [window | compressed entries]; ``query`` [B, H, T, d], ``key`` [B, 1, T + C, d]. Returns [B,
    T, H, d] and None (no attention weights are formed)."""
    batch, heads, length, width = query.shape
    window = module.sliding_window
    rate = module.compressor.compress_rate if module.compressor is not None else None
    num_compressed = length // rate if rate else 0
    if length % window or key.shape[2] != length + num_compressed or dropout:
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)

    blocks = length // window
    key = key[:, 0]  # [B, T + C, d]; keys are values in V4
    own = key[:, :length].reshape(batch, blocks, window, width)
    previous = F.pad(own, (0, 0, 0, 0, 1, 0))[:, :-1]
    local = torch.cat([previous, own], dim=2).reshape(batch * blocks, 2 * window, width)
    query = query.view(batch, heads, blocks, window, width).permute(0, 2, 1, 3, 4)  # [B, n, H, W, d]

    i = torch.arange(window, device=query.device)[:, None]
    j = torch.arange(2 * window, device=query.device)[None, :]
    keep = ((j <= i + window) & (j > i)).expand(blocks, window, 2 * window)
    first = torch.arange(blocks, device=query.device)[:, None, None] == 0
    keep = keep & ~(first & (j < window))
    bias = torch.zeros(keep.shape, dtype=query.dtype, device=query.device).masked_fill(~keep, float("-inf"))

    scores = torch.bmm(query.reshape(batch * blocks, heads * window, width), local.transpose(1, 2)) * scaling
    parts = [scores.view(batch, blocks, heads, window, 2 * window) + bias[None, :, None]]
    if num_compressed:
        entries = key[:, length:]  # [B, C, d]
        visible = attention_mask[:, 0, :, length:].reshape(-1, blocks, 1, window, num_compressed)
        scores = torch.bmm(query.reshape(batch, -1, width), entries.transpose(1, 2)) * scaling
        parts.append(scores.view(batch, blocks, heads, window, num_compressed) + visible)
    parts.append(module.sinks.to(query.dtype).view(1, 1, heads, 1, 1).expand(batch, blocks, heads, window, 1))
    probs = torch.softmax(torch.cat(parts, dim=-1), dim=-1).to(query.dtype)

    output = torch.bmm(probs[..., : 2 * window].reshape(batch * blocks, heads * window, 2 * window), local)
    output = output.view(batch, blocks, heads, window, width)
    if num_compressed:
        weights = probs[..., 2 * window : -1].reshape(batch, -1, num_compressed)
        output = output + torch.bmm(weights, entries).view(batch, blocks, heads, window, width)
    return output.permute(0, 1, 3, 2, 4).reshape(batch, length, heads, width), None


def dense_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[N, D], router's [N, k] indices and weights -> [N, D]; unselected experts are weighted by zero."""
    rows, hidden = hidden_states.shape
    experts, inner = self.num_experts, self.intermediate_dim
    gates = torch.zeros(rows, experts, dtype=top_k_weights.dtype, device=hidden_states.device)
    gates = gates.scatter_add(1, top_k_index, top_k_weights)
    gate_up = F.linear(hidden_states, self.gate_up_proj.view(experts * 2 * inner, hidden))
    activated = apply_expert_gate(self, gate_up.view(rows, experts, 2 * inner)) * gates.to(gate_up.dtype).unsqueeze(-1)
    down = self.down_proj.permute(1, 0, 2).reshape(hidden, experts * inner)
    return F.linear(activated.reshape(rows, experts * inner), down)


register(attention={"windowed": windowed_attention}, experts={"dense": dense_experts})
