"""What one kind of target brings, behind one interface: no other room names a class of transformers' model files.

A kind is the `model_type` of config.json. Its adapter is a module with the names of `Adapter`. To add a kind, write that
module and give it a line in ``ADAPTERS``. Shapes: see contracts.py.
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
    """What every target's configuration says; ``hc_mult`` is M, the number of hyper-connection paths."""

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
    """How a target turns its M paths into the one state that its final norm reads; an nn.Module."""

    def __call__(self, paths: Tensor) -> Tensor:
        """[B, T, M, D] -> [B, T, D] in the same dtype."""
        ...

    def gate(self) -> Gate | None:
        """What ``reducer=hc_gate`` inherits; None where the collapse is no gate of that form."""
        ...


class NativeMTP(nn.Module):
    """The target's own multi-token-prediction block.

    Index i consumes H[i] and embed(x[i+1]) at position i and predicts x[i+2]. It sees ``sliding_window`` keys, its own
    included: j is visible from i where i - sliding_window < j <= i.
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
        """H [B, T, M, D] and embeddings [B, T, D], on ``keys`` [B, 1, P, C] of P earlier indices -> residual [B, T, M, D],
        the new keys [B, 1, T, C].

        The residual is the block's own before its collapse, and H of the next chained step. ``position_ids`` [B, T];
        ``attention_mask`` additive [B or 1, 1, T, P + T], 0 keep and -inf drop; None shows every key to every index.
        """
        raise NotImplementedError

    def head(self, residual: Tensor) -> Tensor:
        """[B, T, M, D] -> [B, T, D], what the target's LM head reads."""
        raise NotImplementedError


class Adapter(Protocol):
    """One kind of target. ``path`` is a target's directory, ``model`` what `load_model` returns.

    A cache of `new_cache` remembers B equally long texts: ``mark()`` before a step, after it ``rewind(keep)`` returns to the
    first ``keep`` of its tokens without a forward; ``reorder_cache(rows)`` keeps some rows.
    """

    SUPPORTS: frozenset[str]  # of "mtp": a checkpoint may hold a native MTP block

    def read_config(self, path: Path) -> TargetConfig: ...

    def layer_settings(self, config: TargetConfig) -> Sequence[tuple[str, object]]:
        """The settings that change what the layers compute, each in one spelling, for the fingerprint."""

    def new_heads(self, config: TargetConfig) -> tuple[Collapse, nn.Module]:
        """The collapse and the final norm, without weights."""

    def head_state(self, path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
        """The state of `TargetHeads` alone; the two [V, D] tables stay in bf16 where the checkpoint has them so."""

    def load_model(
        self, path: Path, config: TargetConfig, *, dtype: torch.dtype, attention: str, experts: str, **placement: Any
    ) -> PreTrainedModel:
        """The whole target, dequantized while it is read; ``placement`` is device_map and offload_folder."""

    def load_mtp(self, path: Path, config: TargetConfig, *, experts: str, dtype: torch.dtype) -> NativeMTP: ...

    def parts(self, model: PreTrainedModel) -> tuple[Sequence[nn.Module], nn.Module, nn.Module]:
        """Layers, collapse (its input is the residual before it) and final norm of a loaded model."""

    def input_device(self, model: PreTrainedModel) -> torch.device:
        """Where token ids must lie."""

    def is_spread(self, model: PreTrainedModel) -> bool:
        """Whether the weights lie on several devices."""

    def new_cache(self, config: TargetConfig) -> Any: ...

    def step(self, model: PreTrainedModel, input_ids: Tensor, cache: Any, length: int, last_only: bool = False) -> Tensor:
        """The next tokens [B, K] of texts of which ``cache`` holds ``length`` tokens -> logits [B, K, V], or the last
        token's [B, 1, V]."""


def adapter_of(model_type: str, where: str = "config") -> Any:
    """The `Adapter` of a kind of target; ValueError for a kind without one, ``where`` names its place."""
    if model_type not in ADAPTERS:
        raise ValueError(
            f"{where} holds a {model_type} model, wanted one of {', '.join(ADAPTERS)}: give another target.path, or add an "
            "adapter (hyperdflash.targets.adapter)"
        )
    return import_module(ADAPTERS[model_type])
