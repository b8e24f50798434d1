"""Doubles for the loop: a target that writes a given text, a target that is a Markov chain, scripted drafters."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from hyperdflash.contracts import Proposal, TargetStates
from hyperdflash.states.codecs import CODECS
from hyperdflash.targets.sampling import Sampler, draw, probabilities
from hyperdflash.targets.session import TargetStep

CPU = SimpleNamespace(device=torch.device("cpu"))
VOCAB = 50


class _Session:
    """Records its tokens; state i rounds to the number i, so that a drafter can tell which states it gets."""

    model, layer_ids = CPU, ()

    def __init__(self):
        self.token_ids: list[int] = []
        self.calls: list[tuple] = []

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def prefill(self, input_ids: Tensor) -> TargetStep:
        step = self._step(input_ids)
        return TargetStep(step.logits[:, -1:], step.residual, None)

    def extend(self, input_ids: Tensor) -> TargetStep:
        self.calls.append(("extend", input_ids.shape[1]))
        self._extended = input_ids.shape[1]
        return self._step(input_ids)

    def rollback(self, keep: int) -> None:
        self.calls.append(("rollback", keep))
        self.token_ids = self.token_ids[: self.length - self._extended + keep]

    def _step(self, input_ids: Tensor) -> TargetStep:
        first = self.length
        self.token_ids += input_ids[0].tolist()
        residual = torch.arange(first, self.length).view(1, -1, 1, 1).expand(-1, -1, 4, 2) * 1.0001
        return TargetStep(self.logits(first, input_ids), residual, None)


class TextSession(_Session):
    """Its greedy text is ``text``, whatever precedes a position."""

    def __init__(self, text: list[int]):
        super().__init__()
        self.text = text

    def logits(self, first: int, input_ids: Tensor) -> Tensor:
        said = [self.text[i + 1] if i + 1 < len(self.text) else 0 for i in range(first, first + input_ids.shape[1])]
        return torch.nn.functional.one_hot(torch.tensor([said]), VOCAB).float()


class MarkovSession(_Session):
    """``table`` [V, V]: the logits after each token."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = table

    def logits(self, first: int, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


class ScriptedDrafter:
    """Drafts ``text`` where ``right[a][k - 1]``, another token elsewhere; records its inputs."""

    layer_ids, codec = (), CODECS["bf16"]

    def __init__(self, text: list[int], right: list[list[bool]]):
        self.text, self.right, self.num_slots = text, right, len(right[0])
        self.seen: list[int] = []  # token ids whose states came
        self.residuals: list[Tensor] = []
        self.anchors: list[int] = []

    def begin(self, states: TargetStates) -> None:
        self.seen, self.residuals, self.anchors = [], [], []
        self.update(states)

    def update(self, states: TargetStates) -> None:
        self.seen += states.input_ids[0].tolist()
        self.residuals.append(states.residual[0, :, 0, 0])

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Proposal:
        anchor = len(self.seen)
        assert int(anchor_id) == self.text[anchor]
        self.anchors.append(anchor)
        truth = [self.text[anchor + k] if anchor + k < len(self.text) else 0 for k in range(1, num_slots + 1)]
        drafted = [t if ok else (t + 1) % VOCAB for t, ok in zip(truth, self.right[anchor], strict=False)]
        return Proposal(torch.tensor(drafted, dtype=torch.int64))


class MarkovDrafter:
    """Slot k is drawn from ``tables[k - 1]`` [V, V] at the anchor's token, as a block drafter does."""

    layer_ids, codec = (), CODECS["bf16"]

    def __init__(self, tables: Tensor):
        self.tables, self.num_slots = tables, len(tables)

    def begin(self, states: TargetStates) -> None: ...

    def update(self, states: TargetStates) -> None: ...

    def propose(self, anchor_id: Tensor, num_slots: int, sampler: Sampler) -> Proposal:
        return Proposal(*sampler.choose(self.tables[:num_slots, int(anchor_id)]))


def markov_joint(table: Tensor, prompt_id: int, temperature: float, top_p: float) -> Tensor:
    """Exact probabilities of the first three tokens after ``prompt_id``: [V, V, V]."""
    p = probabilities(table.double(), temperature, top_p).double()
    return p[prompt_id][:, None, None] * p[:, :, None] * p[None]


def joint_p_value(tokens: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square of draws [N, 3] against probabilities [V, V, V]; 0 if an impossible triple occurs."""
    vocab = len(expected)
    counts = torch.bincount((tokens[:, 0] * vocab + tokens[:, 1]) * vocab + tokens[:, 2], minlength=vocab**3).double()
    expected = expected.flatten() * len(tokens)
    possible = expected > 1e-9
    if counts[~possible].sum() > 0:
        return 0.0
    statistic = ((counts - expected)[possible].square() / expected[possible]).sum()
    degrees = possible.sum().double() - 1
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def batched_loop(table: Tensor, tables: Tensor, prompt_id: int, num: int, rule, temperature, top_p, generator) -> Tensor:
    """First three tokens of ``num`` texts [N, 3] by prefill and two rounds of two drafts; ``rule`` is verify_sampled's form."""
    p, q = probabilities(table, temperature, top_p), probabilities(tables, temperature, top_p)
    text = torch.zeros(num, 7, dtype=torch.int64)
    text[:, 0] = draw(p[prompt_id].expand(num, -1), generator)
    length, newest = torch.ones(num, dtype=torch.int64), text[:, 0]
    for _ in range(2):
        q_rows = q[:, newest].transpose(0, 1)  # [N, 2, V]
        drafted = draw(q_rows, generator)
        p_rows = p[torch.cat([newest[:, None], drafted], dim=1)]  # [N, 3, V]
        accepted, newest = rule(drafted, q_rows, p_rows, generator)
        emitted = torch.cat([drafted, drafted[:, :1]], dim=1).scatter(1, accepted[:, None], newest[:, None])
        # what stands after the next token is overwritten by the following round, which starts there
        text.scatter_(1, length[:, None] + torch.arange(3), emitted)
        length += accepted + 1
    return text[:, :3]
