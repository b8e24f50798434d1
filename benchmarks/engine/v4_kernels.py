"""DeepSeek-V4's CPU kernels of vLLM in plain torch, for processors without AVX-512, where vLLM's library has none.

vLLM's C++ kernels for V4 (csrc/cpu/sgl-kernels) are compiled for AVX-512 with bf16 alone. These define the same operators with
their semantics in fp32, as far as contexts of up to 2,048 tokens call them: up to there the indexer selects every entry, so its
keys are never read. T tokens, H heads, E experts; a page of ``block`` tokens holds 576 bytes per token (448 of fp8, 64 of bf16)
and then 8 scales per token, powers of two as exponents + 127.
"""

import torch
import torch.nn.functional as F

SCHEMAS = """
convert_weight_packed(Tensor weight) -> Tensor
bmm_cpu(Tensor(a!) out, Tensor mat1, Tensor mat2, bool is_vnni, Tensor? scale) -> ()
hc_pre_fused_cpu(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, int hc_mult, int sinkhorn_iters, float rms_eps, \
float hc_eps) -> (Tensor, Tensor, Tensor)
hc_post_fused_cpu(Tensor x, Tensor residual, Tensor post, Tensor comb) -> Tensor
hc_head_fused_cpu(Tensor x, Tensor hc_fn, Tensor hc_scale, Tensor hc_base, float hc_eps, float norm_eps) -> Tensor
fused_qnorm_rope_kv_insert_cpu(Tensor q, Tensor kv, Tensor positions, Tensor(a!) swa_kv_cache_2d, Tensor slot_mapping, \
Tensor cos_sin_cache, int q_head_padded, float eps, int cache_block_size) -> Tensor
inverse_gptj_rope_o_proj_cpu(Tensor o, Tensor positions, Tensor cos_sin_cache, int rope_dim) -> Tensor
save_partial_states_cpu(Tensor kv, Tensor score, Tensor ape, Tensor positions, Tensor(a!) state_cache, \
Tensor slot_mapping) -> ()
compress_norm_rope_store_cpu(Tensor state_cache, Tensor gather_slots, Tensor positions, Tensor kv_slot_mapping, \
Tensor rms_norm_weight, float rms_norm_eps, Tensor cos_sin_cache, Tensor(a!) kv_cache_2d, int kv_cache_block_size, \
int compress_ratio) -> ()
compress_norm_rope_store_indexer_cpu(Tensor state_cache, Tensor gather_slots, Tensor positions, Tensor kv_slot_mapping, \
Tensor rms_norm_weight, float rms_norm_eps, Tensor cos_sin_cache, Tensor(a!) kv_cache_2d, int kv_cache_block_size, \
int compress_ratio) -> ()
flash_mla_with_kvcache_cpu(Tensor(a!) out, Tensor q, Tensor window_cache_2d, Tensor window_slots, int window_block_size, \
Tensor compressed_cache_2d, Tensor compressed_slots, int compressed_block_size, Tensor attn_sink, float scale) -> ()
biased_topk_cpu(Tensor hidden_states, Tensor gating_output, Tensor correction_bias, int topk, bool renormalize, \
str scoring_func, int num_fused_shared_experts, float? routed_scaling_factor, \
bool apply_routed_scaling_factor_on_output) -> (Tensor, Tensor)
hash_topk_cpu(Tensor gating_output, Tensor tid2eid, int topk, str scoring_func, int num_fused_shared_experts, int num_experts, \
float routed_scaling_factor) -> (Tensor, Tensor)
"""
NOPE, ROPE, DATA, SCALES = 448, 64, 576, 8
LIBRARY = torch.library.Library("_C", "FRAGMENT")


def define() -> None:
    """Defines the operators; they may not exist yet."""
    for schema in SCHEMAS.strip().splitlines():
        name = schema.partition("(")[0]
        LIBRARY.define(schema)
        LIBRARY.impl(name, globals()[name], "CPU")


def convert_weight_packed(weight):
    return weight.clone()


def bmm_cpu(out, mat1, mat2, is_vnni, scale):
    out.copy_(mat1.float() @ mat2.float().transpose(1, 2))


def hc_pre_fused_cpu(x, hc_fn, hc_scale, hc_base, hc_mult, sinkhorn_iters, rms_eps, hc_eps):
    from vllm.model_executor.kernels.mhc.torch import mhc_pre_torch

    post, comb, layer_input = mhc_pre_torch(x, hc_fn, hc_scale, hc_base, rms_eps, hc_eps, hc_eps, 2.0, sinkhorn_iters)
    return layer_input, post.squeeze(-1), comb


def hc_post_fused_cpu(x, residual, post, comb):
    from vllm.model_executor.kernels.mhc.torch import mhc_post_torch

    return mhc_post_torch(x, residual, post[..., None], comb)


def hc_head_fused_cpu(x, hc_fn, hc_scale, hc_base, hc_eps, norm_eps):
    flat = x.flatten(1).float()
    unit = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    alpha = torch.sigmoid(F.linear(unit, hc_fn) * hc_scale + hc_base) + hc_eps
    return (alpha[..., None] * x.float()).sum(1).to(x.dtype)


def rotated(x, positions, cos_sin_cache, sign=1):
    """Turns the last 64 numbers of [T, ..., 512] in fp32 as interleaved pairs; ``sign`` -1 turns back."""
    cos, sin = (part.view(len(positions), *[1] * (x.ndim - 2), -1) for part in cos_sin_cache[positions].chunk(2, dim=-1))
    even, odd = x[..., -ROPE::2], x[..., -ROPE + 1 :: 2]
    turned = torch.stack([even * cos - sign * odd * sin, odd * cos + sign * even * sin], dim=-1)
    return torch.cat([x[..., :-ROPE], turned.flatten(-2)], dim=-1)


def fused_qnorm_rope_kv_insert_cpu(q, kv, positions, swa_kv_cache_2d, slot_mapping, cos_sin_cache, q_head_padded, eps, block):
    wide = q.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    count = len(slot_mapping)
    insert(swa_kv_cache_2d, slot_mapping, rotated(kv[:count].float(), positions[:count], cos_sin_cache), block)
    return F.pad(rotated(wide, positions, cos_sin_cache), (0, 0, 0, q_head_padded - q.shape[1])).to(q.dtype)


def inverse_gptj_rope_o_proj_cpu(o, positions, cos_sin_cache, rope_dim):
    return rotated(o.float(), positions, cos_sin_cache, sign=-1)


def save_partial_states_cpu(kv, score, ape, positions, state_cache, slot_mapping):
    keep = slot_mapping >= 0
    slots, count = slot_mapping[keep], len(slot_mapping)
    rows = torch.cat([kv[:count], score[:count] + ape[positions[:count] % len(ape)]], dim=-1)[keep]
    state_cache[slots // state_cache.shape[1], slots % state_cache.shape[1]] = rows.to(state_cache.dtype)


def compress_norm_rope_store_cpu(
    state_cache, gather_slots, positions, kv_slots, weight, eps, cos_sin_cache, cache, block, ratio
):
    """Writes one entry per ``ratio`` tokens: the softmax over the window's scores weighs its states, per channel."""
    count = len(kv_slots)
    done = ((positions[:count] + 1) % ratio == 0) & (kv_slots >= 0)
    if not bool(done.any()):
        return
    slots, at = gather_slots[:count][done], positions[:count][done]
    rows = state_cache[
        slots.clamp(min=0) // state_cache.shape[1], slots.clamp(min=0) % state_cache.shape[1]
    ].float()  # [N, W, 2 S]
    states, scores = rows.chunk(2, dim=-1)
    if slots.shape[1] == 2 * ratio:  # windows overlap: the older half gives its first channels, the newer half its last
        older = torch.arange(2 * ratio)[:, None] < ratio
        states, scores = (torch.where(older, *part.chunk(2, dim=-1)) for part in (states, scores))
    scores = scores.masked_fill((slots < 0)[..., None], -torch.inf).softmax(dim=1)
    entry = (states.masked_fill((slots < 0)[..., None], 0) * scores).sum(1)
    entry = entry * torch.rsqrt(entry.square().mean(-1, keepdim=True) + eps) * weight
    insert(cache, kv_slots[done], rotated(entry, at // ratio * ratio, cos_sin_cache), block)


def compress_norm_rope_store_indexer_cpu(*_):
    """The indexer's keys are read in contexts of more than 2,048 tokens alone, where reading them fails."""


def flash_mla_with_kvcache_cpu(
    out, q, window_cache, window_slots, window_block, compressed_cache, compressed_slots, compressed_block, attn_sink, scale
):
    keys, masks = [], []
    for cache, slots, block in (
        (window_cache, window_slots, window_block),
        (compressed_cache, compressed_slots, compressed_block),
    ):
        found = torch.unique(slots[slots >= 0])
        seen = torch.zeros(len(slots), len(found) + 1, dtype=torch.bool)
        seen.scatter_(1, torch.where(slots < 0, len(found), torch.searchsorted(found, slots)), True)
        keys.append(dequantized(cache, found, block))
        masks.append(seen[:, :-1])
    key, mask = torch.cat(keys), torch.cat(masks, dim=1)
    for start in range(0, len(q), 256):
        part = slice(start, start + 256)
        scores = torch.einsum("thd,ud->thu", q[part].float(), key) * scale
        scores = scores.masked_fill(~mask[part, None], -torch.inf)
        sink = attn_sink.float().view(1, -1, 1).expand(len(scores), -1, 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        out[part] = torch.einsum("thu,ud->thd", weights, key).to(out.dtype)


def biased_topk_cpu(hidden_states, gating_output, correction_bias, topk, renormalize, scoring_func, fused, scaling, applied):
    weights = F.softplus(gating_output.float()).sqrt()
    ids = (weights + correction_bias).topk(topk, dim=-1).indices
    chosen = weights.gather(1, ids)
    return chosen / chosen.sum(-1, keepdim=True) * scaling, ids.int()


def hash_topk_cpu(gating_output, tid2eid, topk, scoring_func, fused, num_experts, routed_scaling_factor):
    chosen = F.softplus(gating_output.float()).sqrt().gather(1, tid2eid.long())
    return chosen / chosen.sum(-1, keepdim=True) * routed_scaling_factor, tid2eid.int()


def insert(cache, slots, rows, block):
    """Writes rows [T, 512] into the pages [P, bytes] at ``slots`` [T]; a slot of -1 is left out."""
    rows, slots = rows[slots >= 0].to(torch.bfloat16), slots[slots >= 0]
    nope = rows[:, :NOPE].float().view(len(rows), NOPE // 64, 64)
    exponent = (nope.abs().amax(-1).clamp(min=1e-4) / 448).log2().ceil()  # [T, 7]
    fp8 = (nope * torch.exp2(-exponent)[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(1)
    data = torch.cat([fp8.view(torch.uint8), rows[:, NOPE:].contiguous().view(torch.uint8)], dim=1)
    scales = F.pad((exponent + 127).clamp(0, 255).to(torch.uint8), (0, 1))
    page, place = (slots // block)[:, None], (slots % block)[:, None]
    cache[page, place * DATA + torch.arange(DATA)] = data
    cache[page, block * DATA + place * SCALES + torch.arange(SCALES)] = scales


def dequantized(cache, slots, block):
    """Reads rows [N, 512] in fp32."""
    page, place = (slots // block)[:, None], (slots % block)[:, None]
    data = cache[page, place * DATA + torch.arange(DATA)]
    scales = torch.exp2(cache[page, block * DATA + place * SCALES + torch.arange(SCALES - 1)].float() - 127)
    nope = data[:, :NOPE].contiguous().view(torch.float8_e4m3fn).float().view(len(slots), NOPE // 64, 64) * scales[..., None]
    return torch.cat([nope.flatten(1), data[:, NOPE:].contiguous().view(torch.bfloat16).float()], dim=1)
