"""DeepSeek-V4's native multi-token-prediction block (`mtp.0.*`), which transformers does not have.

Shapes: see contracts.py. Index i of the block consumes H[i] and embed(x[i+1]) at rope position i and predicts x[i+2].
The block is one full V4 decoder layer (sliding attention, score-routed experts, its own hyper-connections) between two
projections and its own hyper-connection head; embedding and LM head are the target's.
"""

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
)

from hyperdflash.targets.adapter import NativeMTP
from hyperdflash.targets.deepseek_v4 import compat


class MTPBlock(NativeMTP):
    """X = e_proj(enorm(embed(x[i+1]))) on every path + h_proj(hnorm(H[i])) on each path -> layer -> own head."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        one = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "mlp_layer_types": ["moe"]}
        self.config = DeepseekV4Config(**(config.to_dict() | one))
        compat.set_implementations(self.config, **compat.implementations(config))
        self.sliding_window = config.sliding_window
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = DeepseekV4RMSNorm(hidden, eps=eps), DeepseekV4RMSNorm(hidden, eps=eps)
        self.e_proj, self.h_proj = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.layer = DeepseekV4DecoderLayer(self.config, layer_idx=0)
        self.hc_head = DeepseekV4HyperHead(self.config)
        self.norm = DeepseekV4RMSNorm(hidden, eps=eps)
        self.rotary_emb = DeepseekV4RotaryEmbedding(self.config)

    def rotary(self, x: Tensor, position_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns cos and sin of ``position_ids`` [B, T] in the layer's form."""
        return {"main": self.rotary_emb(x, position_ids=position_ids, layer_type="main")}

    def combine(self, residual: Tensor, next_embeds: Tensor) -> Tensor:
        """Joins H [B, T, M, D] and embed(x[i+1]) [B, T, D] into X [B, T, M, D]."""
        embeds = self.e_proj(self.enorm(next_embeds)).unsqueeze(-2)
        return embeds + self.h_proj(self.hnorm(residual.to(next_embeds.dtype)))

    def run(self, residual, next_embeds, position_ids, mask, keys=None) -> tuple[Tensor, Tensor]:
        cache = compat.LayerKeys(keys)
        residual = self.layer(
            self.combine(residual, next_embeds),
            position_embeddings=self.rotary(next_embeds, position_ids),
            position_ids=position_ids,
            attention_mask=mask,
            input_ids=None,
            **compat.with_cache(cache),
        )
        return residual, cache.new

    def keys(self, residual: Tensor, next_embeds: Tensor, position_ids: Tensor) -> Tensor:
        x = self.combine(residual, next_embeds)
        return compat.sliding_keys(self.layer, x, self.rotary(next_embeds, position_ids))

    def head(self, residual: Tensor) -> Tensor:
        return self.norm(self.hc_head(residual))

    def forward(self, residual: Tensor, next_embeds: Tensor, mask: Tensor | None = None) -> Tensor:
        """Runs one step over a text: [B, T, M, D], [B, T, D] -> normed states [B, T, D] for x[i+2]; by default window mask."""
        length = residual.shape[1]
        position_ids = torch.arange(length, device=residual.device).unsqueeze(0)
        if mask is None:
            mask = window_mask(0, length, self.sliding_window, next_embeds.dtype, residual.device)
        return self.head(self.run(residual, next_embeds, position_ids, mask)[0])


def window_mask(cached: int, num_new: int, window: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Returns [1, 1, K, cached + K]: 0 where new token i sees key j (cached + i - window < j <= cached + i), -inf elsewhere."""
    distance = torch.arange(cached, cached + num_new, device=device)[:, None] - torch.arange(cached + num_new, device=device)
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(1, 1, *hidden.shape, dtype=dtype, device=device).masked_fill(hidden, float("-inf"))
