"""The part of a target that a drafter shares: embedding, final norm, LM head, and how the paths collapse.

Shapes: see contracts.py. This is all that training and replay need once the states are cached; "how this target
collapses its paths" is one ``Collapse``, and what needs it asks here: teacher, conditioning, gate inheritance, fingerprint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperHead, DeepseekV4RMSNorm

Teacher = Literal["mean_pool", "hc_head"]

TOKENS = 1 << 14  # whose rows of the LM head are widened together


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


class HcHead(DeepseekV4HyperHead):
    """DeepSeek-V4's ``hc_head``."""

    def gate(self) -> Gate:
        return Gate(self.hc_fn, self.hc_base, self.hc_scale)


class TargetHeads(nn.Module):
    """Frozen embedding, collapse, norm and LM head of a target with hyper-connections.

    ``config`` the target's; ``embed_tokens`` weight [V, D], ``lm_head`` weight [V, D], ``norm`` RMSNorm over D,
    ``hc_head`` how the paths collapse (another target's own ``collapse``, else DeepSeek-V4's). Both tables may lie in fewer
    bytes than ``dtype``: what reads them widens the rows at hand, which changes no value.
    """

    def __init__(self, config: DeepseekV4Config, collapse: Collapse | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.computes_in = dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.hc_head = HcHead(config) if collapse is None else collapse
        self.norm = DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def of(cls, model: DeepseekV4ForCausalLM) -> TargetHeads:
        """The heads of a loaded model; the tensors are shared, not copied."""
        with torch.device("meta"):
            heads = cls(model.config)
        heads.embed_tokens = model.model.embed_tokens
        for name, parameter in model.model.hc_head.named_parameters():
            setattr(heads.hc_head, name, parameter)
        heads.norm = model.model.norm
        heads.lm_head = model.lm_head
        heads.requires_grad_(False)
        return heads.eval()

    @property
    def num_paths(self) -> int:
        return self.config.hc_mult

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Of states that are collapsed and of products with the LM head: what was asked for, or the tables' own where that is
        wider (``double()`` makes them so)."""
        own = self.lm_head.weight.dtype
        return own if self.computes_in is None else torch.promote_types(own, self.computes_in)

    def train(self, mode: bool = True) -> TargetHeads:
        """Stays in eval mode: the heads are frozen."""
        return super().train(False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[...] int64 -> [..., D]."""
        return self.embed_tokens(input_ids).to(self.dtype)

    def collapse(self, final: Tensor, teacher: Teacher = "hc_head") -> Tensor:
        """Normed state that the LM head reads: [B, T, M, D] -> [B, T, D].

        ``hc_head`` is the target's own collapse (its logits are the target's); ``mean_pool`` is the paper's
        KL teacher, lm_head(norm(mean_j H_j)) (section 2.3).
        """
        final = final.to(self.dtype)
        if teacher == "hc_head":
            return self.norm(self.hc_head(final))
        if teacher == "mean_pool":
            return self.norm(final.mean(dim=-2))
        raise ValueError(f"kl.teacher must be mean_pool or hc_head, got {teacher!r}")

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] in fp32."""
        hidden, table = hidden.to(self.dtype), self.lm_head.weight
        if table.dtype == self.dtype:
            return self.lm_head(hidden).float()
        return torch.cat([F.linear(hidden, rows.to(self.dtype)) for rows in table.split(TOKENS)], dim=-1).float()


def collapse_entrance(model: DeepseekV4ForCausalLM) -> nn.Module:
    """The module of a loaded target whose input is the residual before the collapse, [B, T, M, D]."""
    return model.model.hc_head
