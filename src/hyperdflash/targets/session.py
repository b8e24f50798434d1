"""A text's forward through the target, some tokens at a time, with the last tokens taken back where a draft was wrong.

Shapes: see contracts.py; K here is the number of new tokens. The target's adapter brings the forward and the cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hyperdflash.targets.adapter import adapter_of
from hyperdflash.targets.taps import tap_residual


@dataclass(frozen=True)
class TargetStep:
    """What one forward gave for K new tokens.

    ``logits`` [B, K, V] fp32, the target's own; after a prefill [B, 1, V], those of the last token alone.
    ``final`` [B, K, M, D] the residual before `hc_head`, in the target's dtype and not rounded to a cache's.
    ``layers`` [B, K, L, M, D] the outputs of the session's ``layer_ids`` in their order, None without any.
    """

    logits: Tensor
    final: Tensor
    layers: Tensor | None


class TargetSession:
    """One text's (or B equally long texts') incremental forward through a target, with exact rollback.

    The rows of a batch walk in lockstep: they grow by the same K and share one ``keep``, since a cache holds one length.
    Everything runs under `torch.inference_mode`, so no result can enter a graph that is differentiated.

    Hooks read the states. `close`, leaving the `with` block, or the end of the object removes them.
    """

    def __init__(self, model: PreTrainedModel, layer_ids: Sequence[int] = ()):
        self.model = model
        self.layer_ids = tuple(layer_ids)
        self.length = 0
        self._adapter = adapter_of(model.config.model_type)
        self._cache = self._adapter.new_cache(model.config)
        self._rows = 0
        self._extended: Tensor | None = None  # the last extend's tokens, as long as they can be taken back
        self._taps = tap_residual(model, layer_ids)
        self._close = weakref.finalize(self, self._taps.remove)

    def __enter__(self) -> TargetSession:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks from the model; the session takes no more tokens."""
        self._close()

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> TargetStep:
        """The first forward: [B, T] int64 with T >= 1, on an empty session; ``logits`` of the last token alone."""
        if self.length:
            raise ValueError(
                f"prefill wants an empty session, this one holds {self.length} tokens: extend it or make a new one"
            )
        self._check(input_ids)
        self._rows = input_ids.shape[0]
        return self._forward(input_ids, last_only=True)

    @torch.inference_mode()
    def extend(self, input_ids: Tensor) -> TargetStep:
        """The next K >= 1 tokens of every row: [B, K] int64."""
        if not self.length:
            raise ValueError("extend wants a session that holds a text, this one is empty: prefill it first")
        self._check(input_ids)
        if input_ids.shape[0] != self._rows:
            raise ValueError(
                f"extend wants the {self._rows} rows of the prefill, got {input_ids.shape[0]}: prefill a new session"
            )
        self._cache.mark()
        step = self._forward(input_ids)
        self._extended = input_ids
        return step

    @torch.inference_mode()
    def rollback(self, keep: int) -> None:
        """Keep the first ``keep`` of the last extend's K tokens, 0..K, in every row, without a forward. Once, and only right
        after the extend."""
        if self._extended is None:
            raise ValueError("rollback takes tokens of the last extend back, and none came before this call: extend first")
        num_tokens = self._extended.shape[1]
        if not 0 <= keep <= num_tokens:
            raise ValueError(f"keep must be in 0..{num_tokens}, the tokens of the last extend, got {keep}")
        self._extended = None
        if keep == num_tokens:
            return
        self.length -= num_tokens - keep
        self._cache.rewind(keep)

    def _forward(self, input_ids: Tensor, last_only: bool = False) -> TargetStep:
        logits = self._adapter.step(self.model, input_ids, self._cache, self.length, last_only).float()
        self.length += input_ids.shape[1]
        device = self._adapter.input_device(self.model)  # a spread target's taps lie on as many devices as its layers
        layers = [self._taps.layers[i].to(device) for i in self.layer_ids]
        stacked = torch.stack(layers, dim=2) if layers else None
        return TargetStep(logits.to(device), self._taps.final.to(device), stacked)

    def _check(self, input_ids: Tensor) -> None:
        if not self._close.alive:
            raise ValueError("this session is closed and its hooks are gone: make a new TargetSession")
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be [rows, tokens] with one token or more, got {list(input_ids.shape)}")
