"""The interface of one kind of target; no other room names a class of transformers' model files.

A kind is the `model_type` of config.json. Its adapter is a module with the names of `Adapter`. To add a kind, write that
module and add a line to ``ADAPTERS``. Shapes: see contracts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ADAPTERS = {"deepseek_v4": "hyperdflash.targets.deepseek_v4.adapter"}


class TargetConfig(Protocol):
    """Fields of every target's configuration; ``hc_mult`` is M, the number of hyper-connection paths."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    hc_mult: int
    sliding_window: int
    rms_norm_eps: float
    hc_eps: float
    initializer_range: float


@dataclass(frozen=True)
class Gate:
    """sigmoid(``fn`` r vec(H) * ``scale`` + ``base``) + hc_eps: ``fn`` [M, M * D], ``base`` [M], ``scale`` [1]."""

    fn: Tensor
    base: Tensor
    scale: Tensor


class Collapse(Protocol):
    """An nn.Module that turns the M paths into the one state that the target's final norm reads."""

    def __call__(self, paths: Tensor) -> Tensor:
        """Collapses [B, T, M, D] into [B, T, D] of the same dtype."""
        ...

    def gate(self) -> Gate | None:
        """Returns the gate that ``reducer=hc_gate`` inherits; None where the collapse has no gate of that form."""
        ...


class NativeMTP(nn.Module):
    """The target's own multi-token-prediction block.

    Index i consumes H[i] and embed(x[i+1]) at position i and predicts x[i+2]. Index i sees the
    ``sliding_window`` keys j with i - sliding_window < j <= i.
    """

    sliding_window: int

    def run(
        self,
        final: Tensor,
        next_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the block on H [B, T, M, D], embeddings [B, T, D] and the ``keys`` [B, 1, P, C] of P earlier indices.

        Returns the residual [B, T, M, D] and the new keys [B, 1, T, C].

        The residual is the one before the block's collapse; it is H of the next chained step. ``position_ids`` [B, T];
        ``attention_mask`` additive [B or 1, 1, T, P + T], 0 keep and -inf drop; None shows every key to every index.
        """
        raise NotImplementedError

    def head(self, residual: Tensor) -> Tensor:
        """Returns the input of the target's LM head: [B, T, M, D] -> [B, T, D]."""
        raise NotImplementedError


class Adapter(Protocol):
    """One kind of target. ``path`` is a target's directory, ``model`` the result of `load_model`.

    A cache of `new_cache` holds B texts of one length. ``mark()`` before a step lets ``rewind(keep)`` after it return to the
    first ``keep`` of its tokens without a forward; ``reorder_cache(rows)`` selects rows.
    """

    SUPPORTS: frozenset[str]  # "mtp": a checkpoint can have a native MTP block

    def read_config(self, path: Path) -> TargetConfig: ...

    def layer_settings(self, config: TargetConfig) -> Sequence[tuple[str, object]]:
        """Returns the settings that change the layers' results, each in one spelling, for the fingerprint."""

    def new_heads(self, config: TargetConfig) -> tuple[Collapse, nn.Module]:
        """Makes the collapse and the final norm, without weights."""

    def head_state(self, path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
        """Reads the state of `TargetHeads`; the two [V, D] tables stay in bf16 if the checkpoint has them in bf16."""

    def load_model(
        self, path: Path, config: TargetConfig, *, dtype: torch.dtype, attention: str, experts: str, **placement: Any
    ) -> PreTrainedModel:
        """Loads the whole target and dequantizes it on reading; ``placement`` is device_map and offload_folder."""

    def load_mtp(self, path: Path, config: TargetConfig, *, experts: str, dtype: torch.dtype) -> NativeMTP: ...

    def parts(self, model: PreTrainedModel) -> tuple[Sequence[nn.Module], nn.Module, nn.Module]:
        """Returns layers, collapse (its input is the final residual) and final norm of a loaded model."""

    def input_device(self, model: PreTrainedModel) -> torch.device:
        """Returns the device that token ids must be on."""

    def is_spread(self, model: PreTrainedModel) -> bool:
        """Tells whether the weights are on several devices."""

    def new_cache(self, config: TargetConfig) -> Any: ...

    def step(self, model: PreTrainedModel, input_ids: Tensor, cache: Any, length: int, last_only: bool = False) -> Tensor:
        """Runs the next tokens [B, K] of texts of which ``cache`` holds ``length`` tokens.

        Returns logits [B, K, V], or [B, 1, V] of the last token."""


def adapter_of(model_type: str, where: str = "config") -> Any:
    """Returns the `Adapter` of a kind of target; ValueError, which names ``where``, for a kind without one."""
    if model_type not in ADAPTERS:
        raise ValueError(
            f"{where} holds a {model_type} model, wanted one of {', '.join(ADAPTERS)}: give another target.path, or add an "
            "adapter (hyperdflash.targets.adapter)"
        )
    return import_module(ADAPTERS[model_type])
