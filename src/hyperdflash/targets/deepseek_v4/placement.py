"""Places a target on several devices of one process (transformers' ``device_map``, which needs accelerate).

The process that loads it owns all the devices, so it cannot be one of several training ranks.
"""

import os
from collections.abc import Mapping

import torch
import torch.distributed as dist


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
