"""The modules of a target that a drafter shares: embedding, collapse of the paths, final norm, LM head. Shapes: see
contracts.py. Training and replay need nothing else of the target once the states are cached."""

from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hyperdflash.settings import one_of
from hyperdflash.targets.adapter import TargetConfig, adapter_of

Teacher = Literal["mean_pool", "hc_head"]

TOKENS = 1 << 14  # rows of the LM head that are widened together


class TargetHeads(nn.Module):
    """Frozen embedding, collapse, norm and LM head of a target with hyper-connections.

    ``embed_tokens`` weight [V, D], ``lm_head`` weight [V, D], ``norm`` over D. ``hc_head`` collapses [B, T, M, D] into
    [B, T, D]; its method ``gate`` returns the `Gate` that ``reducer=hc_gate`` inherits, or None. Both tables can have a
    narrower type than ``dtype``: readers widen the rows that they use, which changes no value.
    """

    def __init__(self, config: TargetConfig, dtype: torch.dtype | None = None):
        super().__init__()
        self.config, self.computes_in = config, dtype
        self.num_paths, self.hidden_size = config.hc_mult, config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.hc_head, self.norm = adapter_of(config.model_type).new_heads(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # of the target's other weights, by the heads' own digest and whether to keep it; "" where they are not known
        self.layers_digest: Callable[[str, bool], str] = lambda heads, keep: ""
        self.requires_grad_(False).eval()

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Returns the heads of a loaded model, which share its tensors."""
        with torch.device("meta"):
            heads = cls(model.config)
        _, collapse, heads.norm = adapter_of(model.config.model_type).parts(model)
        heads.embed_tokens, heads.lm_head = model.get_input_embeddings(), model.get_output_embeddings()
        for name, parameter in collapse.named_parameters():
            setattr(heads.hc_head, name, parameter)
        return heads.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        """The type of collapsed states and of products with the LM head: the wider of the given and the tables' type."""
        own = self.lm_head.weight.dtype
        return own if self.computes_in is None else torch.promote_types(own, self.computes_in)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode, since the heads are frozen."""
        return super().train(False)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeds [...] int64 as [..., D]."""
        return self.embed_tokens(input_ids).to(self.dtype)

    def collapse(self, residual: Tensor, teacher: Teacher = "hc_head") -> Tensor:
        """Returns the normed state that the LM head reads: [B, T, M, D] -> [B, T, D]. ``hc_head`` is the target's own collapse,
        which gives the target's logits; ``mean_pool`` is the paper's KL teacher, lm_head(norm(mean_j H_j)) (section 2.3).
        ValueError for another ``teacher``."""
        one_of("kl.teacher", teacher, ("mean_pool", "hc_head"))
        residual = residual.to(self.dtype)
        return self.norm(self.hc_head(residual) if teacher == "hc_head" else residual.mean(dim=-2))

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits [..., V] in fp32 for states [..., D]."""
        return product(hidden.to(self.dtype), self.lm_head.weight)


def product(states: Tensor, table: Tensor) -> Tensor:
    """Returns states [..., D] times ``table`` [V, D] in the states' dtype, [..., V] fp32; widens a narrower table in parts."""
    if table.dtype == states.dtype:
        return F.linear(states, table).float()
    return torch.cat([F.linear(states, rows.to(states.dtype)) for rows in table.split(TOKENS)], dim=-1).float()
