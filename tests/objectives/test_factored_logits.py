"""Several tables in one sweep, and every divergence: values and gradients against the formulas in fp64."""

import pytest
import torch

from hyperdflash.objectives import sweep as sweep_module
from hyperdflash.objectives.factored_logits import FactoredLogits, target_logits
from hyperdflash.objectives.row_values import Against, reference_values
from hyperdflash.objectives.sweep import sweep
from tests.made_tensors import MadeTensors

V, D, R = 700, 6, 3  # of vocabulary, states and the low-rank table
BOTH = Against(kl=True, overlap=True)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Seven states per pass and 256 tokens per slice, so that small shapes have several of both."""
    monkeypatch.setitem(sweep_module.ROWS, "cpu", 7)
    monkeypatch.setitem(sweep_module.SLICE_BYTES, "cpu", 1)


def drawn(seed: int, rows: int = 20, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    features, tables = normal(rows, D + R).requires_grad_(), [normal(V, D), normal(V, R).requires_grad_()]
    teachers = [torch.cat([normal(n, D), torch.zeros(n, R, dtype=dtype)], dim=1) for n in (11, rows)]
    against = [Against(teachers[0], 2.5, kl=True, overlap=True), Against(teachers[1], 1.0, kl=True, overlap=True)]
    return features, torch.randint(0, V, (rows,), generator=draw), tables, against


def with_gradients(values, features, labels, tables, against):
    """Every value, and the gradients of a mixture of all values for features and the low-rank table."""
    found = values(features, labels, tables, against)
    parts = [found.cross_entropy] + [x for a in found.against for x in (a.kl, a.overlap)]
    mixture = sum((torch.linspace(0.5, 2.0, len(x), dtype=x.dtype) * (i + 1) * x).sum() for i, x in enumerate(parts))
    return parts, torch.autograd.grad(mixture, [features, tables[1]]), found.top1


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_the_formulas_in_fp64(seed):
    arguments = drawn(seed)
    got, wanted = with_gradients(sweep, *arguments), with_gradients(reference_values, *arguments)
    assert torch.equal(got[2], wanted[2])
    for one, other in zip([*got[0], *got[1]], [*wanted[0], *wanted[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_fp32_is_close_to_fp64_and_bf16_gives_gradients_in_the_tables_dtype():
    exact = with_gradients(reference_values, *drawn(3))
    single = with_gradients(sweep, *drawn(3, dtype=torch.float32))
    for one, other in zip([*single[0], *single[1]], [*exact[0], *exact[1]], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)
    features, labels, tables, against = drawn(3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = sweep(features, labels, tables, against)
    values.cross_entropy.sum().backward()
    assert tables[1].grad.dtype == torch.float32 and features.grad.dtype == torch.float32 and tables[1].grad.any()


def test_no_rows_have_no_loss_and_a_gradient_of_zero():
    features, labels, tables, _ = drawn(4)
    found = sweep(features[:0], labels[:0], tables, [Against(torch.zeros(0, D + R), kl=True, overlap=True)])
    (found.cross_entropy.sum() + found.against[0].overlap.sum()).backward()
    assert not features.grad.any() and not tables[1].grad.any()


def test_logits_exist_only_for_a_slice_of_rows_and_vocabulary():
    features, labels, tables, against = drawn(5, rows=64)
    with MadeTensors() as made:
        found = sweep(features, labels, tables, against)
        (found.cross_entropy.sum() + found.against[1].overlap.sum()).backward()
    assert made.numel <= V * (D + R) < 64 * V  # the gradient of a table is the largest


def test_a_table_of_zeros_changes_nothing(heads):
    draw = torch.Generator().manual_seed(0)
    states, embedded = torch.randn(9, 32, generator=draw), torch.randn(9, R, generator=draw)
    labels = torch.randint(0, 32, (9,), generator=draw)
    plain = target_logits(states, heads)
    more = plain.plus(embedded, torch.zeros(32, R))
    teacher = target_logits(torch.randn(9, 32, generator=draw), heads)
    assert torch.equal(plain.dense(), more.dense())
    found, wanted = (logits.values(labels, [(teacher, BOTH)]) for logits in (more, plain))
    torch.testing.assert_close(found.cross_entropy, wanted.cross_entropy)
    torch.testing.assert_close(found.against[0].kl, wanted.against[0].kl)
    torch.testing.assert_close(found.against[0].overlap, wanted.against[0].overlap)
    assert torch.equal(more.argmax(), plain.argmax())


def test_every_answer_equals_that_of_whole_logits():
    draw = torch.Generator().manual_seed(1)
    tables = (torch.randn(V, D, generator=draw), torch.randn(V, R, generator=draw))
    features = tuple(torch.randn(2, 5, n, generator=draw) for n in (D, R))
    logits = FactoredLogits(features, tables, torch.float32)
    whole = torch.cat(features, dim=-1) @ torch.cat(tables, dim=1).T
    torch.testing.assert_close(logits.dense(), whole)
    torch.testing.assert_close(logits[1, 2].dense(), whole[1, 2])
    rows, flat = logits.take(torch.tensor([8, 0])), whole.view(10, V)[[8, 0]]
    labels = torch.tensor([5, int(flat[1].argmax())])
    assert rows.argmax().tolist() == flat.argmax(dim=-1).tolist() and rows.is_argmax(labels).tolist() == [False, True]
    p = (flat / 0.7).softmax(dim=-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(rows.token_probabilities(labels, 0.7, logits_bytes=1), p)
    teacher = FactoredLogits((torch.randn(2, D, generator=draw),), tables[:1], torch.float32)
    q, t = flat.softmax(dim=-1), teacher.dense().softmax(dim=-1)
    found = rows.values(labels, [(teacher, BOTH)]).against[0]
    torch.testing.assert_close(found.overlap, torch.minimum(q, t).sum(dim=-1))
    torch.testing.assert_close(found.kl, (t * (t / q).log()).sum(dim=-1))
