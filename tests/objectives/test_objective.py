from dataclasses import fields, replace

import pytest
import torch

from hyperdflash.contracts import Blocks
from hyperdflash.drafting.anchors import all_anchors, make_blocks
from hyperdflash.objectives import objective
from hyperdflash.objectives.cross_entropy import PositionWeighted
from hyperdflash.objectives.distillation import Distillation
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.objectives.objective import Objective
from hyperdflash.objectives.term import position_weights

KL = Distillation(alpha=0.15, positions=2, temperature=1.0, teacher="mean_pool")
OFF = replace(KL, alpha=0.0)
WEIGHTS = position_weights(6, 4.0)


def paper(kl: Distillation = KL) -> Objective:
    return Objective({"cross_entropy": PositionWeighted(gamma=4.0), "kl": kl})


def sums_of(hidden, blocks, residual, heads, kl=KL):
    return paper(kl).sums(target_logits(hidden, heads), blocks, residual, heads)


def tensors(sums) -> list[torch.Tensor]:
    return [*sums.term_sums, *sums.term_counts, sums.slot_count, sums.slot_ce_sum, sums.top1]


@pytest.fixture
def batch():
    """(hidden [2, A, 6, 32], Blocks): documents of 12 and 9 tokens, the first with a prompt token in its answer."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 32, (2, 12), generator=draw)
    loss_mask = torch.ones(2, 12, dtype=torch.bool)
    loss_mask[:, :3] = False
    loss_mask[0, 7] = False
    lengths = torch.tensor([12, 9])
    blocks = make_blocks(ids, loss_mask, lengths, *all_anchors(loss_mask, lengths), block_size=7)
    hidden = torch.randn(*blocks.labels.shape, 32, generator=draw, requires_grad=True)
    return hidden, blocks


def naive(hidden, blocks: Blocks, residual, heads, weights, kl):
    """Eq. 3 with Eq. 2, one slot at a time in float64."""
    weighted, weight_sum, divergences = 0.0, 0.0, [[] for _ in range(kl.positions)]
    for b, i, k in blocks.label_mask.nonzero().tolist():
        logits = heads.logits(hidden[b, i, k]).double()
        weighted = weighted - weights[k].double() * logits.log_softmax(-1)[blocks.labels[b, i, k]]
        weight_sum += float(weights[k])
        if kl.alpha > 0 and k < kl.positions:
            slot = k + 1
            state = residual[b, int(blocks.anchors[b, i]) + slot - 1].float()
            collapsed = state.mean(0) if kl.teacher == "mean_pool" else heads.hc_head(state[None, None])[0, 0]
            p = (heads.logits(heads.norm(collapsed)).double() / kl.temperature).softmax(-1)
            q = (logits / kl.temperature).softmax(-1)
            divergences[k].append((p * (p / q).log()).sum())
    loss = weighted / weight_sum
    if kl.alpha > 0:
        means = sum(sum(d) / len(d) for d in divergences if d)
        loss = loss + kl.alpha * kl.temperature**2 / kl.positions * means
    return loss


@pytest.mark.parametrize("teacher", ["mean_pool", "hc_head"])
@pytest.mark.parametrize(("alpha", "positions", "temperature"), [(0.15, 2, 1.0), (1.0, 6, 2.5), (0.5, 1, 0.7), (0, 2, 1.0)])
def test_against_a_naive_reference(batch, residual, heads, teacher, alpha, positions, temperature):
    hidden, blocks = batch
    kl = Distillation(alpha=alpha, positions=positions, temperature=temperature, teacher=teacher)
    terms = sums_of(hidden, blocks, residual, heads, kl)
    loss = paper(kl).loss(terms)
    expected = naive(hidden, blocks, residual, heads, WEIGHTS, kl)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    gradient, expected_gradient = (torch.autograd.grad(x, hidden)[0] for x in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
    assert not gradient[~blocks.label_mask].any()


def test_counts_by_hand(batch, residual, heads):
    _, blocks = batch
    # Document 0: supervised 3-6 and 8-11, anchors 3 4 5 8 9 10; document 1: supervised 3-8, anchors 3..7.
    assert blocks.anchors.tolist() == [[3, 4, 5, 8, 9, 10], [3, 4, 5, 6, 7, 0]]
    perfect = torch.nn.functional.one_hot(blocks.labels, 32).float() * 9
    terms = sums_of(perfect, blocks, residual, heads, KL)
    # Slots before the answer's end, an anchor: 3 2 1 3 2 1 and 5 4 3 2 1.
    assert terms.slot_count.tolist() == [11, 8, 5, 2, 1, 0]
    assert terms.top1.tolist() == terms.slot_count.tolist()
    ce_weight, kl_count = terms.term_counts
    assert kl_count.tolist() == [11, 8]
    expected = WEIGHTS * torch.tensor([11, 8, 5, 2, 1, 0])
    torch.testing.assert_close(ce_weight, expected)
    wrong = torch.nn.functional.one_hot((blocks.labels + 1) % 32, 32).float() * 9
    assert not sums_of(wrong, blocks, residual, heads, KL).top1.any()


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_slot_k_is_taught_by_the_state_before_it(batch, heads, shift):
    """State t predicts token t alone: the KL vanishes only where slot k predicts a + k - 1."""
    _, blocks = batch
    residual = torch.eye(32)[None, :12, None].expand(2, 12, 4, 32)
    says = blocks.anchors[..., None] + torch.arange(6) + shift  # slot index k - 1: a + k - 1 + shift
    hidden = torch.eye(32)[says.clamp(0, 31)] * 32**0.5  # what the norm makes of a unit vector
    kl = replace(KL, positions=5)  # no answer here is long enough for a sixth slot
    terms = sums_of(hidden, blocks, residual, heads, kl)
    each = terms.term_sums[1] / terms.term_counts[1]
    assert (each < 1e-4).all() if shift == 0 else (each > 1.0).all()


def test_micro_batches_add_up_to_the_batch(batch, residual, heads):
    hidden, blocks = batch
    whole = sums_of(hidden, blocks, residual, heads, KL)
    parts = None
    for row in (slice(0, 1), slice(1, 2)):
        part = Blocks(**{f.name: getattr(blocks, f.name)[row] for f in fields(blocks)})
        terms = sums_of(hidden[row], part, residual[row], heads, KL)
        parts = terms if parts is None else parts + terms
    for one, other in zip(tensors(parts), tensors(whole), strict=True):
        torch.testing.assert_close(one, other)
    losses = [paper().loss(terms) for terms in (whole, parts)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))


def test_an_empty_batch_is_zero_with_a_gradient(batch, residual, heads):
    hidden, blocks = batch
    empty = replace(blocks, label_mask=torch.zeros_like(blocks.label_mask))
    for kl in (KL, OFF, replace(KL, teacher="hc_head")):
        terms = sums_of(hidden, empty, residual, heads, kl)
        loss = paper(kl).loss(terms)
        assert loss.item() == 0.0 and not terms.slot_count.any() and not terms.term_counts[0].any()
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert not gradient.any()


@pytest.fixture
def row_counts(monkeypatch):
    """(rows, rows with a teacher) that reach the vocabulary per call, padding included."""
    counts, real = [], FactoredLogits.values

    def values(self, labels, against=()):
        counts.append((len(labels), sum(len(logits.features[0]) for logits, _ in against)))
        return real(self, labels, against)

    monkeypatch.setattr(FactoredLogits, "values", values)
    return counts


def test_only_supervised_rows_reach_the_vocabulary(batch, residual, heads, row_counts, monkeypatch):
    hidden, blocks = batch
    monkeypatch.setattr(objective, "SHAPE_MULTIPLE", 1)
    sums_of(hidden, blocks, residual, heads, KL)
    sums_of(hidden, blocks, residual, heads, OFF)
    assert row_counts == [(27, 19), (27, 0)]  # 11 + 8 + 5 + 2 + 1 of 72; 11 + 8 for the teacher


def test_padded_and_masked_rows_do_not_count(batch, residual, heads, row_counts, monkeypatch):
    """The host rounds row counts up to 32; an accelerator computes every slot and masks unsupervised ones."""
    hidden, blocks = batch
    exact, padded, everything = [], [], []
    real = objective._rows
    for found, round_to, supervised_only in ((exact, 1, True), (padded, 32, True), (everything, 1, False)):
        monkeypatch.setattr(objective, "SHAPE_MULTIPLE", round_to)
        monkeypatch.setattr(
            objective, "_rows", lambda m, n, supervised_only, only=supervised_only: real(m, n, supervised_only=only)
        )
        terms = sums_of(hidden, blocks, residual, heads, KL)
        loss = paper().loss(terms)
        found += [*tensors(terms), torch.autograd.grad(loss, hidden)[0]]
    assert row_counts == [(27, 19), (64, 32), (72, 24)]
    for one, two, three in zip(exact, padded, everything, strict=True):
        torch.testing.assert_close(two, one)
        torch.testing.assert_close(three, one)


@pytest.mark.parametrize("kl", [KL, OFF, replace(KL, positions=6)], ids=["paper", "off", "all slots"])
def test_counts_are_known_before_any_forward_pass(batch, residual, heads, kl):
    hidden, blocks = batch
    counts = paper(kl).counts(blocks)
    terms = sums_of(hidden, blocks, residual, heads, kl)
    assert torch.equal(counts.slot_count, terms.slot_count) and len(counts.term_counts) == len(terms.term_counts)
    for known, own in zip(counts.term_counts, terms.term_counts, strict=True):
        assert torch.equal(known, own)


def test_micro_batches_divided_by_the_counts_of_the_step_give_its_gradient(batch, residual, heads):
    hidden, blocks = batch
    whole = sums_of(hidden, blocks, residual, heads, KL)
    (expected,) = torch.autograd.grad(paper().loss(whole), hidden)
    rows = slice(0, 1), slice(1, 2)
    parts = [Blocks(**{f.name: getattr(blocks, f.name)[row] for f in fields(blocks)}) for row in rows]
    one, two = (paper().counts(part) for part in parts)
    for row, part in zip(rows, parts, strict=True):  # the graph of one is gone before the next one's forward pass
        terms = sums_of(hidden[row], part, residual[row], heads, KL)
        paper().loss(terms, one + two).backward()
    torch.testing.assert_close(hidden.grad, expected)


def test_too_many_kl_positions_are_refused():
    with pytest.raises(ValueError, match=r"kl\.positions must be in 0\.\.6"):
        paper(replace(KL, positions=7)).check(6)
