"""The parts of this project's drafters that no engine has, in plain torch: the gate over the paths, and the draft heads.

Each computes what its counterpart in src/hyperdflash/drafting computes, from the export's tensors under the same names.
plugins/sglang links to this file.
B requests, K drafted slots, M paths, D the target's width, V its vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Logits = Callable[[torch.Tensor], torch.Tensor]  # the target's LM head: [B, D] -> [B, V]


class HcGate(nn.Module):
    """``hc_gate``, [T, M * D] -> [T, D] in fp32: the gate reads the raw residual, the sum takes the normed paths."""

    def __init__(self, width: int, num_paths: int, norm_eps: float, hc_eps: float, path_norm: bool):
        super().__init__()
        self.norm_eps, self.hc_eps = norm_eps, hc_eps
        self.hc_fn, self.hc_base, self.hc_scale = parameter(num_paths, num_paths * width), parameter(num_paths), parameter(1)
        self.path_norm = nn.ParameterDict({"weight": parameter(num_paths, width)}) if path_norm else None

    def forward(self, residual: torch.Tensor) -> torch.Tensor:
        flat = residual.float()
        unit = flat * torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + self.norm_eps)
        alpha = torch.sigmoid(F.linear(unit, self.hc_fn) * self.hc_scale + self.hc_base) + self.hc_eps  # [T, M]
        paths = flat.unflatten(-1, (alpha.shape[-1], -1))
        if self.path_norm is not None:
            paths = paths * torch.rsqrt(paths.square().mean(dim=-1, keepdim=True) + self.norm_eps) * self.path_norm["weight"]
        return (alpha[..., None] * paths).sum(dim=-2).to(residual.dtype)


class Correction(nn.Module):
    """``correction``: the token before each slot corrects the slot's state."""

    def __init__(self, width: int, vocab_size: int, *, expansion: int):
        super().__init__()
        self.state_proj, self.token_proj = linear(width, expansion * width), linear(width, expansion * width)
        self.down_proj = linear(expansion * width, width)

    def step(self, state, previous, memory, lm_head: Logits, embed: Logits):
        """[B, D] states and [B] ids before them -> logits [B, V], and the memory for the next slot."""
        inner = F.silu(self.state_proj(state) + self.token_proj(embed(previous).to(state.dtype)))
        return lm_head(state + self.down_proj(inner)), memory


class Markov(nn.Module):
    """``markov``: a low-rank bias from the tokens before each slot. The confidence's layer is loaded and not asked."""

    def __init__(self, width: int, vocab_size: int, *, rank: int, kind: str, confidence: bool):
        super().__init__()
        self.markov_w1, self.markov_w2 = nn.Embedding(vocab_size, rank), nn.Embedding(vocab_size, rank)
        self.gate_proj = nn.Linear(width + rank, rank) if kind == "gated" else None
        self.joint_proj = nn.Linear(2 * rank + width, 3 * rank) if kind == "rnn" else None
        self.confidence_proj = nn.Linear(width + rank, 1) if confidence else None

    def step(self, state, previous, memory, lm_head: Logits, embed: Logits):
        """As `Correction.step`; the memory is that of ``kind=rnn``."""
        bias = embedded = self.markov_w1(previous)
        if self.gate_proj is not None:
            bias = self.gate_proj(torch.cat([state, embedded], dim=-1)).sigmoid() * embedded
        elif self.joint_proj is not None:
            memory = torch.zeros_like(embedded) if memory is None else memory
            gate, candidate, output = self.joint_proj(torch.cat([memory, embedded, state], dim=-1)).chunk(3, dim=-1)
            memory = gate.sigmoid() * memory + (1 - gate.sigmoid()) * candidate.tanh()
            bias = output.tanh()
        return lm_head(state) + F.linear(bias, self.markov_w2.weight), memory


HEADS = {"correction": Correction, "markov": Markov}


def build_head(described: dict, width: int, vocab_size: int) -> nn.Module | None:
    """Makes the head of an export's ``hyperdflash.groups.head``; None for the plain LM head."""
    settings = dict(described)
    option = settings.pop("option")
    if option == "lm_head":
        return None
    if option not in HEADS:
        raise ValueError(f"head={option} of the export is none of {', '.join(HEADS)}: update plugins/vllm")
    return HEADS[option](width, vocab_size, **settings).requires_grad_(False)


def chained_logits(
    head: nn.Module, states: torch.Tensor, anchors: torch.Tensor, lm_head: Logits, embed: Logits
) -> torch.Tensor:
    """Drafts slot by slot, each after the most likely token of the slot before: states [B, K, D], anchors [B] -> [B, K, V]."""
    previous, memory, logits = anchors, None, []
    for slot in range(states.shape[1]):
        found, memory = head.step(states[:, slot], previous, memory, lm_head, embed)
        logits.append(found)
        previous = found.argmax(dim=-1)
    return torch.stack(logits, dim=1)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32), requires_grad=False)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)
