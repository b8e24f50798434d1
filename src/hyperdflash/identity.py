"""The identity of a training run: the options that decide its result, and the name and directory that follow from them. A run's
directory is a function of everything that decides its result, so the same command finds its own run again."""

import hashlib
import json
import pydoc
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hyperdflash.files import REFETCH, asset, portable, read_json, resource, runs_dir
from hyperdflash.options import check_targets

CONF = str(resource("conf"))
FLASH = str(resource("assets") / "deepseek_v4_flash")  # the released config.json alone
# Counts up when the same configuration trains to another result: a run of earlier code is then no run of this code.
RECIPE = 4
# What a method (conf/method) names.
METHOD = ("conditioning", "reducer", "inputs", "lead", "drafter", "head", "kl", "loss", "objective")
# Options that decide a run's result. Loggers, folders and options that only change the speed do not.
DECIDING = ("stage", "target", "corpus", "blocks", *METHOD, "optim", "trainer", "mode", "seed", "init_from", "cache.dtype")
# a dataset's identity adds engine
ENGINE = ("engine", "servers", "states_dir", "concurrency", "timeout_s", "attempts", "backoff_s")
ABSENT = (("max_steps", None), ("convolution", 0))  # settings that are as if the option did not exist
PERIODS = ("log_every_n_steps", "checkpoint_every_steps", "checkpoint_every_s")
NOT_DECIDING = {
    "target": ("device_map", "tokens_per_forward", *ENGINE),
    "corpus": ("directory", "benchmarks_path"),
    "drafter": ("gradient_checkpointing", "compile"),
    "trainer": ("accelerator", "strategy", "threads", "batch_size", *PERIODS),  # batch_size: optim.batch_size counts
}


def default_layer_ids(num_target_layers: int, num_taps: int) -> tuple[int, ...]:
    """Spreads ``num_taps`` layers evenly from 1 to num_target_layers - 3 (DFlash); puts a single tap in the middle. >>>
    default_layer_ids(43, 5) (1, 11, 20, 30, 40)"""
    if num_taps == 1:
        return (num_target_layers // 2,)
    first, last = 1, num_target_layers - 3
    if not 1 < num_taps <= last - first + 1:
        raise ValueError(
            f"num_taps must be in 1..{max(last, 1)} for a target of {num_target_layers} layers "
            f"(they are spread from layer 1 to {last}), got {num_taps}: give conditioning.layer_ids=[...]"
        )
    return tuple(round(first + i * (last - first) / (num_taps - 1)) for i in range(num_taps))


def layer_ids_of(folder: str | Path, num_taps: int) -> list[int] | None:
    """Applies the rule to the target in ``folder``; None without a config.json, which loading the target reports."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return None
    return list(default_layer_ids(read_json(path, REFETCH, "num_hidden_layers")["num_hidden_layers"], num_taps))


def within_runs(path: str | Path) -> str:
    """Returns ``path`` relative to the runs folder if it lies inside, so that the folder can move; else absolute."""
    path, runs = Path(path).resolve(), runs_dir().resolve()
    return str(path.relative_to(runs) if path.is_relative_to(runs) else path)


def config_folder(target_path: str) -> str:
    """Returns the folder of a target's config.json; for a missing DeepSeek-V4-Flash, the folder of the shipped config.json."""
    if (Path(target_path) / "config.json").exists():
        return target_path
    return FLASH if target_path == OmegaConf.load(Path(CONF) / "target" / "deepseek_v4_flash.yaml").path else target_path


def decided_by(config: DictConfig, *, resolve: bool = True) -> dict:
    """Returns the part of a training configuration that decides the run's result; a class appears by its option's name."""
    values = {"recipe": RECIPE}
    for name in DECIDING:
        value = OmegaConf.select(config, name, throw_on_missing=True)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=resolve)
            value = {k: v for k, v in value.items() if k not in NOT_DECIDING.get(name, ()) and (k, v) not in ABSENT}
        if name == "target":
            value["path"] = portable(value["path"])
        values[name] = _plain(value)
    for name, term in values["objective"]["terms"].items():  # a term that is a whole group points to it, resolved or not
        pointed = [f"${{{group}}}" for group in ("loss", "kl") if term == values[group]]
        values["objective"]["terms"][name] = pointed[0] if pointed else term
    if not reads_conditioning(config.drafter):
        values["conditioning"] = values["reducer"] = values["inputs"] = values["lead"] = None
    if config.init_from:
        values["init_from"] = within_runs(config.init_from)
    return values


def dataset_decided_by(config: DictConfig) -> dict:
    """Returns the part of a training configuration that decides its documents and states, but for the target's fingerprint. A
    run's name must be known without reading weights, so the fingerprint is in ``dataset_dir`` and in every checkpoint."""
    decided = {name: value for name, value in decided_by(config).items() if name in ("target", "corpus", "mode")}
    decided["target"] = {**decided["target"], "engine": config.target.get("engine")}
    decided["cache"] = {name: config.cache[name] for name in ("dtype", "documents_per_shard")}
    decided["seed"] = config.seed if config.corpus.temperature > 0 else 0  # of the answers
    return decided


def dataset_name(config: DictConfig) -> str:
    """Returns a readable head and a hash over ``dataset_decided_by``: streamed-stage1-non_think-bf16-1a2b3c4d."""
    corpus = class_name(config.corpus).removesuffix("_corpus")
    digest = _digest(dataset_decided_by(config))
    return f"{corpus}-stage{config.corpus.stage}-{config.mode}-{config.cache.dtype}-{digest}"


def dataset_dir(name: str, target_fingerprint: str) -> Path:
    return runs_dir() / "datasets" / f"{name}-{target_fingerprint[:8]}"


def run_name(config: DictConfig) -> str:
    """Returns a readable head and a hash over ``decided_by`` and the dataset: stage1-pre_hc_head-hc_gate-kl0.15-s0-1a2b3c4d."""
    digest = _digest({**decided_by(config), "dataset": dataset_name(config)})
    return "-".join([f"stage{config.stage}", *source_names(config), f"kl{_plain(config.kl.alpha)}", f"s{config.seed}", digest])


def train_run_dir(config: DictConfig) -> Path:
    return runs_dir() / "train" / run_name(config)


def source_names(config: DictConfig) -> list[str]:
    """Returns the names of conditioning and reducer, or the drafter's name if it reads neither."""
    if not reads_conditioning(config.drafter):
        return [class_name(config.drafter)]
    if "conditioning" not in config or "reducer" not in config:
        raise ValueError(
            f"drafter {class_name(config.drafter)} reads a conditioning through a reducer, and the method names none: give "
            "conditioning=NAME reducer=NAME, or another method"
        )
    return [class_name(config.conditioning), class_name(config.reducer)]


def reads_conditioning(drafter: DictConfig) -> bool:
    """Returns False if the drafter's configuration class says ``reads_conditioning = False``: it projects the states itself."""
    check_targets({"_target_": drafter._target_}, "drafter")
    try:
        return getattr(pydoc.locate(drafter._target_), "reads_conditioning", True)
    except pydoc.ErrorDuringImport:  # the training itself reports it
        return True


def class_name(group: DictConfig | dict) -> str:
    """Returns the short name of an option from its class: hyperdflash.drafting.reducers.hc_gate.HcGate -> hc_gate."""
    name = group["_target_"].rpartition(".")[2].removesuffix("Config")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def _plain(value: object) -> object:
    """Returns equal values in one form: 1.0 as 1, so that kl.alpha=0 and kl.alpha=0.0 are one run; a class of this project by
    its short name, so that it can move, and any other class by its whole path."""
    if isinstance(value, dict):
        path = value.get("_target_", "")
        own = {"option": class_name(value) if path.startswith("hyperdflash.") else path} if path else {}
        return own | {name: _plain(inner) for name, inner in value.items() if name != "_target_"}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# ${by_stage:8e-4,1e-4}: the first value in stage 1, the second in stage 2
OmegaConf.register_new_resolver("by_stage", lambda *values, _root_: values[_root_.stage == 2], replace=True)
# ${asset:tiny}: the shipped folder, from wherever the command runs
OmegaConf.register_new_resolver("asset", asset, replace=True)
OmegaConf.register_new_resolver("runs_dir", lambda: str(runs_dir()), replace=True)
# ${layer_ids:PATH,2}: of the target in PATH, as many as the drafter has layers
OmegaConf.register_new_resolver("layer_ids", lambda path, taps: layer_ids_of(config_folder(path), taps), replace=True)
