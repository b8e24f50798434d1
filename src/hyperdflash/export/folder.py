"""A drafter's folder: written whole or not at all, checked when it is read, and data alone.

    model.safetensors    the trained tensors, under the format's names
    README.md            the model card
    config.json          written last: the format's keys, and under ``hyperdflash`` the description from which the loader builds
        {"format", "groups": {group: {"option", settings...} or null}, "mask_token_id", "states": the cache's dtype, "dtype",
         "target": {"fingerprint", "name"}, "sha256": of model.safetensors}

An option is a name of this package's conf/, looked up among its files; nothing in a folder names a class or a function.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hyperdflash.contracts import TargetStates
from hyperdflash.export.formats import GROUPS, NAMES, renamed
from hyperdflash.files import asset, read_json, sha256_of
from hyperdflash.identity import CONF, class_name
from hyperdflash.options import class_of
from hyperdflash.record import write_json
from hyperdflash.settings import one_of
from hyperdflash.states.codecs import CODECS
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.training.components import Parts
from hyperdflash.training.run_index import finished_run, load_weights

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def write_folder(
    folder: Path, to: str, config: Mapping[str, Any], state: Mapping[str, Tensor], card: str, check: Callable[[Path], None]
) -> None:
    """Writes tensors (own names), card and configuration, and runs ``check`` on the files before they appear as ``folder``."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        save_file({renamed(name, to): tensor.contiguous() for name, tensor in state.items()}, partial / WEIGHTS)
        (partial / CARD).write_text(card)
        described = {**config["hyperdflash"], "sha256": sha256_of(partial / WEIGHTS)}
        write_json(partial / CONFIG, {**config, "hyperdflash": described})
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes for this user alone, and a server may be another one
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        check(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the description, and the tensors by this project's names; ValueError for cut, changed or foreign files."""
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise ValueError(f"{folder} has no {CONFIG}, so its writing or copying was cut off: export or copy it again")
    described = read_json(folder / CONFIG, "export or copy it again").get("hyperdflash")
    if not isinstance(described, dict):
        raise ValueError(f"{folder} is not an export of this project ({CONFIG} has no `hyperdflash`): make one with src.export")
    if missing := {"format", "groups", "mask_token_id", "states", "target", "sha256"} - described.keys():
        raise ValueError(f"{folder / CONFIG} lacks hyperdflash.{min(missing)}: export the run again")
    one_of("format", described["format"], tuple(NAMES))
    one_of("states", described["states"], tuple(CODECS))
    weights = folder / WEIGHTS
    if not weights.exists() or sha256_of(weights) != described["sha256"]:
        raise ValueError(f"{weights} is missing or not the file that {CONFIG} was written for: export or copy it again")
    tensors = load_file(weights)
    return described, {renamed(name, described["format"], back=True): tensor for name, tensor in tensors.items()}


def is_exported(folder: str | Path) -> bool:
    """Tells whether ``folder`` holds an export, whole or not, rather than a run."""
    return any((Path(folder) / name).exists() for name in (WEIGHTS, CONFIG))


def named_target(source: str | Path, described: Mapping[str, Any] | None = None) -> str:
    """Returns the directory of the target that an export's description names; without one, that of the run ``source``."""
    decided = None if described else finished_run(source).record["decided_by"]
    name = described["target"]["name"] if decided is None else decided["target"]["path"]
    return asset(name.removeprefix("assets/")) if name.startswith("assets/") else name


def build_drafter(described: Mapping[str, Any], state: Mapping[str, Tensor], heads: TargetHeads, target: Mapping) -> nn.Module:
    """Builds the described drafter with the tensors ``state`` on ``heads``; ``target`` has path and experts, for a frozen MTP
    block. ValueError for an unknown option or setting, and for tensors of other names or shapes."""
    groups = {group: build_option(group, described["groups"].get(group)) for group in GROUPS}
    parts = Parts(target_config=heads.config, mask_token_id=described["mask_token_id"], objective=None, optim=None, **groups)
    module = parts.build(heads, OmegaConf.create(dict(target)), seed=0, mask_token_id=parts.mask_token_id)
    load_weights(module, state, "the folder")
    return module.eval().to(heads.embed_tokens.weight.device)


def build_option(group: str, settings: Mapping[str, Any] | None) -> object:
    """Makes the settings object of one group from plain values; ValueError for a name that is not among the package's own."""
    if settings is None:
        return None
    files = [OmegaConf.load(path) for path in sorted((Path(CONF) / group).glob("[!.]*.yaml"))]
    known = {class_name(file): file["_target_"] for file in files if "_target_" in file}
    values = dict(settings)
    one_of(f"{group}.option", values.pop("option", None), tuple(known))
    try:
        return class_of(known[settings["option"]])(**values)
    except TypeError as error:
        raise ValueError(f"{group}={settings['option']} has other settings than this version reads: {error}") from error


def same_logits(one: nn.Module, other: nn.Module, heads: TargetHeads, states: TargetStates) -> bool:
    """Tells whether two drafters give equal logits, bit for bit, in every slot of every anchor of ``states``."""
    anchors = torch.arange(1, states.input_ids.shape[1])[None].to(states.input_ids.device)
    with torch.no_grad():
        logits = [m.head.logits(m.slots(states, heads, anchors, anchors > 0), heads)[0, 0].dense() for m in (one, other)]
    return torch.equal(*logits)
