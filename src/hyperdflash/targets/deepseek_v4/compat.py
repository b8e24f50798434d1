"""Every use of undocumented parts of transformers, for versions 5.23 and 5.24.

1. names that differ between the versions, and names with an underscore, each behind one function;
2. the cache of one decoder layer for the MTP block;
3. a DeepSeek-V4 cache that returns to any token of its last update, exactly and without another forward.

transformers' own cache layers cannot return (`crop` does not change the compressors). Their updates never write into a tensor,
so a mark copies references. A rewind restores the mark and repeats the layers' bookkeeping on the first tokens of the update:
window keys, the compressors' (kv, gate), and the share of each closed window in the next one (its Ca series). It cuts the
compressed entries and does not compute them again.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4CSACache,
    DeepseekV4DecoderLayer,
    DeepseekV4HCACache,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from hyperdflash.settings import one_of

__all__ = ["eager_attention_forward"]

# 5.24 has another name of the argument; the old one fails in accelerate's hooks and causes a warning.
CACHE = "cache" if "cache" in inspect.signature(DeepseekV4Attention.forward).parameters else "past_key_values"


def with_cache(cache: Any) -> dict[str, Any]:
    """Returns the keyword argument that passes ``cache`` to a model or to a decoder layer."""
    return {CACHE: cache}


def register(attention: Mapping[str, Callable], experts: Mapping[str, Callable]) -> None:
    """Registers functions for `set_implementations`; attention functions receive the mask of eager attention."""
    for name, function in attention.items():
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, eager_mask)
    for name, function in experts.items():
        ALL_EXPERTS_FUNCTIONS.register(name, function)


def set_implementations(*configs: DeepseekV4Config, attention: str, experts: str) -> None:
    """Chooses the attention and expert functions of every module that reads one of ``configs``."""
    for config in configs:
        config._attn_implementation, config._experts_implementation = attention, experts


def check_implementations(attention: object, experts: object) -> None:
    """Raises ValueError for a name of `set_implementations` under which nothing is registered."""
    for option, name, known in (("attention", attention, ALL_ATTENTION_FUNCTIONS), ("experts", experts, ALL_EXPERTS_FUNCTIONS)):
        one_of(f"target.{option}", name, ("eager", *sorted(set(known.keys()) - {"eager"})))


def implementations(config: DeepseekV4Config) -> dict[str, str]:
    return {"attention": config._attn_implementation, "experts": config._experts_implementation}


def initialize_like(model: PreTrainedModel, module: nn.Module) -> None:
    """Draws the weights of ``module`` by the rules of ``model``."""
    with torch.no_grad():
        module.apply(model._init_weights)


def apply_expert_gate(experts: nn.Module, gate_up: Tensor) -> Tensor:
    """Applies the clamped SwiGLU of ``experts``: [..., 2 I] -> [..., I]."""
    return experts._apply_gate(gate_up)


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device for token ids: the embedding's, also where accelerate moves its weights there per forward."""
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


def is_spread(model: PreTrainedModel) -> bool:
    """Tells whether the modules are on several devices, so that accelerate moves tensors between them."""
    places = set(getattr(model, "hf_device_map", {}).values())
    return len(places) > 1 or "disk" in places


class LayerKeys:
    """The cache of one sliding-attention layer for one forward: puts ``before`` [N, 1, P, C] before the ``new`` keys
    [N, 1, q, C]. V4's single head reads keys as values."""

    def __init__(self, before: Tensor | None):
        self.before, self.new = before, None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, **_) -> tuple[Tensor, Tensor]:
        self.new = keys
        seen = keys if self.before is None else torch.cat([self.before, keys], dim=2)
        return seen, seen


def sliding_keys(layer: DeepseekV4DecoderLayer, x: Tensor, position_embeddings: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Returns the keys [B, 1, T, C] that a sliding-attention layer makes of its input paths [B, T, M, D], and nothing else."""
    attention = layer.self_attn
    _, _, collapsed = layer.attn_hc(x)
    keys = attention.kv_norm(attention.kv_proj(layer.input_layernorm(collapsed))).unsqueeze(1)
    return apply_rotary_pos_emb(keys, *position_embeddings[attention.rope_layer_type])


@dataclass
class Tape:
    """A layer's state at the mark, and its inputs since; K new tokens close W windows. ``keys`` [B, 1, K, d]; ``weights``
    name -> (kv, gate) [B, K, w]; ``overlaps`` name -> (kv, gate) [B, W, rate, w], width of Ca (read by the next window)."""

    before: dict[str, Any]
    keys: Tensor | None = None
    weights: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    overlaps: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict)


class Rewindable:
    """A mixin for V4 cache layers: call ``mark``, then one update, then ``restore`` or ``rewind``."""

    _layer_type = None  # otherwise transformers registers the subclass for this type
    tape: Tape | None = None

    def mark(self) -> None:
        """Remembers this state and starts to record."""
        self.tape = None  # first, so that restore stops the recording
        self.tape = Tape({name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()})

    def restore(self) -> None:
        """Returns to the mark and stops recording."""
        vars(self).update(self.tape.before)

    def rewind(self, keep: int) -> None:
        """Returns to the state after the first ``keep`` of the K tokens since the mark, and stops recording."""
        tape, entries = self.tape, dict(getattr(self, "compressed_kv", {}))
        self.restore()
        if keep == 0:
            return
        keys = tape.keys[:, :, :keep]
        super().update(keys, keys)
        for name, (kv, gate) in tape.weights.items():
            chunk, _, _ = super().store_compression_weights(name, kv[:, :keep], gate[:, :keep])
            windows = chunk.shape[1] // self.compress_rate
            self.entry_count[name] += windows
            self.compressed_kv[name] = entries[name][:, : self.entry_count[name]]
            if windows and name in tape.overlaps:
                kv, gate, width = tape.overlaps[name]
                super().update_overlap_state(name, kv[:, :windows], gate[:, :windows], width)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.tape:
            self.tape.keys = key_states
        return super().update(key_states, value_states, *args, **kwargs)

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, int]:
        if self.tape:
            self.tape.weights[name] = kv, gate
        return super().store_compression_weights(name, kv, gate)

    def update_overlap_state(self, name: str, kv: Tensor, gate: Tensor, width: int) -> tuple[Tensor | None, Tensor | None]:
        if self.tape:
            self.tape.overlaps[name] = kv, gate, width
        return super().update_overlap_state(name, kv, gate, width)


class RewindableWindow(Rewindable, DynamicSlidingWindowLayer):
    def __init__(self, config: DeepseekV4Config):
        super().__init__(sliding_window=config.sliding_window)


class RewindableHCA(Rewindable, DeepseekV4HCACache):
    pass


class RewindableCSA(Rewindable, DeepseekV4CSACache):
    pass


LAYERS = {
    "sliding_attention": RewindableWindow,
    "heavily_compressed_attention": RewindableHCA,
    "compressed_sparse_attention": RewindableCSA,
}


class RewindableCache(Cache):
    """An empty cache for `with_cache`; every layer is ``Rewindable``."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__(layers=[LAYERS[layer_type](config) for layer_type in config.layer_types])

    def mark(self) -> None:
        for layer in self.layers:
            layer.mark()

    def rewind(self, keep: int) -> None:
        for layer in self.layers:
            layer.rewind(keep)
