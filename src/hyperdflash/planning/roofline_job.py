"""Roofline of DeepSeek-V4-Flash beside the tiny target's timings: roofline.md, .csv, .json and .png.

python -m src.roofline
python -m src.roofline gpu=b200 context=65536 batch=[1,8,64]
"""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hyperdflash.cli import entry_point
from hyperdflash.drafting.config import DrafterConfig
from hyperdflash.planning.roofline import GPU, Method, Setting
from hyperdflash.planning.roofline_tables import write_roofline
from hyperdflash.settings import one_of


def setting_of(config: DictConfig) -> Setting:
    """conf/roofline.yaml, checked."""
    if not OmegaConf.is_list(config.batch):
        raise ValueError(f"batch must be a list such as [1,8], got {config.batch!r}")
    drafter = instantiate(config.drafter)
    if not isinstance(drafter, DrafterConfig):
        raise ValueError("drafter must be a block drafter's sizes (drafter=paper); the MTP block's are the model's own")
    one_of("gpu", config.gpu, tuple(config.gpus))
    return Setting(
        model=config.model_name,
        sizes=instantiate(config.model, _convert_="all"),
        drafter=drafter,
        gpu=GPU(name=config.gpu, count=config.num_gpus, **config.gpus[config.gpu]),
        methods=tuple(Method(**method) for method in config.methods),
        source=config.source,
        batches=tuple(config.batch),
        context=config.context,
        max_tokens=config.max_tokens,
    )


@entry_point("roofline")
def main(config: DictConfig) -> None:
    setting, out = setting_of(config), Path(config.out)
    written = write_roofline(setting, out)
    print((out / "roofline.md").read_text())
    print(f"wrote {', '.join(map(str, written))}")
