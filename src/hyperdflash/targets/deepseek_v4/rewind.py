"""A DeepSeek-V4 cache that goes back to any token of its last update, exactly and without another forward.

transformers' layers cannot (`crop` leaves the compressors as they were). Their updates never write into a tensor, so a mark is
a copy of names, and a rewind is the mark plus the layers' own bookkeeping, done again on the kept part of what they were given:
window keys, the compressors' (kv, gate), and each closed window's share in the next one (its Ca series). The compressed
entries themselves are cut, not made again. Copies are as long as the window and one update, never as the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import DeepseekV4Config
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache


@dataclass
class Tape:
    """A layer's state at the mark, and what the layer has been given since; K new tokens, W windows that closed in them.

    ``keys`` [B, 1, K, d]; ``weights`` name -> (kv, gate) [B, K, w]; ``overlaps`` name -> (kv, gate) [B, W, rate, w] and the
    width of Ca, the part of w that the next window reads.
    """

    before: dict[str, Any]
    keys: Tensor | None = None
    weights: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    overlaps: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict)


class Rewindable:
    """Put before a V4 cache layer class. ``mark``, then one update, then ``restore`` or ``rewind``."""

    _layer_type = None  # transformers would list the subclass as its own layer of this type
    tape: Tape | None = None

    def mark(self) -> None:
        """Remember this state and start to record."""
        self.tape = None  # before the state is remembered, so that restore stops the recording
        self.tape = Tape({name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()})

    def restore(self) -> None:
        """Back to the mark; recording stops."""
        vars(self).update(self.tape.before)

    def rewind(self, keep: int) -> None:
        """Back to the state after the first ``keep`` of the K tokens since the mark; recording stops."""
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


def rewindable_cache(config: DeepseekV4Config) -> Cache:
    """An empty cache for ``model(past_key_values=...)`` whose layers are all ``Rewindable``."""
    return Cache(layers=[LAYERS[layer_type](config) for layer_type in config.layer_types])
