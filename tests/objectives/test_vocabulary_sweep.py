import itertools
import math

import pytest
import torch

from hyperdflash.objectives import sweep as sweep_module
from hyperdflash.objectives.row_values import Against, reference_values
from hyperdflash.objectives.sweep import _groups, is_largest, sweep
from tests.made_tensors import MadeTensors


def row_losses(hidden, labels, teacher, lm_head, temperature=1.0, values=sweep):
    """CE [R], KL [E] and top-1 [R] with one table and one teacher."""
    found = values(hidden, labels, [lm_head.detach()], [Against(teacher, temperature, kl=True)])
    return found.cross_entropy, found.against[0].kl, found.top1


def reference_row_losses(*arguments):
    return row_losses(*arguments, values=reference_values)


def is_argmax(hidden, labels, lm_head):
    return is_largest(hidden, labels, [lm_head])


BOTH = pytest.mark.parametrize("losses", [reference_row_losses, row_losses])


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Seven rows per pass and 256 tokens per slice, so that small shapes have several of both."""
    monkeypatch.setitem(sweep_module.ROWS, "cpu", 7)
    monkeypatch.setitem(sweep_module.SLICE_BYTES, "cpu", 1)


def drawn(seed: int, rows: int, taught: int, width: int, vocab: int, dtype: torch.dtype, scale: float = 1.0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=draw)).to(dtype)

    labels = torch.randint(0, vocab, (rows,), generator=draw)
    return normal(rows, width).requires_grad_(), labels, normal(taught, width), (normal(vocab, width) / scale).to(dtype)


def with_gradient(losses, hidden, labels, teacher, lm_head, temperature):
    """(CE, KL, top-1, gradient of a mixture of all rows)."""
    ce, kl, hits = losses(hidden, labels, teacher, lm_head, temperature)
    weights = torch.linspace(0.5, 2.0, len(ce)), torch.linspace(3.0, 1.0, len(kl))
    (gradient,) = torch.autograd.grad((weights[0] * ce).sum() + (weights[1] * kl).sum(), hidden)
    return ce, kl, hits, gradient


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-12))


SHAPES = [(1, 0, 4, 3), (1, 1, 3, 257), (7, 7, 8, 256), (9, 8, 5, 700), (30, 11, 6, 1000), (23, 0, 16, 511), (14, 14, 2, 2000)]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_the_formula(shape, temperature):
    for seed, scale in enumerate((0.1, 1.0, 8.0)):
        arguments = drawn(seed, *shape, torch.float32, scale)
        got, wanted = (with_gradient(f, *arguments, temperature) for f in (row_losses, reference_row_losses))
        assert torch.equal(got[2], wanted[2])
        assert relative_error(got[0], wanted[0]) < 1e-5 and relative_error(got[3], wanted[3]) < 1e-5
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=2e-6)  # near 0 a difference of rounded logits


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_bf16_products_and_fp32_sums(temperature):
    arguments = drawn(5, 30, 11, 16, 1000, torch.bfloat16)
    got, wanted = (with_gradient(f, *arguments, temperature) for f in (row_losses, reference_row_losses))
    assert got[0].dtype == got[1].dtype == torch.float32 and got[3].dtype == torch.bfloat16
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-5)  # the same bf16 logits, summed in fp32
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[2], wanted[2])
    assert relative_error(got[3], wanted[3]) < 0.01


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_an_lm_head_in_bf16_is_widened_exactly(temperature):
    hidden, labels, teacher, lm_head = drawn(7, 30, 11, 16, 1000, torch.float32)
    narrow = lm_head.bfloat16()
    got, wanted = (with_gradient(row_losses, hidden, labels, teacher, x, temperature) for x in (narrow, narrow.float()))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)) and got[3].dtype == torch.float32
    assert torch.equal(is_argmax(hidden, labels, narrow), is_argmax(hidden, labels, narrow.float()))
    reference = with_gradient(reference_row_losses, hidden, labels, teacher, narrow, temperature)
    assert relative_error(got[0], reference[0]) < 1e-5 and relative_error(got[3], reference[3]) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_fp64_is_not_rounded(temperature):
    arguments = drawn(8, 30, 11, 16, 1000, torch.float64)
    got, wanted = (with_gradient(f, *arguments, temperature) for f in (row_losses, reference_row_losses))
    assert got[0].dtype == got[1].dtype == got[3].dtype == torch.float64 and torch.equal(got[2], wanted[2])
    for number in (0, 1, 3):
        torch.testing.assert_close(got[number], wanted[number], rtol=1e-11, atol=1e-11)


def test_a_table_in_bf16_is_widened_once_for_all_rows():
    hidden, labels, teacher, lm_head = drawn(7, 30, 11, 16, 1000, torch.float32)
    with MadeTensors() as made:
        row_losses(hidden, labels, teacher, lm_head.bfloat16())
    assert made.widened == 16 * (1000 + 30)  # the table, and each label's own row
    with MadeTensors() as made:
        is_argmax(hidden, labels, lm_head.bfloat16())
    assert made.widened == 16 * 1000


def test_groups_hold_every_row_once_within_their_limit_of_states():
    for num_rows, num_taught, size, temperature in itertools.product((0, 1, 6, 40), (0, 1, 6, 40), (2, 7, 16), (1.0, 2.0)):
        for more in (0, num_taught // 2):
            teachers = [Against(torch.zeros(min(num_rows, n), 1), temperature, kl=True) for n in (num_taught, more)]
            groups = list(_groups(num_rows, teachers, size))
            rows = torch.arange(num_rows)
            assert torch.equal(torch.cat([rows[own] for own in groups]), rows)
            states = [len(rows[own]) + sum(a.copies * len(a.teacher[own]) for a in teachers) for own in groups]
            assert groups and all(n <= max(size, 1 + sum(a.copies for a in teachers)) for n in states)


def test_autocast_decides_the_products_dtype():
    arguments = drawn(6, 9, 4, 16, 600, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = with_gradient(row_losses, *arguments, 1.0)
    half = [x.detach().bfloat16() if x.is_floating_point() else x for x in arguments]
    expected = with_gradient(row_losses, half[0].requires_grad_(), *half[1:], 1.0)
    assert torch.equal(mixed[0], expected[0]) and torch.equal(mixed[1], expected[1])
    assert mixed[3].dtype == torch.float32
    torch.testing.assert_close(mixed[3], expected[3].float())


@BOTH
def test_one_worked_value(losses):
    # Rows: p = 3/4 on the label (a hit), p = 1/4 (a miss); the LM head copies the hidden state into the logits.
    hidden = torch.tensor([[math.log(3.0), 0.0]]).repeat(2, 1)
    ce, kl, hits = losses(hidden, torch.tensor([0, 1]), hidden[:0], torch.eye(2))
    torch.testing.assert_close(ce, torch.tensor([0.2876821, 1.3862944]))
    assert kl.shape == (0,) and hits.tolist() == [True, False]


@BOTH
def test_kl_is_of_the_teacher_from_the_student_at_the_temperature(losses):
    """T = 2: p = (3/4, 1/4) and q = (1/2, 1/2) after tempering, KL = 0.75 ln 1.5 + 0.25 ln 0.5 = 0.130812."""
    teacher, student = torch.tensor([[2 * math.log(3.0), 0.0], [0.0, -80.0]]), torch.zeros(2, 2)
    _, kl, _ = losses(student, torch.tensor([0, 0]), teacher, torch.eye(2), 2.0)
    torch.testing.assert_close(kl, torch.tensor([0.130812, math.log(2.0)]), atol=2e-6, rtol=0)


def test_losses_of_far_logits_are_finite():
    hidden = torch.tensor([[3e4, 0.0], [-3e4, 0.0]], requires_grad=True)
    lm_head = torch.zeros(600, 2)
    lm_head[5, 0] = 1.0  # token 5 takes all of row 0 and nothing of row 1
    ce, kl, hits, gradient = with_gradient(row_losses, hidden, torch.tensor([5, 5]), -hidden.detach(), lm_head, 1.0)
    torch.testing.assert_close(ce, torch.tensor([0.0, 3e4 + math.log(599)]))
    torch.testing.assert_close(kl, torch.tensor([3e4 - math.log(599), 3e4 + math.log(599)]))
    assert hits.tolist() == [True, False] and gradient.isfinite().all()


def test_a_tie_counts_as_top1():
    _, _, hits = row_losses(torch.ones(2, 1), torch.tensor([1, 2]), torch.ones(0, 1), torch.tensor([[1.0], [1.0], [0.0]]))
    assert hits.tolist() == [True, False]


def test_only_the_student_learns():
    hidden, labels, teacher, lm_head = drawn(0, 9, 4, 5, 300, torch.float32)
    for tensor in (teacher, lm_head):
        tensor.requires_grad_()
    ce, kl, _ = row_losses(hidden, labels, teacher, lm_head)
    (ce.sum() + kl.sum()).backward()
    assert hidden.grad.any() and teacher.grad is None and lm_head.grad is None


def test_logits_exist_only_for_a_slice_of_rows_and_vocabulary():
    hidden, labels, teacher, lm_head = drawn(1, 64, 32, 1, 1500, torch.float32)
    with MadeTensors() as made:
        ce, kl, _ = row_losses(hidden, labels, teacher, lm_head, 2.0)
        (ce.sum() + kl.sum()).backward()
    assert made.numel == 7 * 256  # seven of the 128 states (rows, teachers, rows tempered), one of 6 slices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_top1_equals_that_of_whole_logits(shape, dtype):
    """Whole numbers below 3: many equal logits, in the label's slice and in others; the first one counts."""
    rows, _, width, vocab = shape
    draw = torch.Generator().manual_seed(rows)
    hidden, lm_head = (torch.randint(-2, 3, (n, width), generator=draw).to(dtype) for n in (rows, vocab))
    logits = hidden.float() @ lm_head.float().T
    first, ties = logits.argmax(dim=-1), logits == logits.amax(dim=-1, keepdim=True)
    assert is_argmax(hidden, first, lm_head).all()
    last = vocab - 1 - ties.flip(1).to(torch.int8).argmax(dim=-1)  # of equals
    assert torch.equal(is_argmax(hidden, last, lm_head), last == first)
    assert not is_argmax(hidden, (first + 1) % vocab, lm_head).any()


def test_top1_of_fp64_is_not_rounded():
    lm_head = torch.tensor([[1.0], [1 + 1e-12], [0.5]], dtype=torch.float64)
    assert is_argmax(lm_head.new_ones(3, 1), torch.tensor([0, 1, 2]), lm_head).tolist() == [False, True, False]


def test_top1_needs_only_a_slice_of_logits():
    hidden, labels, _, lm_head = drawn(1, 64, 32, 1, 1500, torch.float32)
    with MadeTensors() as made:
        assert is_argmax(hidden, labels, lm_head).shape == (64,)
    assert made.numel == 7 * 256
