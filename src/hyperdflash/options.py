"""The one door through which a ``_target_`` of a configuration becomes an object.

A configuration may be somebody else's, such as that of a run's folder. So a class or function is imported and called only if an
option file names it: a file of conf/, or of a folder of ``hydra.searchpath`` that the user of this process gives.
"""

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra import utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hyperdflash.files import resource

accepted: set[str] = {str(resource("conf"))}  # folders of option files


def accept(*folders: str | Path) -> None:
    """Accepts the parts that option files below ``folders`` name, as hydra.searchpath does on a command line."""
    accepted.update(map(str, folders))


def own_folders(hydra: DictConfig) -> list[str]:
    """Returns the folders of option files that a command line gives, by hydra.searchpath or --config-dir."""
    sources = [s for s in hydra.runtime.config_sources if s.provider not in ("hydra", "main") and s.schema in ("file", "pkg")]
    return [str(files(source.path)) if source.schema == "pkg" else source.path for source in sources]


def instantiate(group: DictConfig | dict | None, **others: object) -> Any:
    """Returns the object that ``group`` describes (None: None); ValueError as `check_targets`, before anything is called."""
    check_targets(OmegaConf.to_container(group, resolve=True) if OmegaConf.is_config(group) else group)
    return utils.instantiate(group, **others)


def check_targets(value: object) -> None:
    """Raises ValueError for a ``_target_`` at any depth of dicts and lists that no option file names; imports nothing."""
    if isinstance(value, dict) and "_target_" in value:
        target, given = value["_target_"], own_folders(HydraConfig.get()) if HydraConfig.initialized() else []
        if not any(target in _named_in(folder) for folder in (*accepted, *given)):
            raise ValueError(
                f"_target_={target} is no part that an option file names, and is not called: if it is your own, give the "
                "folder of its option file, as in 'hydra.searchpath=[file://my_conf]'"
            )
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        check_targets(inner)


@cache
def _named_in(folder: str) -> frozenset[str]:
    named = re.compile(r"""_target_["']?: *["']?([\w.]+)""")
    return frozenset(name for path in Path(folder).rglob("*.yaml") for name in named.findall(path.read_text()))
