import pytest
import torch

from hyperdflash.contracts import BlockLayout
from hyperdflash.drafting import attention
from hyperdflash.drafting.attention import (
    block_attention,
    context_mask,
    flex_block_attention,
    flex_mask,
    own_mask,
    reference_block_attention,
)
from hyperdflash.drafting.layers import rotary_angles, rotate
from tests.made_tensors import MadeTensors


def dense_attention(query, context, block, anchors, window=None):
    """Brute force: one [A * K, T + A * K] mask, one row of keys for everything."""
    num_docs, num_anchors, block_size, num_heads, width = query.shape
    num_context, num_kv_heads = context[0].shape[1:3]
    rows = num_anchors * block_size
    mask = torch.zeros(num_docs, rows, num_context + rows, dtype=torch.bool)
    for b in range(num_docs):
        for row in range(rows):
            i = row // block_size
            mask[b, row, 0 if window is None else max(0, anchors[b, i] - window) : anchors[b, i]] = True
            mask[b, row, num_context + i * block_size : num_context + (i + 1) * block_size] = True
    key, value = (torch.cat([c, x.flatten(1, 2)], dim=1) for c, x in zip(context, block, strict=True))
    output = torch.zeros(num_docs, rows, num_heads, width)
    for head in range(num_heads):
        kv = head * num_kv_heads // num_heads
        scores = query.flatten(1, 2)[:, :, head] @ key[:, :, kv].transpose(1, 2) / width**0.5
        output[:, :, head] = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value[:, :, kv]
    return output.view(num_docs, num_anchors, block_size, num_heads * width)


def drawn(seed, docs, tokens, anchors, block, heads, kv, width, dtype=torch.float32):
    """query, (context keys, values), (block keys, values), anchors; the first anchor of all sees no context."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(dtype).requires_grad_()

    positions = torch.randint(0, tokens, (docs, anchors), generator=draw).sort(dim=1).values
    positions[0, 0] = 0
    query = normal(docs, anchors, block, heads, width)
    context = normal(docs, tokens, kv, width), normal(docs, tokens, kv, width)
    own = normal(docs, anchors, block, kv, width), normal(docs, anchors, block, kv, width)
    return query, context, own, positions


SHAPES = [(2, 9, 4, 7, 4, 2, 8), (1, 1, 1, 2, 1, 1, 2), (3, 17, 5, 3, 6, 2, 4), (2, 5, 3, 4, 3, 3, 6), (2, 150, 20, 7, 4, 2, 8)]


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Eight anchors against spans of context in steps of four."""
    monkeypatch.setitem(attention.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(attention, "SHAPE_MULTIPLE", 4)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_a_dense_mask(few_at_a_time, shape, window):
    query, context, own, positions = drawn(0, *shape)
    visible = context_mask(positions, torch.arange(shape[1]), window)
    expected = dense_attention(query, context, own, positions, window)
    for attend in (block_attention, reference_block_attention):
        torch.testing.assert_close(attend(query, context, own, visible), expected)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_the_formulas(few_at_a_time, shape, window):
    query, context, own, positions = drawn(1, *shape)
    visible = context_mask(positions, torch.arange(shape[1]), window)
    towards = torch.randn(*query.shape[:3], query.shape[3] * query.shape[4])
    gradients = [
        torch.autograd.grad((attend(query, context, own, visible) * towards).sum(), (query, *context, *own))
        for attend in (block_attention, reference_block_attention)
    ]
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_bf16_differs_from_fp32_as_much_as_the_formula_does():
    """Output and all five gradients, with two query heads per key-value head and an anchor without context."""
    query, context, own, positions = drawn(2, *SHAPES[-1])
    visible = context_mask(positions, torch.arange(150))
    towards = torch.randn(2, 20, 7, 32, generator=torch.Generator().manual_seed(3))

    def with_gradients(attend, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (query, *context, *own)]
        output = attend(inputs[0], tuple(inputs[1:3]), tuple(inputs[3:]), visible)
        return [output, *torch.autograd.grad((output.float() * towards).sum(), inputs)]

    exact = with_gradients(reference_block_attention, torch.float32)
    ours, formula = (
        [(x.float() - y).norm() / y.norm() for x, y in zip(with_gradients(f, torch.bfloat16), exact, strict=True)]
        for f in (block_attention, reference_block_attention)
    )
    for own_error, formulas in zip(ours, formula, strict=True):
        assert own_error < 1.5 * formulas < 0.02


def test_context_that_no_anchor_sees_is_not_read(few_at_a_time):
    query, context, own, positions = drawn(3, 2, 512, 20, 3, 2, 2, 4)
    positions = 150 + positions % 12  # with a window of 8: positions 142 to 160, read in pieces of 64
    visible = context_mask(positions, torch.arange(512), 8)
    expected = block_attention(query, context, own, visible)
    for unread in (slice(0, 128), slice(192, 512)):
        for tensor in context:
            tensor.data[:, unread] = float("nan")
    assert torch.equal(block_attention(query, context, own, visible), expected)


def test_memory_is_linear_in_anchors(monkeypatch):
    """Twice the anchors take twice the memory; scores of all anchors never exist at once, forward or backward."""
    monkeypatch.setitem(attention.CHUNK_BYTES, "cpu", 1 << 20)
    largest = []
    for anchors in (64, 128):
        query, context, own, positions = drawn(4, 1, 1024, anchors, 7, 2, 2, 4)
        visible = context_mask(positions, torch.arange(1024))
        with MadeTensors() as made:
            block_attention(query, context, own, visible).sum().backward()
        largest.append(made.nbytes)
    assert max(largest) <= 1 << 20 < 64 * 7 * 2 * 1024 * 4


CAUSAL = BlockLayout.chain(7, "causal")
TREE = BlockLayout(7, (0, 0, 1, 1, 2, 2), tuple(tuple(j in path for j in range(7)) for path in ({0}, {0, 1}, {0, 2},
                   {0, 1, 3}, {0, 1, 4}, {0, 2, 5}, {0, 2, 6})))  # fmt: skip


@pytest.mark.parametrize("layout", [CAUSAL, TREE], ids=["causal", "tree"])
def test_a_layout_hides_own_positions_in_every_attention(few_at_a_time, layout):
    """Output and gradients against the reference, which masks whole scores; FlexAttention has the same mask."""
    query, context, own, positions = drawn(7, 2, 150, 20, 7, 4, 2, 16)
    visible, shown = context_mask(positions, torch.arange(150)), own_mask(layout, "cpu")
    assert shown.tolist() == [list(row) for row in layout.visible]
    towards = torch.randn(2, 20, 7, 64, generator=torch.Generator().manual_seed(3))
    found = []
    for attend in (block_attention, reference_block_attention):
        output = attend(query, context, own, visible, shown)
        found.append([output, *torch.autograd.grad((output * towards).sum(), (query, *context, *own))])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0][0], block_attention(query, context, own, visible))
    query, context, own = query.detach(), [x.detach() for x in context], [x.detach() for x in own]
    flexed = flex_block_attention(query, context, own, flex_mask(visible, layout))
    torch.testing.assert_close(flexed, found[1][0])


def test_an_accelerator_reads_the_whole_context_without_waiting_for_the_host():
    """On the meta device a host read raises: replay's attention must not contain one."""
    query, context, own, positions = drawn(8, 2, 150, 20, 7, 4, 2, 16)
    visible = context_mask(positions, torch.arange(150)).to("meta")
    query, context, own = (
        query.detach().to("meta"),
        [x.detach().to("meta") for x in context],
        [x.detach().to("meta") for x in own],
    )
    with torch.no_grad():
        query = query.repeat(1, 40, 1, 1, 1)
        own, visible = [x.repeat(1, 40, 1, 1, 1) for x in own], visible.repeat(1, 40, 1)
        assert block_attention(query, tuple(context), tuple(own), visible).shape == (2, 800, 7, 64)


@pytest.mark.parametrize("window", [None, 6])
def test_flex_attention_has_the_same_mask(window):
    query, context, own, positions = drawn(5, 2, 150, 20, 7, 4, 2, 16)
    visible = context_mask(positions, torch.arange(150), window)
    query, context, own = query.detach(), tuple(x.detach() for x in context), tuple(x.detach() for x in own)
    output = flex_block_attention(query, context, own, flex_mask(visible, BlockLayout.chain(7)))
    torch.testing.assert_close(output, reference_block_attention(query, context, own, visible))


def test_rotary_is_relative_and_rotates_pairs_half_a_head_apart():
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(at_query, at_key):
        turned = [rotate(x, *rotary_angles(torch.tensor([p]), 8, 10000.0)) for x, p in ((query, at_query), (key, at_key))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100))
    assert (score(7, 3) - score(8, 3)).abs() > 1e-3
    unit = torch.tensor([[[1.0, 0, 0, 0]]])
    expected = torch.tensor([[[1.0, 0, 0, 0]]]) * torch.cos(torch.tensor(2.0))
    expected[..., 2] = torch.sin(torch.tensor(2.0))
    torch.testing.assert_close(rotate(unit, *rotary_angles(torch.tensor([2]), 4, 100.0)), expected)
