"""The adapter of DeepSeek-V4. Another kind of target has a module with the same functions (hyperdflash.targets.adapter).

``path`` is a target's directory, ``model`` the result of `load_model`. A cache of `new_cache` holds B texts of one length:
``mark()`` before a step lets ``rewind(keep)`` after it return to the first ``keep`` of its tokens without a forward, and
``reorder_cache(rows)`` selects rows. `input_device` tells where token ids must be, `is_spread` whether the weights
are on several devices.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, PreTrainedModel
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
    DeepseekV4RotaryEmbedding,
)
from transformers.utils.logging import disable_progress_bar

import hyperdflash.targets.deepseek_v4.cpu_kernels  # noqa: F401  (registers "windowed" and "dense")
from hyperdflash.targets.adapter import Gate
from hyperdflash.targets.deepseek_v4 import compat
from hyperdflash.targets.deepseek_v4.checkpoint import Checkpoint, dtype_of
from hyperdflash.targets.deepseek_v4.compat import RewindableCache, input_device, is_spread
from hyperdflash.targets.deepseek_v4.mtp import MTPBlock, window_mask
from hyperdflash.targets.deepseek_v4.official import check_native_mtp, head_names, layer_names, mtp_state

__all__ = ["input_device", "is_spread"]

new_cache = RewindableCache
_window_mask = lru_cache(maxsize=256)(window_mask)
LAYER_SETTINGS = """
layer_types mlp_layer_types compress_rates sliding_window hc_mult hc_sinkhorn_iters hc_eps index_topk rms_norm_eps
num_experts_per_tok n_routed_experts routed_scaling_factor swiglu_limit rope_theta compress_rope_theta
"""
YARN_SETTINGS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")
COLUMNS = 512  # of a matrix, that the fingerprint reads
TABLES = ("embed_tokens.weight", "lm_head.weight")  # of TargetHeads, [V, D]


class HcHead(DeepseekV4HyperHead):
    def gate(self) -> Gate:
        return Gate(self.hc_fn, self.hc_base, self.hc_scale)


def read_config(path: Path) -> DeepseekV4Config:
    """Reads config.json in DeepSeek's spelling or in transformers' own."""
    values, _ = DeepseekV4Config.get_config_dict(path)
    real = {field.name for field in fields(DeepseekV4Config) if "float" in str(field.type)}  # 10 and 10.0 are one setting
    return DeepseekV4Config.from_dict({name: float(v) if name in real and type(v) is int else v for name, v in values.items()})


def layer_settings(config: DeepseekV4Config) -> list[tuple[str, object]]:
    """Returns the settings that change the layers' results, each in one spelling, for the fingerprint; YaRN's only if used."""
    values = {name: getattr(config, name, None) for name in LAYER_SETTINGS.split()}
    settings = [(name, dict(sorted(v.items())) if isinstance(v, dict) else v) for name, v in values.items()]
    rope = config.rope_parameters["compress"]
    if rope["rope_type"] != "default":
        settings += [(name, float(rope[name])) for name in YARN_SETTINGS if name in rope]
    return settings


def new_heads(config: DeepseekV4Config) -> tuple[HcHead, nn.Module]:
    """Makes the collapse and the final norm, without weights."""
    return HcHead(config), DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def head_state(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Reads the state of `TargetHeads`; the two [V, D] tables stay in bf16 if the checkpoint has them in bf16."""
    checkpoint, state = Checkpoint(path), {}
    for own, name in head_names(checkpoint).items():
        as_stored = own in TABLES and checkpoint.tensor(name).dtype == torch.bfloat16
        state[own] = checkpoint.weight(name, torch.bfloat16 if as_stored else dtype_of(own, dtype))
    return state


def weight_files(path: Path) -> dict[str, list[int]] | None:
    """Returns size in bytes and modification time (ns) of every shard by name; None unless the layers are there."""
    checkpoint = Checkpoint(path)
    files = checkpoint.files()
    return files if layer_names(checkpoint) and None not in files.values() else None


def layer_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields name and fp32 values of the layers' tensors; of a matrix, the first ``COLUMNS`` columns."""
    checkpoint = Checkpoint(path)
    return ((name, checkpoint.weight(name, torch.float32, COLUMNS)) for name in layer_names(checkpoint))


def load_model(
    path: Path, config: DeepseekV4Config, *, dtype: torch.dtype, attention: str, experts: str, device_map, offload_folder
) -> DeepseekV4ForCausalLM:
    """Loads the whole target and dequantizes it on reading."""
    if offload_folder is not None and dtype != torch.float32:
        raise ValueError(
            "target.offload_folder wants target.dtype=fp32, got bf16: transformers writes what it offloads in one dtype, "
            "and hyper-connections rounded to bf16 give other states"
        )
    compat.check_implementations(attention, experts)
    device_map = checked_device_map(device_map, config.num_hidden_layers)
    Checkpoint(path).check_complete()
    if quantized := getattr(config, "quantization_config", None):
        config.quantization_config = {**quantized, "dequantize": True}
    disable_progress_bar()  # its bar counts tensors, in the midst of ours
    try:
        model, found = DeepseekV4ForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, device_map=device_map, offload_folder=offload_folder, output_loading_info=True
        )
    except ValueError as error:
        if "offload_folder" not in str(error):
            raise
        raise ValueError(
            f"target.device_map={device_map} does not fit these devices and leaves part of the target for the disk: give more "
            "devices, or let a server run the target (target/engine)"
        ) from error
    if absent := sorted(found["missing_keys"]):  # transformers gives them random values
        raise ValueError(f"target.path={path} lacks {len(absent)} tensors, first {absent[0]}: complete the checkpoint")
    if quantized and dtype == torch.float32:  # transformers leaves tensors that are stored as BF16 in BF16
        model.float()
    compat.set_implementations(model.config, attention=attention, experts=experts)
    return model


def check_mtp(path: Path) -> None:
    check_native_mtp(Checkpoint(path))


def load_mtp(path: Path, config: DeepseekV4Config, *, experts: str, dtype: torch.dtype) -> MTPBlock:
    """Loads the MTP block with transformers' eager attention, since chains pass their own masks."""
    compat.set_implementations(config, attention="eager", experts=experts)
    with torch.device("meta"):
        mtp = MTPBlock(config)
    mtp.rotary_emb = DeepseekV4RotaryEmbedding(mtp.config)  # computed, not stored, and always fp32
    mtp.load_state_dict(mtp_state(Checkpoint(path), config.n_routed_experts, dtype), assign=True)
    return mtp


def parts(model: DeepseekV4ForCausalLM) -> tuple[nn.ModuleList, nn.Module, nn.Module]:
    """Returns layers, collapse (its input is the residual) and final norm."""
    return model.model.layers, model.model.hc_head, model.model.norm


def step(model: PreTrainedModel, input_ids: Tensor, cache: RewindableCache, length: int, last_only: bool = False) -> Tensor:
    """Runs the next tokens [B, K] of texts of which ``cache`` holds ``length`` tokens. Returns logits [B, K, V], or [B, 1, V]
    of the last token. On a filled cache transformers' forward gets our window mask."""
    options = compat.with_cache(cache)
    if length:
        window, dtype = model.config.sliding_window, model.model.embed_tokens.weight.dtype
        mask = _window_mask(min(length, window - 1), input_ids.shape[1], window, dtype, input_device(model))
        options["attention_mask"] = {"sliding_attention": mask.expand(len(input_ids), -1, -1, -1)}
    return model(input_ids, use_cache=True, logits_to_keep=int(last_only), **options).logits


def checked_device_map(device_map: str | Mapping[str, str | int] | None, num_layers: int) -> str | dict[str, str | int] | None:
    """Returns a device map for transformers, also for "even"; ValueError in a rank of a distributed run."""
    if device_map is None:
        return None
    if not isinstance(device_map, str | Mapping):
        raise ValueError(f"target.device_map must be even, auto or a mapping of modules to devices, got {device_map!r}")
    joined = dist.is_available() and dist.is_initialized()  # Slurm's ranks have no WORLD_SIZE
    ranks = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise ValueError(
            f"target.device_map={device_map} spreads the target over this machine's devices, and this process is one of "
            f"{ranks} training ranks that need them: run `python -m src.capture ...` with the same options first, as one "
            "process, and train from the cache"
        )
    if device_map == "even":
        return even_device_map(num_layers, torch.cuda.device_count())
    return device_map if isinstance(device_map, str) else dict(device_map)


def even_device_map(num_layers: int, num_gpus: int) -> dict[str, str | int]:
    """Places runs of neighboring layers of nearly equal length, the longer ones on the inner GPUs: the first GPU also has the
    embedding, the last the norm and the heads. transformers' "auto" reserves a tenth of every GPU and fills them in turn, which
    leaves layers of a target that barely fits (DeepSeek-V4-Flash in bf16 on 8 x 80 GB) on the CPU."""
    if num_gpus < 2:
        return {"": 0 if num_gpus else "cpu"}
    counts = [num_layers // num_gpus] * num_gpus
    for gpu in [*range(1, num_gpus - 1), 0, num_gpus - 1][: num_layers % num_gpus]:
        counts[gpu] += 1
    placed = [gpu for gpu, count in enumerate(counts) for _ in range(count)]
    first, last = 0, num_gpus - 1
    around = {"embed_tokens": first, "rotary_emb": first, "hc_head": last, "norm": last}
    return {
        **{f"model.{name}": gpu for name, gpu in around.items()},
        **{f"model.layers.{layer}": gpu for layer, gpu in enumerate(placed)},
        "lm_head": last,
    }
