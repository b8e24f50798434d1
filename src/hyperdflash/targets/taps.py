"""Reads a target's hidden states while it runs: the residual before the collapse, and the outputs of chosen layers.

Shapes: see contracts.py. transformers does not return that residual, so a hook reads the input of the collapse.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hyperdflash.targets.adapter import adapter_of


class Taps:
    """``final`` [B, T, M, D] and ``layers`` {id: [B, T, M, D]} of the last forward; `remove` or the end of a `with` block
    removes the hooks from the model."""

    def __init__(self) -> None:
        self.final: Tensor | None = None
        self.layers: dict[int, Tensor] = {}
        self.handles: list[RemovableHandle] = []

    def remove(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def __enter__(self) -> Taps:
        return self

    __exit__ = remove


def tap_residual(model: PreTrainedModel, layer_ids: Sequence[int] = ()) -> Taps:
    """Collects the states of every forward until `Taps.remove`; layer i is transformers' ``hidden_states[i + 1]`` before any
    collapse. ValueError for a layer that the target lacks."""
    layers, collapse, _ = adapter_of(model.config.model_type).parts(model)
    wrong = [i for i in layer_ids if not 0 <= i < len(layers)]
    if wrong:
        raise ValueError(f"layer_ids must be in 0..{len(layers) - 1} for this target, got {wrong}")
    taps = Taps()

    def at_head(_, args):
        taps.final = args[0]

    def at_layer(index):
        def hook(_, __, output):
            taps.layers[index] = output

        return hook

    taps.handles = [collapse.register_forward_pre_hook(at_head)]
    taps.handles += [layers[i].register_forward_hook(at_layer(i)) for i in layer_ids]
    return taps
