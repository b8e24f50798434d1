import torch

from src.blocks.visibility import context_mask
from src.drafter.attention import block_attention
from src.drafter.layers import rotary_angles, rotate


def dense_attention(query, context, block, anchors):
    """Brute force: one [A * K, T + A * K] mask, one row of keys for everything."""
    num_docs, num_anchors, block_size, num_heads, width = query.shape
    num_context, num_kv_heads = context[0].shape[1:3]
    rows = num_anchors * block_size
    mask = torch.zeros(num_docs, rows, num_context + rows, dtype=torch.bool)
    for b in range(num_docs):
        for row in range(rows):
            i = row // block_size
            mask[b, row, : anchors[b, i]] = True
            mask[b, row, num_context + i * block_size : num_context + (i + 1) * block_size] = True
    key, value = (torch.cat([c, x.flatten(1, 2)], dim=1) for c, x in zip(context, block, strict=True))
    output = torch.zeros(num_docs, rows, num_heads, width)
    for head in range(num_heads):
        kv = head * num_kv_heads // num_heads
        scores = query.flatten(1, 2)[:, :, head] @ key[:, :, kv].transpose(1, 2) / width**0.5
        output[:, :, head] = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value[:, :, kv]
    return output.view(num_docs, num_anchors, block_size, num_heads * width)


def test_equal_to_a_dense_mask():
    for seed, (docs, tokens, anchors, block, heads, kv, width) in enumerate(
        [(2, 9, 4, 7, 4, 2, 8), (1, 1, 1, 2, 1, 1, 2), (3, 17, 5, 3, 6, 2, 4), (2, 5, 3, 4, 3, 3, 6)]
    ):
        torch.manual_seed(seed)
        positions = torch.randint(0, tokens, (docs, anchors))
        positions[0, 0] = 0  # no context at all
        query = torch.randn(docs, anchors, block, heads, width)
        context = torch.randn(docs, tokens, kv, width), torch.randn(docs, tokens, kv, width)
        own = torch.randn(docs, anchors, block, kv, width), torch.randn(docs, anchors, block, kv, width)
        output = block_attention(query, context, own, context_mask(positions, torch.arange(tokens)))
        torch.testing.assert_close(output, dense_attention(query, context, own, positions))


def test_rotary_is_relative_and_turns_pairs_half_a_head_apart():
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
