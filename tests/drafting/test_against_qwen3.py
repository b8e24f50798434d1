"""One block at a time with transformers' own Qwen3 pieces: keys concatenated, positions 0..a + K - 1, no mask."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

MASK_TOKEN = 2  # of the build fixture


def loaded(module, ours):
    module.load_state_dict(ours.state_dict(), strict=True)
    return module


def qwen3_block(drafter, context, anchor, anchor_id, heads):
    """Context [T, D] of one document -> hidden [S, D] of the block at ``anchor``."""
    config = drafter.config
    width, eps = config.head_dim, config.rms_norm_eps
    qwen = Qwen3Config(
        hidden_size=heads.hidden_size,
        head_dim=width,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    positions = torch.arange(anchor + config.block_size)[None]
    cos, sin = Qwen3RotaryEmbedding(qwen)(context, positions)
    x = heads.embed_tokens(torch.tensor([anchor_id] + [MASK_TOKEN] * config.num_slots))

    def norm(ours, size):
        return loaded(Qwen3RMSNorm(size, eps), ours)

    for layer in drafter.layers:
        own = layer.self_attn
        normed = norm(layer.input_layernorm, heads.hidden_size)(x)
        rows = torch.cat([context[:anchor], normed])  # [a + K, D]
        query, key, value = (
            proj(source).unflatten(-1, (-1, width)).transpose(0, 1)[None]
            for proj, source in ((own.q_proj, rows), (own.k_proj, rows), (own.v_proj, rows))
        )
        query, key = norm(own.q_norm, width)(query), norm(own.k_norm, width)(key)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        output = torch.nn.functional.scaled_dot_product_attention(query[:, :, anchor:], key, value, enable_gqa=True)
        x = x + own.o_proj(output[0].transpose(0, 1).flatten(1))
        x = x + loaded(Qwen3MLP(qwen), layer.mlp)(norm(layer.post_attention_layernorm, heads.hidden_size)(x))
    return norm(drafter.norm, heads.hidden_size)(x)[1:]


@pytest.mark.parametrize("rope_theta", [100.0, 1e6])
def test_every_block_equals_qwen3_on_the_concatenated_sequence(build, heads, states, rope_theta):
    drafter = build(rope_theta=rope_theta)
    anchors = torch.tensor([[0, 1, 9, 33], [5, 9, 20, 30], [1, 7, 8, 22]])
    hidden = drafter.slots(states, heads, anchors, torch.ones_like(anchors, dtype=torch.bool)).features
    context = drafter.context(states, heads)
    for document in range(3):
        for i, anchor in enumerate(anchors[document].tolist()):
            anchor_id = int(states.input_ids[document, anchor])
            expected = qwen3_block(drafter, context[document], anchor, anchor_id, heads)
            torch.testing.assert_close(hidden[document, i], expected, rtol=1e-4, atol=1e-5)
