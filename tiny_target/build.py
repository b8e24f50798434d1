"""Builds a new DeepSeek-V4 target of transformers' class, fills its hash tables, separates its paths, and writes its file.

``tiny_config()`` returns the shipped size; any field can be overridden for other depths and vocabularies.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import hyperdflash.targets.deepseek_v4.cpu_kernels  # noqa: F401  (registers "windowed" and "dense")
from hyperdflash.targets.deepseek_v4 import compat
from hyperdflash.targets.deepseek_v4.checkpoint import FP32_NAMES
from hyperdflash.targets.deepseek_v4.mtp import MTPBlock
from hyperdflash.targets.deepseek_v4.official import MTP_PREFIX


def tiny_config(**overrides) -> PretrainedConfig:
    """Returns the tiny target's configuration: three attention types, hash and top-k experts, 4 paths, under 3.7M parameters.

    Two sliding layers come first, then sparse and heavily compressed in turn; the first ``num_hash_layers`` route by token.
    """
    layers = overrides.get("num_hidden_layers", 8)
    alternating = ["compressed_sparse_attention", "heavily_compressed_attention"]
    values = {
        "vocab_size": 2048,
        "hidden_size": 128,
        "moe_intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "head_dim": 32,
        "q_lora_rank": 64,
        "o_groups": 2,
        "o_lora_rank": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_hash_layers": 2,
        "layer_types": (["sliding_attention"] * 2 + alternating * layers)[:layers],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 32},
        "sliding_window": 128,  # as in DeepSeek-V4: most prompts fit with their answers, so names and numbers can be copied
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 512,  # at least the entries of 2,048 tokens: a binding top-k on ties makes prefill and decode differ
        "partial_rotary_factor": 0.5,
        "hc_sinkhorn_iters": 4,  # of 20: the 4 x 4 matrices here are doubly stochastic to 1e-3 after 4
        "max_position_embeddings": 2048,
        "router_aux_loss_coef": 0.0,
    }
    return AutoConfig.for_model("deepseek_v4", **{**values, **overrides})


def build_target(config: PretrainedConfig, seed: int = 0) -> tuple[PreTrainedModel, MTPBlock]:
    """Builds a model and its native MTP block in fp32 on the CPU; ``config`` and ``seed`` determine the weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        mtp = MTPBlock(model.config)
        compat.initialize_like(model, mtp)
        fill_hash_tables(model)
    for index, layer in enumerate([*model.model.layers, mtp.layer]):
        set_paths_apart(layer, index)
    set_implementations(model, mtp)
    return model, mtp


def set_implementations(
    model: PreTrainedModel, mtp: MTPBlock | None = None, *, attention: str = "windowed", experts: str = "dense"
) -> None:
    """Chooses the attention and expert functions by their registered names (see cpu_kernels)."""
    configs = [model.config] if mtp is None else [model.config, mtp.config]
    compat.set_implementations(*configs, attention=attention, experts=experts)


def fill_hash_tables(model: PreTrainedModel) -> None:
    """Assigns distinct experts to every token id in the hash-routed layers; transformers leaves the table zero."""
    for layer in model.model.layers:
        if layer.mlp.is_hash:
            table = layer.mlp.gate.tid2eid
            scores = torch.rand(table.shape[0], layer.mlp.gate.num_experts)
            table.copy_(scores.topk(table.shape[1], dim=-1).indices)


@torch.no_grad()
def set_paths_apart(layer: nn.Module, index: int) -> None:
    """Starts the hyper-connections near the identity, as their paper does (arXiv 2409.19606, section 3): each sublayer prefers
    one path for reading and writing. transformers' zero ``base`` mixes all paths evenly, so they stay parallel."""
    for offset, connection in enumerate((layer.attn_hc, layer.ffn_hc)):
        paths = connection.hc_mult
        pre, post, comb = connection.base.split([paths, paths, paths * paths])
        chosen = (2 * index + offset) % paths
        pre.fill_(-1.0)[chosen] = 1.0
        post.fill_(-0.5)[chosen] = 1.0
        comb.view(paths, paths).copy_(3.0 * torch.eye(paths))


def save_target(directory: Path, model: PreTrainedModel, mtp: MTPBlock) -> Path:
    """Writes config.json and model.safetensors: matrices in bf16; norms, sinks and hyper-connections in fp32; the MTP block as
    `mtp.0.*`, which transformers ignores."""
    directory.mkdir(parents=True, exist_ok=True)

    def stored(name: str, tensor: Tensor) -> Tensor:
        keep = not tensor.is_floating_point() or any(word in name for word in FP32_NAMES)
        tensor = tensor.to(torch.int16) if name.endswith("tid2eid") else tensor  # expert ids are small
        return (tensor if keep else tensor.to(torch.bfloat16)).contiguous().clone()

    state = {name: stored(name, tensor) for name, tensor in model.state_dict().items()}
    state |= {MTP_PREFIX + name: stored(name, tensor) for name, tensor in mtp.state_dict().items()}
    path = directory / "model.safetensors"
    save_file(state, path.with_suffix(".partial"), metadata={"format": "pt"})
    path.with_suffix(".partial").replace(path)
    model.config.save_pretrained(directory)
    return path


def count_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
