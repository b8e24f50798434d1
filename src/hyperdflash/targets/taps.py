"""Reads a target's hidden states while it runs: the residual before the collapse, and the outputs of chosen layers. Shapes: see
contracts.py. transformers does not return that residual, so a hook reads the input of the collapse."""

from collections.abc import Sequence
from functools import partial
from typing import Self

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hyperdflash.targets.adapter import adapter_of


class Taps:
    """``residual`` [B, T, M, D] and ``layers`` {id: [B, T, M, D]} of the last forward; `remove` or the end of a `with` block
    removes the hooks from the model."""

    residual: Tensor

    def __init__(self) -> None:
        self.layers: dict[int, Tensor] = {}
        self.handles: list[RemovableHandle] = []

    def remove(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    __exit__ = remove


def check_finite(model: PreTrainedModel, input_ids: Tensor, logits: Tensor, names: Sequence[str]) -> None:
    """Raises ValueError, with the row's name and the first layer, unless ``logits`` [B, ..., V] of [B, T] are finite."""
    wrong = (~logits.isfinite().flatten(1).all(dim=1)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        with tap_residual(model, range(model.config.num_hidden_layers)) as taps:
            model.base_model(input_ids[row : row + 1], use_cache=False)
        layer = next((f"layer {i}" for i, states in sorted(taps.layers.items()) if not states.isfinite().all()), "the LM head")
        raise ValueError(
            f"{names[row]} gives NaN or infinity, first in {layer} of the target: its weights are damaged, or its numbers too "
            "large for target.dtype"
        )


def tap_residual(model: PreTrainedModel, layer_ids: Sequence[int] = ()) -> Taps:
    """Collects the states of every forward until `Taps.remove`; layer i is transformers' ``hidden_states[i + 1]`` before any
    collapse. ValueError for a layer that the target lacks."""
    layers, collapse, _ = adapter_of(model.config.model_type).parts(model)
    if wrong := [i for i in layer_ids if not 0 <= i < len(layers)]:
        raise ValueError(f"layer_ids must be in 0..{len(layers) - 1} for this target, got {wrong}")
    taps = Taps()
    taps.handles.append(collapse.register_forward_pre_hook(lambda _, args: setattr(taps, "residual", args[0])))
    for i in layer_ids:
        hook = partial(lambda i, _, args, output: taps.layers.update({i: output}), i)
        taps.handles.append(layers[i].register_forward_hook(hook))
    return taps
