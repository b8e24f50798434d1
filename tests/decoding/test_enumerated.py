"""Speculative sampling with sequential heads, summed over every draft: the emitted tokens have the target's distribution."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from hyperdflash.contracts import BlockLayout, Slots
from hyperdflash.decoding.acceptance import residual, sampled_accept
from hyperdflash.drafting.heads.correction import Correction
from hyperdflash.drafting.heads.domino import Domino
from hyperdflash.drafting.heads.head import DraftHead
from hyperdflash.drafting.heads.markov import KINDS, Markov
from hyperdflash.drafting.heads.selector import Selector
from hyperdflash.drafting.heads.xpress import XPress
from hyperdflash.targets.sampling import Sampler, probabilities
from tests.proposed_block import propose

V = 4
HEADS = SimpleNamespace(
    lm_head=SimpleNamespace(weight=torch.eye(V)),
    dtype=torch.float32,
    hidden_size=V,
    config=SimpleNamespace(vocab_size=V),
    embed=torch.eye(V).__getitem__,
)
CONFIGS = {kind: Markov(rank=3, kind=kind) for kind in KINDS}
CONFIGS |= {"correction": Correction(), "domino": Domino(state=3, rank=3), "selector": Selector(rank=3, top_k=3)}
CONFIGS |= {f"xpress {passes}": XPress(rank=3, passes=passes) for passes in (1, 2)}


@dataclass(frozen=True)
class Forced(Sampler):
    """Draws given tokens, one per row of logits, from the distributions that the head asks it to draw from."""

    tokens: list[int] = field(default_factory=list)

    def choose(self, logits):
        return torch.tensor([self.tokens.pop(0) for _ in logits]), self.probabilities(logits)


def block(kind: str, num_slots: int = 2) -> tuple[DraftHead, Slots]:
    draw = torch.Generator().manual_seed(0)
    head = CONFIGS[kind].build(HEADS, num_slots)
    for table in head.parameters():
        table.data.normal_(0.0, 1.5, generator=draw)
    features = torch.randn(1, 1, num_slots, V, generator=draw)
    return head, Slots(features, torch.zeros(1, 1, num_slots, dtype=torch.int64), BlockLayout.chain(num_slots + 1))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("temperature", "top_p", "ruled"), [(1.0, 1.0, False), (0.7, 0.8, False), (1.0, 1.0, True), (0.7, 0.8, True)]
)
def test_every_draft_summed_gives_the_targets_distribution(temperature, top_p, ruled, kind):
    """Three tokens of one round with up to two drafts, the target a Markov chain: exact up to fp32. A rule ends some
    drafts, or all of them where no slot depends on the one before it."""
    head, slots = block(kind)
    p = probabilities(torch.randn(V, V, generator=torch.Generator().manual_seed(5)), temperature, top_p).double()
    anchor, emitted, lengths = 1, torch.zeros(V, V, V, dtype=torch.float64), set()
    stop = 0.0
    if ruled:
        samplers = [Forced(temperature, top_p, None, [first, 0]) for first in range(V)]
        reached = [float(propose(head, slots, HEADS, torch.tensor([anchor]), s).probs.amax(-1).prod()) for s in samplers]
        stop = (min(reached) + max(reached)) / 2 + 1e-6
    for draft in itertools.product(range(V), repeat=2):
        sampler = Forced(temperature, top_p, None, list(draft))
        proposal = propose(head, slots, HEADS, torch.tensor([anchor]), sampler, stop)
        num_drafts = len(proposal.ids)
        lengths.add(num_drafts)
        assert tuple(proposal.ids.tolist()) == draft[:num_drafts]
        if any(draft[num_drafts:]):
            continue  # the same round as with token 0 in the slots that are left out
        # the text is kept up to a rejection; there the residual speaks, and then the target itself
        kept, before = 1.0, anchor
        now = emitted
        for k in range(num_drafts):
            q = proposal.probs[k].double()
            drawn = kept * q[draft[k]]
            if drawn == 0:
                break
            accepted = min(1.0, float(p[before, draft[k]] / q[draft[k]]))
            rest = residual(p[before], q)
            if not any(draft[k + 1 :]):  # once for all drafts behind a rejected one
                now += drawn * (1 - accepted) * continued(p, rest / rest.sum(), now.dim())
            kept, before, now = drawn * accepted, draft[k], now[draft[k]]
        else:
            now += kept * continued(p, p[before], now.dim())
    expected = continued(p, p[anchor], 3)
    torch.testing.assert_close(emitted, expected, rtol=1e-5, atol=1e-6)
    assert (min(lengths) < 2) == ruled


def continued(p: torch.Tensor, first: torch.Tensor, length: int) -> torch.Tensor:
    """Distribution of ``length`` tokens, the first from ``first`` [V], the others from the chain ``p`` [V, V]."""
    found = first
    for _ in range(length - 1):
        found = found[..., None] * p
    return found


def test_a_rule_that_reads_a_slots_own_draft_is_biased():
    """One draft, verified only where its own probability is high; a plain step of the target otherwise."""
    draw = torch.Generator().manual_seed(2)
    q, p = (torch.randn(V, generator=draw).double().softmax(-1) for _ in range(2))
    rest = residual(p, q)
    of_draft = torch.eye(V, dtype=torch.float64) * torch.minimum(p / q, torch.ones(V))
    of_draft += (1 - of_draft.sum(-1, keepdim=True)) * rest / rest.sum()
    torch.testing.assert_close(q @ of_draft, p)
    own = torch.where((q >= 0.2)[:, None], of_draft, p)
    assert 0 < int((q >= 0.2).sum()) < V and (q @ own - p).abs().max() > 0.01


@pytest.mark.parametrize("kind", CONFIGS)
def test_replay_accepts_with_the_probability_that_the_loop_does(kind):
    """Slot 2 after an accepted slot 1 = the text's token: E_p[min(1, q / p)] over texts is sum min(p, q), teacher-forced."""
    head, slots = block(kind)
    p = probabilities(torch.randn(V, V, generator=torch.Generator().manual_seed(5)), 1.0).double()
    for first in range(V):
        forced = Slots(slots.features, torch.tensor([1, first]).view(1, 1, 2), slots.layout)
        q = head.drafted(forced, HEADS)[0, 0, 1].dense().double().softmax(-1)
        sampler = Forced(1.0, 1.0, None, [first, 0])
        loop_q = propose(head, slots, HEADS, torch.tensor([1]), sampler).probs[1].double()
        torch.testing.assert_close(q, loop_q, rtol=1e-5, atol=1e-7)
        uniform = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1, None]
        accepted = sampled_accept(q[None], p[first][None], uniform).double().mean(dim=0)  # of each text token
        torch.testing.assert_close((p[first] * accepted).sum(), torch.minimum(p[first], q).sum(), rtol=0, atol=1e-4)
