"""Counts DeepSeek-V4's weights from its config.json: those that a token multiplies, and the format that stores them.

Flash has 284,332,230,231 parameters (transformers' own count), 13.3B of them active, and takes 159.6 GB on disk with the MTP
block. Formats: routed experts FP4, a scale per 32 weights; projections, shared expert and MTP's e_proj and h_proj FP8, a scale
per 128 x 128; embedding, LM head, router, compressors and norms BF16; hyper-connections, sinks and position biases FP32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from hyperdflash.settings import positive_int

# bytes per weight, scales included: MXFP4 has one byte per 32 weights, FP8 one per 128 x 128
BYTES = {"fp4": 0.5 + 1 / 32, "fp8": 1 + 1 / 128**2, "bf16": 2.0, "fp32": 4.0, "int64": 8.0}
SPARSE_RATIO = 4  # the compress ratio whose layers have two series and an indexer (official inference code: overlap)


@dataclass(frozen=True, kw_only=True)
class V4Sizes:
    """Sizes under their names in DeepSeek-V4's config.json; ``compress_ratios`` ends with the MTP block's."""

    vocab_size: int  # V
    hidden_size: int  # D
    num_attention_heads: int  # H
    head_dim: int  # E
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int  # F
    num_hash_layers: int
    hc_mult: int  # m
    compress_ratios: Sequence[int]

    def __post_init__(self):
        for name in (f.name for f in fields(self) if f.name not in ("compress_ratios", "num_hash_layers")):
            positive_int(f"model.{name}", getattr(self, name))
        if len(self.compress_ratios) < 2:
            raise ValueError(f"model.compress_ratios needs a layer and the MTP block's entry, got {list(self.compress_ratios)}")

    @property
    def layer_ratios(self) -> tuple[int, ...]:
        """Ratio per layer, without the MTP block: 0 sliding window only, 4 compressed sparse, else heavily compressed."""
        return tuple(self.compress_ratios[:-1])

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def entry_bytes(self) -> int:
        """Bytes of one key-value entry: FP8, RoPE dimensions BF16, a scale per 64 and a byte of padding (vLLM: 584)."""
        plain = self.head_dim - self.qk_rope_head_dim
        return plain + 2 * self.qk_rope_head_dim + plain // 64 + 1

    def distinct_experts(self, tokens: float) -> float:
        """Expected number of experts that one layer reads for ``tokens`` that route uniformly and independently."""
        return self.n_routed_experts * (1 - (1 - self.num_experts_per_tok / self.n_routed_experts) ** tokens)


def read_sizes(path: str | Path, **overrides) -> V4Sizes:
    """Sizes from the config.json of the target in folder ``path``, in either spelling; ``overrides`` replace single ones.
    ValueError where the folder has no config.json. The MTP block attends to its window alone where the file names no ratio."""
    from hyperdflash.targets.load import read_config

    config = read_config(path)
    ratios = [config.compress_rates.get(kind, 0) for kind in config.layer_types]
    ratios += [0] * (config.num_hidden_layers + 1 - len(ratios))
    own = {"compress_ratios": ratios, "num_hash_layers": config.mlp_layer_types.count("hash_moe"), **overrides}
    return V4Sizes(**{f.name: own[f.name] if f.name in own else getattr(config, f.name) for f in fields(V4Sizes)})


@dataclass(frozen=True)
class Weights:
    """``count`` weights of a ``part`` of the forward that every token multiplies, stored in ``format`` (a key of BYTES)."""

    part: str
    count: int
    format: str

    @property
    def bytes(self) -> float:
        return self.count * BYTES[self.format]


def layer_weights(sizes: V4Sizes, ratio: int) -> list[Weights]:
    """Returns the weights of one decoder layer of compress ratio ``ratio``, without routed experts and a hash layer's table."""
    D, E, H, q, m = sizes.hidden_size, sizes.head_dim, sizes.num_attention_heads, sizes.q_lora_rank, sizes.hc_mult
    low_rank = sizes.o_groups * sizes.o_lora_rank
    projections = D * q + q * H * E + D * E + H * E * sizes.o_lora_rank + low_rank * D  # wq_a, wq_b, wkv, wo_a, wo_b
    attention = [("fp8", projections), ("bf16", D + q + E), ("fp32", H)]  # then norms and sinks
    if ratio:
        series = 2 if ratio == SPARSE_RATIO else 1
        attention += [("bf16", 2 * D * series * E + E), ("fp32", ratio * series * E)]  # wkv, wgate, norm; position bias
    if ratio == SPARSE_RATIO:
        heads, width = sizes.index_n_heads, sizes.index_head_dim
        attention += [("fp8", q * heads * width), ("bf16", D * heads)]
        attention += [("bf16", 4 * D * width + width), ("fp32", ratio * 2 * width)]
    mixes = (2 + m) * m
    return [
        *(Weights("attention", count, format) for format, count in attention),
        Weights("shared expert and router", sizes.n_shared_experts * sizes.expert_weights, "fp8"),
        Weights("shared expert and router", sizes.n_routed_experts * D + D, "bf16"),
        Weights("hyper-connections", 2 * (mixes * m * D + mixes + 3), "fp32"),
    ]


def head_weights(sizes: V4Sizes) -> list[Weights]:
    D, m = sizes.hidden_size, sizes.hc_mult
    return [Weights("hyper-connections", m * m * D + m + 1, "fp32"), Weights("LM head", sizes.vocab_size * D + D, "bf16")]


def target_weights(sizes: V4Sizes) -> list[Weights]:
    """Returns all weights that every token of the target multiplies: no embedding table, no routed experts."""
    return [*(w for ratio in sizes.layer_ratios for w in layer_weights(sizes, ratio)), *head_weights(sizes)]


def mtp_weights(sizes: V4Sizes) -> list[Weights]:
    """Returns the weights of one step of the MTP block with the shared LM head, without its routed experts."""
    D = sizes.hidden_size
    projections = [Weights("attention", 2 * D * D, "fp8"), Weights("attention", 2 * D, "bf16")]
    return [*projections, *layer_weights(sizes, sizes.compress_ratios[-1]), *head_weights(sizes)]


def total_parameters(sizes: V4Sizes) -> int:
    """Counts the target's parameters, without its MTP block, router biases and hash tables."""
    experts = len(sizes.layer_ratios) * sizes.n_routed_experts * sizes.expert_weights
    return sizes.vocab_size * sizes.hidden_size + experts + sum(w.count for w in target_weights(sizes))


def active_parameters(sizes: V4Sizes) -> int:
    """Counts the parameters that multiply one token, so not the embedding."""
    experts = len(sizes.layer_ratios) * sizes.num_experts_per_tok * sizes.expert_weights
    return experts + sum(w.count for w in target_weights(sizes))


def checkpoint_bytes(sizes: V4Sizes) -> float:
    """Counts the bytes of the target with its MTP block and hash tables on disk."""
    layers = len(sizes.layer_ratios) + 1
    experts = layers * sizes.n_routed_experts * sizes.expert_weights * BYTES["fp4"]
    tables = sizes.num_hash_layers * sizes.vocab_size * sizes.num_experts_per_tok * BYTES["int64"]
    embedding = sizes.vocab_size * sizes.hidden_size * BYTES["bf16"]
    mtp = [w for w in mtp_weights(sizes) if w.part != "LM head"]
    return experts + tables + embedding + sum(w.bytes for w in [*target_weights(sizes), *mtp])
