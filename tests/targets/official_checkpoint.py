"""A miniature DeepSeek-V4 checkpoint in the official layout: names, formats, shards with an index, config.json.

The formats, as in DeepSeek-V4-Flash:

    projections, shared expert, indexer queries, MTP's e_proj and h_proj   FP8 e4m3 with `.scale` e8m0 for 128 x 128
    routed experts                                                         two e2m1 values a byte (int8), `.scale` e8m0 for 32
    embedding, LM head, router, compressors, norms                         BF16
    hyper-connections, sinks, position biases, router bias                 FP32
    hash-routing tables                                                    INT64

Written from the published layout: nothing here uses the code that reads it back.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from hyperdflash.targets.deepseek_v4.mtp import MTPBlock
from tiny_target.build import build_target, set_implementations, tiny_config

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}

ROOT = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
}
# of one layer: transformers' name -> official name
LAYER = {
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.kv_proj.weight": "attn.compressor.wkv.weight",
    "self_attn.compressor.gate_proj.weight": "attn.compressor.wgate.weight",
    "self_attn.compressor.kv_norm.weight": "attn.compressor.norm.weight",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.indexer.kv_proj.weight": "attn.indexer.compressor.wkv.weight",
    "self_attn.compressor.indexer.gate_proj.weight": "attn.indexer.compressor.wgate.weight",
    "self_attn.compressor.indexer.kv_norm.weight": "attn.indexer.compressor.norm.weight",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    **{f"{place}_hc.{part}": f"hc_{place}_{part}" for place in ("attn", "ffn") for part in ("fn", "base", "scale")},
}
MTP = {
    **{f"{name}.weight": f"{name}.weight" for name in ("e_proj", "h_proj", "enorm", "hnorm", "norm")},
    **{f"hc_head.hc_{part}": f"hc_head_{part}" for part in ("fn", "base", "scale")},
}
YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
SAME = (  # fields of config.json that transformers has under the same names
    "vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_lora_rank", "o_groups", "sliding_window", "hc_mult", "hc_eps",
    "hc_sinkhorn_iters", "index_head_dim", "index_n_heads", "index_topk", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "rms_norm_eps",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "tie_word_embeddings", "num_nextn_predict_layers",
)  # fmt: skip
FP8 = ("wq_a.", "wq_b.", ".wkv.", "wo_a.", "wo_b.", "shared_experts.", "e_proj.", "h_proj.")
FP32 = ("hc_", "attn_sink", ".ape", "gate.bias")


def miniature(**overrides) -> tuple[DeepseekV4ForCausalLM, MTPBlock]:
    """A random target whose matrices have whole 128 x 128 blocks, with every kind of layer, on the quantisation grid."""
    values = {
        "vocab_size": 384,
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "head_dim": 128,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "num_hash_layers": 1,
        "layer_types": list(RATIOS),
        "compress_rates": {kind: ratio for kind, ratio in RATIOS.items() if ratio},
        "sliding_window": 32,
        "index_n_heads": 2,
        "index_head_dim": 64,
        "hc_sinkhorn_iters": 20,
        "max_position_embeddings": 1048576,
        "rope_scaling": YARN,
    }
    model, mtp = build_target(tiny_config(**(values | overrides)))
    generator = torch.Generator().manual_seed(3)
    for module in (model, mtp):  # where a fresh model has zeros and ones, a mistake would not show
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 or name.endswith("position_bias"):
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
    round_to_grid(model, mtp)
    set_implementations(model, mtp, attention="eager", experts="dense")
    return model, mtp


def official_layer(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One layer's tensors under official names, full precision, its packed experts taken apart."""
    named = {}
    for name, tensor in state.items():
        if name == "mlp.experts.gate_up_proj":
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                named[f"{prefix}ffn.experts.{expert}.w1.weight"] = gate
                named[f"{prefix}ffn.experts.{expert}.w3.weight"] = up
        elif name == "mlp.experts.down_proj":
            named |= {f"{prefix}ffn.experts.{expert}.w2.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            named[prefix + LAYER[name]] = tensor
    return named


def official_names(model: DeepseekV4ForCausalLM, mtp: MTPBlock) -> dict[str, Tensor]:
    """All tensors of both under official names, in full precision."""
    state = model.state_dict()
    named = {ROOT[name]: tensor for name, tensor in state.items() if name in ROOT}
    for index, layer in enumerate(model.model.layers):
        named |= official_layer(layer.state_dict(), f"layers.{index}.")
    named |= official_layer(mtp.layer.state_dict(), "mtp.0.")
    apart = {name: tensor for name, tensor in mtp.state_dict().items() if not name.startswith("layer.")}
    return named | {f"mtp.0.{MTP[name]}": tensor for name, tensor in apart.items()}


def is_fp8(name: str) -> bool:
    return any(part in name for part in FP8) and "compressor" not in name and name.endswith(".weight")


def is_fp4(name: str) -> bool:
    return ".ffn.experts." in name


def power_of_two_scale(largest: Tensor, format_max: float) -> Tensor:
    """The smallest power of two that brings ``largest`` within the format, as e8m0."""
    return torch.exp2(torch.ceil(torch.log2(largest.clamp(min=1e-30) / format_max))).to(torch.float8_e8m0fnu)


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C] -> e4m3 [R, C] and e8m0 [R / 128, C / 128]; R and C are multiples of 128."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // 128, 128, columns // 128, 128)
    scale = power_of_two_scale(blocks.abs().amax(dim=(1, 3)), 448.0)
    return (blocks / scale.float()[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn), scale


def from_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.float() * torch.kron(scale.float(), torch.ones(128, 128))


def to_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C] -> packed int8 [R, C / 2], the even column in the low four bits, and e8m0 [R, C / 32]."""
    groups = weight.unflatten(1, (-1, 32))
    scale = power_of_two_scale(groups.abs().amax(dim=2), 6.0)
    values = (groups / scale.float()[..., None]).flatten(1)
    nearest = (values.abs()[..., None] - E2M1).abs().argmin(dim=-1)
    code = (nearest + 8 * (values < 0)).to(torch.uint8)
    return (code[:, 0::2] | code[:, 1::2] << 4).view(torch.int8), scale


def from_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    table = torch.cat([E2M1, -E2M1])
    code = packed.view(torch.uint8).int()
    values = torch.stack([table[code & 15], table[code >> 4]], dim=-1).flatten(1)
    return values * scale.float().repeat_interleave(32, dim=1)


def stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What the checkpoint holds for one tensor: itself, or a quantised weight beside its scale."""
    if is_fp4(name) or is_fp8(name):
        weight, scale = to_fp4(tensor) if is_fp4(name) else to_fp8(tensor)
        return {name: weight, name.removesuffix("weight") + "scale": scale}
    if not tensor.is_floating_point():
        return {name: tensor.clone()}
    fp32 = any(part in name for part in FP32)
    return {name: tensor.to(torch.float32 if fp32 else torch.bfloat16).contiguous().clone()}


@torch.no_grad()
def round_to_grid(model: DeepseekV4ForCausalLM, mtp: MTPBlock) -> None:
    """Replace every weight by what the checkpoint can hold, in place."""
    for name, tensor in official_names(model, mtp).items():  # views of the parameters
        if not tensor.is_floating_point():
            continue
        if is_fp4(name):
            tensor.copy_(from_fp4(*to_fp4(tensor)))
        elif is_fp8(name):
            tensor.copy_(from_fp8(*to_fp8(tensor)))
        elif not any(part in name for part in FP32):
            tensor.copy_(tensor.to(torch.bfloat16))


def official_config(model: DeepseekV4ForCausalLM, *, expert_dtype: bool = True) -> dict:
    """config.json with the official file's fields; early snapshots lack ``expert_dtype``."""
    config = model.config
    official = {name: getattr(config, name) for name in SAME}
    official |= {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "num_hash_layers": config.mlp_layer_types.count("hash_moe"),
        "compress_ratios": [RATIOS[kind] for kind in config.layer_types] + [0],
        "swiglu_limit": config.swiglu_limit,
        "rope_theta": int(config.rope_theta),
        "compress_rope_theta": int(config.compress_rope_theta),
        "rope_scaling": YARN,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    }
    return official | ({"expert_dtype": "fp4"} if expert_dtype else {})


def write_official(
    directory: Path, model: DeepseekV4ForCausalLM, mtp: MTPBlock, *, num_shards: int = 5, expert_dtype: bool = True
) -> dict[str, str]:
    """The checkpoint; returns tensor name -> shard. Embedding in the first shard, MTP and the root tensors in the last."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in official_names(model, mtp).items():
        tensors |= stored(name, tensor.detach())
    names = sorted(tensors, key=lambda name: (name != "embed.weight", not name.startswith("layers."), name))
    last_layer = max(i for i, name in enumerate(names) if name.startswith("layers.")) + 1
    bounds = [1, *(1 + (last_layer - 1) * i // (num_shards - 2) for i in range(1, num_shards - 1)), len(names)]
    weight_map, start = {}, 0
    for number, end in enumerate(bounds, 1):
        shard = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[start:end]}, directory / shard)
        weight_map |= dict.fromkeys(names[start:end], shard)
        start = end
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(official_config(model, expert_dtype=expert_dtype)))
    return weight_map
