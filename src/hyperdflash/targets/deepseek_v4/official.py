"""DeepSeek's own names of the tensors that this project reads itself: the heads and the native MTP block. transformers renames,
merges and dequantizes the layers of the whole target."""

import re

import torch
from torch import Tensor

from hyperdflash.targets.deepseek_v4.checkpoint import Checkpoint, dtype_of

MTP_PREFIX = "mtp.0."
HEADS = {
    "embed_tokens.weight": ("model.embed_tokens.weight", "embed.weight"),
    "norm.weight": ("model.norm.weight", "norm.weight"),
    "lm_head.weight": ("lm_head.weight", "head.weight"),
    "hc_head.hc_fn": ("model.hc_head.hc_fn", "hc_head_fn"),
    "hc_head.hc_base": ("model.hc_head.hc_base", "hc_head_base"),
    "hc_head.hc_scale": ("model.hc_head.hc_scale", "hc_head_scale"),
}  # TargetHeads -> transformers, official
MTP = {
    **{f"{name}.weight": f"{name}.weight" for name in ("enorm", "hnorm", "e_proj", "h_proj", "norm")},
    **{f"hc_head.hc_{part}": f"hc_head_{part}" for part in ("fn", "base", "scale")},
    **{f"layer.{place}_hc.{part}": f"hc_{place}_{part}" for place in ("attn", "ffn") for part in ("fn", "base", "scale")},
    "layer.input_layernorm.weight": "attn_norm.weight",
    "layer.post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"layer.self_attn.{name}_proj.weight": f"attn.w{name}.weight" for name in ("q_a", "q_b", "kv", "o_a", "o_b")},
    "layer.self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "layer.self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "layer.self_attn.sinks": "attn.attn_sink",
    "layer.mlp.gate.weight": "ffn.gate.weight",
    "layer.mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    **{
        f"layer.mlp.shared_experts.{own}_proj.weight": f"ffn.shared_experts.{name}.weight"
        for own, name in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    },
}  # MTPBlock -> official, after MTP_PREFIX
NOT_NATIVE = re.compile(r"mtp\.[1-9]\d*\.|mtp\.\d+\.(markov|confidence)_head\.")


def head_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Maps TargetHeads' names to the checkpoint's, which has one of two layouts."""
    layout = 1 if HEADS["embed_tokens.weight"][1] in checkpoint else 0
    return {own: names[layout] for own, names in HEADS.items()}


def layer_names(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of the layers' tensors, shard by shard: all but the heads, scales, and what ``mtp.*`` holds."""
    others = {*head_names(checkpoint).values(), *checkpoint.names("mtp.")}
    others |= {name.removesuffix("weight") + "scale" for name in checkpoint.shards if name.endswith(".weight")}
    return [name for name in checkpoint.names("") if name not in others]


def check_native_mtp(checkpoint: Checkpoint) -> None:
    """Raises ValueError where `mtp.*` is absent, or is the DSpark drafter that later releases store under the same names."""
    names = checkpoint.names("mtp.")
    if not names:
        raise ValueError(f"target.path={checkpoint.path} has no {MTP_PREFIX}* tensors: leave MTP methods out")
    native = f"{MTP_PREFIX}enorm.weight"
    foreign = next((name for name in names if NOT_NATIVE.match(name)), None)
    if foreign or native not in checkpoint:
        raise ValueError(
            f"target.path={checkpoint.path} has a DSpark drafter under mtp.* and no native MTP block "
            f"(it has {foreign or f'no {native}'}): leave MTP methods out, or give the checkpoint of the April 2026 preview"
        )


def mtp_state(checkpoint: Checkpoint, num_experts: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Reads MTPBlock's state from either layout, one dequantized tensor at a time, in ``dtype`` (norms, gates, sinks fp32)."""
    check_native_mtp(checkpoint)
    if f"{MTP_PREFIX}attn.wq_a.weight" not in checkpoint:  # transformers' layout
        names = {name.removeprefix(MTP_PREFIX): name for name in checkpoint.names(MTP_PREFIX)}
        return {own: checkpoint.weight(name, dtype_of(own, dtype)) for own, name in names.items()}
    state = {own: checkpoint.weight(MTP_PREFIX + name, dtype_of(own, dtype)) for own, name in MTP.items()}

    def matrix(expert: int, part: str) -> Tensor:
        return checkpoint.weight(f"{MTP_PREFIX}ffn.experts.{expert}.{part}.weight", dtype)

    inner, hidden = matrix(0, "w1").shape
    gate_up = torch.empty(num_experts, 2 * inner, hidden, dtype=dtype)
    down = torch.empty(num_experts, hidden, inner, dtype=dtype)
    for expert in range(num_experts):
        gate_up[expert, :inner], gate_up[expert, inner:] = matrix(expert, "w1"), matrix(expert, "w3")
        down[expert] = matrix(expert, "w2")
    return state | {"layer.mlp.experts.gate_up_proj": gate_up, "layer.mlp.experts.down_proj": down}
