"""Total variation and confidence by hand, and each at its neutral setting."""

from dataclasses import replace

import pytest
import torch

from hyperdflash.drafting.anchors import all_anchors, make_blocks
from hyperdflash.objectives.acceptance_rate import LKHybrid, LogAcceptance, TotalVariation
from hyperdflash.objectives.confidence import Confidence
from hyperdflash.objectives.cross_entropy import Candidates, DPace, PositionWeighted
from hyperdflash.objectives.distillation import Distillation
from hyperdflash.objectives.factored_logits import target_logits
from hyperdflash.objectives.objective import Objective
from hyperdflash.objectives.term import position_weights

PAPER = {
    "cross_entropy": PositionWeighted(gamma=4.0),
    "kl": Distillation(alpha=0.15, positions=2, temperature=1.0, teacher="mean_pool"),
}


@pytest.fixture
def batch(residual):
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 32, (2, 12), generator=draw)
    loss_mask = (torch.arange(12) >= 3).expand(2, 12)
    lengths = torch.tensor([12, 9])
    blocks = make_blocks(ids, loss_mask, lengths, *all_anchors(loss_mask, lengths), block_size=7)
    return torch.randn(*blocks.labels.shape, 32, generator=draw, requires_grad=True), blocks


def accepted(hidden, blocks, residual, heads):
    """sum over v of min(p, q) of every supervised slot: {(document, block, slot): scalar}."""
    found = {}
    for b, i, k in blocks.label_mask.nonzero().tolist():
        state = residual[b, int(blocks.anchors[b, i]) + k].float()
        p = heads.logits(heads.collapse(state[None, None])[0, 0]).softmax(-1)
        found[b, i, k] = torch.minimum(p, heads.logits(hidden[b, i, k]).softmax(-1)).sum()
    return found


@pytest.mark.parametrize("gamma", [None, 4.0])
def test_total_variation_is_the_rejection_rate(batch, residual, heads, gamma):
    hidden, blocks = batch
    objective = Objective({"tv": TotalVariation(weight=2.0, gamma=gamma)})
    loss = objective.loss(objective.sums(target_logits(hidden, heads), blocks, residual, heads))
    weights = position_weights(6, gamma)
    rates = accepted(hidden, blocks, residual, heads)
    expected = 2.0 * sum(weights[k] * (1 - a) for (_, _, k), a in rates.items()) / sum(weights[k] for _, _, k in rates)
    torch.testing.assert_close(loss, expected)
    gradients = (torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def target_and_drafter(hidden, blocks, residual, heads):
    """The target's and the drafter's distributions of every supervised slot: {(document, block, slot): (p, q)} in fp64."""
    found = {}
    for b, i, k in blocks.label_mask.nonzero().tolist():
        state = residual[b, int(blocks.anchors[b, i]) + k].float()
        p = heads.logits(heads.collapse(state[None, None])[0, 0]).double().softmax(-1)
        found[b, i, k] = p, heads.logits(hidden[b, i, k]).double().softmax(-1)
    return found


@pytest.mark.parametrize("gamma", [None, 4.0])
@pytest.mark.parametrize("term", [LogAcceptance, LKHybrid])
def test_losses_of_the_acceptance_rate_are_their_formulas(batch, residual, heads, gamma, term):
    hidden, blocks = batch
    objective = Objective({"one": term(weight=2.0, gamma=gamma)})
    loss = objective.loss(objective.sums(target_logits(hidden, heads), blocks, residual, heads))
    weights, total, expected = position_weights(6, gamma).double(), 0.0, 0.0
    for (_, _, k), (p, q) in target_and_drafter(hidden, blocks, residual, heads).items():
        rate = torch.minimum(p, q).sum()
        share = torch.exp(-3 * rate.detach())
        kl = (p * (p.log() - q.log())).sum()
        value = -rate.log() if term is LogAcceptance else share * kl + (1 - share) * (1 - rate)
        expected, total = expected + weights[k] * value, total + weights[k]
    expected = (2.0 * expected / total).float()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    gradients = (torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_dpace_weighs_a_slot_by_the_drafts_that_hang_on_it(batch, residual, heads, smoothing):
    """Block by block: weights are suffix sums of the prefix products of smoothed probabilities, and have no gradient."""
    hidden, blocks = batch
    objective = Objective({"dpace": DPace(smoothing=smoothing)})
    loss = objective.loss(objective.sums(target_logits(hidden, heads), blocks, residual, heads))
    expected = 0.0
    for b, i in blocks.label_mask[..., 0].nonzero().tolist():
        length = int(blocks.label_mask[b, i].sum())
        log_q = heads.logits(hidden[b, i, :length]).log_softmax(-1).gather(1, blocks.labels[b, i, :length, None])[:, 0]
        smooth = (1 - smoothing) * log_q.detach().exp() + smoothing
        products = [float(smooth[: j + 1].prod()) for j in range(length)]
        expected = expected - sum(sum(products[k:]) * log_q[k] for k in range(length))
    expected = expected / int(blocks.label_mask.sum())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_a_term_reads_its_view_with_the_weight_of_the_moment(batch, residual, heads):
    """Domino's two cross-entropies, of all factors and of the LM head alone, and their weights at four moments."""
    hidden, blocks = batch
    draw = torch.Generator().manual_seed(7)
    bias, table = torch.randn(*hidden.shape[:-1], 3, generator=draw), torch.randn(32, 3, generator=draw, requires_grad=True)
    terms = {"one": PositionWeighted(start=0.0), "other": PositionWeighted(view="lm_head", weight=0.0, start=1.0)}
    objective = Objective(terms)
    assert [term.metric for term in objective.active] == ["cross_entropy", "lm_head_cross_entropy"]
    sums = objective.sums(target_logits(hidden, heads).plus(bias, table), blocks, residual, heads)
    mask, labels = blocks.label_mask, blocks.labels[blocks.label_mask]
    base = heads.logits(hidden)
    own, of_base = (torch.nn.functional.cross_entropy(z[mask], labels) for z in (base + bias @ table.T, base))
    torch.testing.assert_close(sums.slot_ce_sum.sum() / len(labels), own.detach())
    for progress, share in ((0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (1.0, 0.0)):
        loss, expected = objective.loss(sums, progress=progress), (1 - share) * own + share * of_base
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(x, [hidden, table], retain_graph=True) for x in (loss, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="have no view lm_head"):
        objective.check(6, views=("head",))


def test_a_free_term_is_the_mean_over_its_passes(batch, residual, heads):
    hidden, blocks = batch
    passes = [target_logits(hidden * scale, heads) for scale in (0.5, 1.0, 2.0)]
    of_passes = []
    for logits in passes:
        alone = Objective({"tv": TotalVariation(gamma=4.0)})
        of_passes.append(alone.loss(alone.sums(logits, blocks, residual, heads)))
    free = Objective({"one": PositionWeighted(), "tv": TotalVariation(gamma=4.0, view="free", weight=0.3)})
    sums = free.sums(replace(target_logits(hidden, heads), free=tuple(passes)), blocks, residual, heads)
    plain = Objective({"one": PositionWeighted()})
    expected = plain.loss(plain.sums(target_logits(hidden, heads), blocks, residual, heads)) + 0.1 * sum(of_passes)
    torch.testing.assert_close(free.loss(sums), expected)
    gradients = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in (free.loss(sums), expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("missing", ["last", "drop"])
def test_candidates_are_the_lm_head_s_best_tokens(batch, residual, heads, missing):
    """Row by row: a label that is no candidate replaces the last one, or its row adds nothing; the divisor counts every row."""
    hidden, blocks = batch
    draw = torch.Generator().manual_seed(7)
    bias, table = torch.randn(*hidden.shape[:-1], 3, generator=draw), torch.randn(32, 3, generator=draw, requires_grad=True)
    logits = replace(target_logits(hidden, heads).plus(bias, table), top_k=6)
    objective = Objective({"one": Candidates(gamma=4.0, missing=missing)})
    sums = objective.sums(logits, blocks, residual, heads)
    loss, weights, expected, total, recalled = objective.loss(sums), position_weights(6, 4.0), 0.0, 0.0, []
    for b, i, k in blocks.label_mask.nonzero().tolist():
        unary, label = heads.logits(hidden[b, i, k]), int(blocks.labels[b, i, k])
        ids = unary.topk(6).indices.tolist()
        recalled.append(label in ids)
        ids = ids if label in ids else [*ids[:-1], label]
        if recalled[-1] or missing == "last":
            scores = (unary + table @ bias[b, i, k])[ids]
            expected = expected - weights[k] * scores.log_softmax(-1)[ids.index(label)]
        total += weights[k]
    assert 0 < sum(recalled) < len(recalled)
    torch.testing.assert_close(loss, expected / total)
    gradients = [torch.autograd.grad(x, [hidden, table], retain_graph=True) for x in (loss, expected / total)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="have no view candidates"):
        objective.check(6)


def test_losses_of_a_perfect_drafter_are_zero(batch, residual, heads):
    """Where the drafter is the target, alpha is 1: tv, nla and lk_hybrid vanish."""
    _, blocks = batch
    before = (blocks.anchors[..., None] + torch.arange(6)).clamp(max=residual.shape[1] - 1)
    states = heads.collapse(residual.float())
    hidden = states[torch.arange(2)[:, None, None], before]
    for term in (TotalVariation(), LogAcceptance(), LKHybrid()):
        objective = Objective({"one": term})
        loss = objective.loss(objective.sums(target_logits(hidden, heads), blocks, residual, heads))
        assert abs(float(loss)) < 1e-5, term.name


def test_confidence_is_trained_towards_acceptance_and_moves_nothing_else(batch, residual, heads):
    hidden, blocks = batch
    confidence = torch.randn(blocks.labels.shape, generator=torch.Generator().manual_seed(4), requires_grad=True)
    logits = replace(target_logits(hidden, heads), confidence=confidence)
    objective = Objective({"confidence": Confidence(gamma=None)})
    loss = objective.loss(objective.sums(logits, blocks, residual, heads))
    rates = accepted(hidden.detach(), blocks, residual, heads)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = sum(bce(confidence[place], rate) for place, rate in rates.items()) / len(rates)
    torch.testing.assert_close(loss, expected)
    own, of_states = torch.autograd.grad(loss, [confidence, hidden], allow_unused=True)
    torch.testing.assert_close(own, torch.autograd.grad(expected, confidence)[0])
    assert of_states is None


def test_a_weight_of_zero_is_the_objective_without_the_term(batch, residual, heads):
    hidden, blocks = batch
    found = []
    for terms in (PAPER, PAPER | {"tv": TotalVariation(weight=0.0), "confidence": None}):
        objective = Objective(terms)
        loss = objective.loss(objective.sums(target_logits(hidden, heads), blocks, residual, heads))
        found.append((loss, torch.autograd.grad(loss, hidden)[0]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_terms_with_teachers_of_other_slots_share_one_sweep(batch, residual, heads):
    """KL of the first two slots by one teacher and of five by another, TV of all: the same sums as one by one."""
    hidden, blocks = batch
    more = {"other": replace(PAPER["kl"], positions=5, temperature=2.0, teacher="hc_head"), "tv": TotalVariation(weight=0.7)}
    logits = target_logits(hidden, heads)
    together = Objective(PAPER | more)
    joint = together.sums(logits, blocks, residual, heads)
    for place, term in enumerate(together.active):
        alone = Objective({"one": term}).sums(logits, blocks, residual, heads)
        torch.testing.assert_close(joint.term_sums[place], alone.term_sums[0])
        assert torch.equal(joint.term_counts[place], alone.term_counts[0])
    counts = together.counts(blocks)
    assert all(torch.equal(a, b) for a, b in zip(counts.term_counts, joint.term_counts, strict=True))


@pytest.mark.parametrize(
    ("terms", "has_confidence", "sentence"),
    [
        ({"confidence": Confidence()}, False, "needs a draft head that has a confidence"),
        (PAPER, True, "no term of the objective trains it: run with objective=dspark"),
    ],
)
def test_a_confidence_and_its_term_need_each_other(terms, has_confidence, sentence):
    with pytest.raises(ValueError, match=sentence):
        Objective(terms).check(6, has_confidence)
    with pytest.raises(ValueError, match="needs a term with a weight above 0"):
        Objective({"tv": TotalVariation(weight=0.0)})
