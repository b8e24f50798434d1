"""The interface of one kind of target; no other room names a class of transformers' model files. A kind is the `model_type` of
config.json. Its adapter is a module with the functions of targets/deepseek_v4/adapter.py. To add a kind, write that module and
add a line to ``ADAPTERS``. Shapes: see contracts.py."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Protocol

from torch import Tensor, nn

PREFILL = 1024  # tokens of a prompt per forward, which bounds the memory of its attention
ADAPTERS = {"deepseek_v4": "hyperdflash.targets.deepseek_v4.adapter"}


class TargetConfig(Protocol):
    """Fields of every target's configuration; ``hc_mult`` is M, the number of hyper-connection paths."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    hc_mult: int
    sliding_window: int
    max_position_embeddings: int
    rms_norm_eps: float
    hc_eps: float
    initializer_range: float


@dataclass(frozen=True)
class Gate:
    """sigmoid(``fn`` r vec(H) * ``scale`` + ``base``) + hc_eps: ``fn`` [M, M * D], ``base`` [M], ``scale`` [1]."""

    fn: Tensor
    base: Tensor
    scale: Tensor


class NativeMTP(nn.Module):
    """The target's own multi-token-prediction block. Index i consumes H[i] and embed(x[i+1]) at position i and predicts x[i+2].
    Index i sees the ``sliding_window`` keys j with i - sliding_window < j <= i."""

    sliding_window: int

    def run(
        self,
        residual: Tensor,
        next_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the block on H [B, T, M, D], embeddings [B, T, D] and the ``keys`` [B, 1, P, C] of P earlier indices.

        Returns the residual before the block's collapse [B, T, M, D], which is H of the next chained step, and the new keys
        [B, 1, T, C]. ``position_ids`` [B, T]; ``mask`` additive [B or 1, 1, T, P + T], 0 keep and -inf drop; None
        shows every key to every index.
        """
        raise NotImplementedError

    def keys(self, residual: Tensor, next_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Returns the keys [B, 1, T, C] that ``run`` makes of H [B, T, M, D], embeddings [B, T, D] and positions [B, T]."""
        raise NotImplementedError

    def head(self, residual: Tensor) -> Tensor:
        """Returns the input of the target's LM head: [B, T, M, D] -> [B, T, D]."""
        raise NotImplementedError


def adapter_of(model_type: str, where: str = "config") -> ModuleType:
    """Returns the adapter of a kind of target; ValueError, which names ``where``, for a kind without one."""
    if model_type not in ADAPTERS:
        raise ValueError(
            f"{where} holds a {model_type} model, wanted one of {', '.join(ADAPTERS)}: give another target.path, or add an "
            "adapter (hyperdflash.targets.adapter)"
        )
    return import_module(ADAPTERS[model_type])
