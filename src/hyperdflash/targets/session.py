"""Runs a text through the target some tokens at a time, and takes back the tokens of rejected drafts. Shapes: see contracts.py;
K here is the number of new tokens. The target's adapter provides the forward and the cache."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hyperdflash.targets.adapter import PREFILL, adapter_of
from hyperdflash.targets.taps import check_finite, tap_residual


@dataclass(frozen=True)
class TargetStep:
    """The result of one forward over K new tokens, in the target's dtype. ``logits`` [B, K, V] fp32; a prefill gives [B, 1, V]
    of the last token alone. ``residual`` [B, K, M, D] is the one before `hc_head`, ``layers`` [B, K, L, M, D] are the outputs
    of the session's ``layer_ids`` in their order; None if there are none."""

    logits: Tensor
    residual: Tensor
    layers: Tensor | None


class TargetSession:
    """Runs one text, or B texts of one length, through a target step by step, with exact rollback. The rows of a batch grow by
    the same K and share one ``keep``, since a cache has one length. No result can enter a differentiated graph. `close`, the
    end of the `with` block, or the end of the object removes the hooks that read the states."""

    def __init__(self, model: PreTrainedModel, layer_ids: Sequence[int] = ()):
        self.model = model
        self.layer_ids = tuple(layer_ids)
        self.length = 0
        self._adapter = adapter_of(model.config.model_type)
        self._cache = self._adapter.new_cache(model.config)
        self._rows = 0
        self._extended: Tensor | None = None  # the last extend's tokens, while rollback is allowed
        self._taps = tap_residual(model, layer_ids)
        self._close = weakref.finalize(self, self._taps.remove)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Removes the hooks from the model; the session then takes no tokens."""
        self._close()

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> TargetStep:
        """Runs the first tokens, [B, T] int64 with T >= 1, ``PREFILL`` at a time; ``logits`` of the last token alone.
        ValueError unless the session is empty, or where the logits are not finite."""
        if self.length:
            raise ValueError(f"prefill wants an empty session, this holds {self.length} tokens: extend it or make a new one")
        self._check(input_ids)
        self._rows = input_ids.shape[0]
        steps = [self._forward(piece, last_only=True) for piece in input_ids.split(PREFILL, dim=1)]
        logits, layers = steps[-1].logits, [step.layers for step in steps]
        check_finite(self.model, input_ids, logits, ["the prompt"] * len(input_ids))
        residual = torch.cat([step.residual for step in steps], dim=1)
        return TargetStep(logits, residual, torch.cat(layers, dim=1) if self.layer_ids else None)

    @torch.inference_mode()
    def extend(self, input_ids: Tensor) -> TargetStep:
        """Runs the next K >= 1 tokens of every row, [B, K] int64; ValueError before a prefill."""
        if not self.length:
            raise ValueError("extend wants a session that holds a text, this one is empty: prefill it first")
        self._check(input_ids)
        if input_ids.shape[0] != self._rows:
            raise ValueError(f"extend wants the {self._rows} rows of the prefill, got {len(input_ids)}: make a new session")
        self._cache.mark()
        step = self._forward(input_ids)
        self._extended = input_ids
        return step

    @torch.inference_mode()
    def rollback(self, keep: int) -> None:
        """Keeps ``keep`` of the last extend's K tokens in every row without a forward; ValueError unless after an extend."""
        if self._extended is None:
            raise ValueError("rollback takes tokens of the last extend back, and there is none before this call: extend first")
        num_tokens = self._extended.shape[1]
        if not 0 <= keep <= num_tokens:
            raise ValueError(f"keep must be in 0..{num_tokens}, the tokens of the last extend, got {keep}")
        self._extended = None
        if keep < num_tokens:
            self.length -= num_tokens - keep
            self._cache.rewind(keep)

    def _forward(self, input_ids: Tensor, last_only: bool = False) -> TargetStep:
        logits = self._adapter.step(self.model, input_ids, self._cache, self.length, last_only).float()
        self.length += input_ids.shape[1]
        device = self._adapter.input_device(self.model)  # the taps of a spread target are on its layers' devices
        layers = [self._taps.layers[i].to(device) for i in self.layer_ids]
        stacked = torch.stack(layers, dim=2) if layers else None
        return TargetStep(logits.to(device), self._taps.residual.to(device), stacked)

    def _check(self, input_ids: Tensor) -> None:
        if not self._close.alive:
            raise ValueError("this session is closed and its hooks are gone: make a new TargetSession")
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be [rows, tokens] with one token or more, got {list(input_ids.shape)}")
