"""The one door through which a ``_target_`` of a configuration becomes an object, and the check of a configuration's keys.

A configuration may be somebody else's, such as that of a run's folder. So a class or function is imported and called only if an
option file names it: a file of its group in conf/, or of a folder of ``hydra.searchpath`` that the user of this process gives.
"""

import ast
import inspect
import re
from collections import defaultdict
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra import utils
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hyperdflash import settings
from hyperdflash.files import resource
from hyperdflash.settings import boolean, natural_int, no_option, one_of, positive_int, positive_number

CONF = resource("conf")
WANDB_MODES = ("auto", "online", "offline", "off")
OPEN = ("gpus", "model")  # dicts with keys of the user's
accepted: set[str] = set()  # folders of the user's own option files


def accept(*folders: str | Path) -> None:
    """Accepts the parts that option files below ``folders`` name, as hydra.searchpath does on a command line."""
    accepted.update(map(str, folders))


def own_folders(hydra: DictConfig) -> list[str]:
    """Returns the folders of option files that a command line gives, by hydra.searchpath or --config-dir."""
    sources = [s for s in hydra.runtime.config_sources if s.provider not in ("hydra", "main") and s.schema in ("file", "pkg")]
    return [str(files(source.path)) if source.schema == "pkg" else source.path for source in sources]


def instantiate(group: DictConfig | dict | None, **others: object) -> Any:
    """Returns the object that ``group`` describes (None: None); ValueError as `check_targets`, before anything is called."""
    is_config = OmegaConf.is_config(group)
    if group is not None and "_target_" not in group:
        name = group._key() if is_config else "a part"
        raise ValueError(f"{name}={group} names no class: choose an option of conf/{name} first, as in {name}=NAME")
    check_targets(OmegaConf.to_container(group, resolve=True) if is_config else group, str(group._key()) if is_config else "")
    return utils.instantiate(group, **others)


def class_of(target: str) -> Any:
    """Returns the class or function of that path; ValueError as `check_targets`."""
    check_targets({"_target_": target})
    return utils.get_object(target)


def check_targets(value: object, group: str = "") -> None:
    """Raises ValueError for a ``_target_`` at any depth of dicts and lists that no option file names; imports nothing. That of
    ``group`` itself must be a choice of the group, where conf/ has such a folder."""
    if isinstance(value, dict) and "_target_" in value:
        target, given = value["_target_"], own_folders(HydraConfig.get()) if HydraConfig.initialized() else []
        own = CONF / group if (CONF / group).is_dir() else CONF
        if not any(target in _named_in(folder) for folder in (str(own), *accepted, *given)):
            raise ValueError(
                f"_target_={target} is no part that an option file names, and is not called: if it is your own, give the "
                "folder of its option file, as in 'hydra.searchpath=[file://my_conf]'"
            )
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        check_targets(inner)


def check_values(config: DictConfig) -> None:
    """Raises the ValueError that a part of this project would raise for its values, without importing the part: that takes
    seconds. Runs the part's ``__post_init__`` alone; what needs more of its module is left to the part itself."""
    if {"trainer", "logger"} <= config.keys():
        check_training(config)
    for group in (config[name] for name in config if not OmegaConf.is_missing(config, name)):
        module, _, name = group.get("_target_", "").rpartition(".") if OmegaConf.is_dict(group) else ("", "", "")
        _run_checks(module, name, OmegaConf.to_container(group, resolve=True) if name else {})


def check_training(config: DictConfig) -> None:
    """Raises ValueError for a wrong seed, or a wrong option of the groups trainer and logger, which have no class."""
    trainer, logger = config.trainer, config.logger
    natural_int("seed", config.seed)
    one_of("logger.wandb", logger.wandb, WANDB_MODES)
    for name in ("csv", "curves", "tensorboard", "artifacts"):
        boolean(f"logger.{name}", logger[name])
    one_of("trainer.precision", trainer.precision, ("32-true", "64-true", "bf16-mixed"))
    for name in ("max_epochs", "accumulate_grad_batches", "num_nodes", "log_every_n_steps"):
        positive_int(f"trainer.{name}", trainer[name])
    share = not isinstance(trainer.val_check_interval, int)
    (positive_number if share else positive_int)("trainer.val_check_interval", trainer.val_check_interval)
    for name in ("checkpoint_every_steps", "max_steps", "threads"):
        if trainer[name] is not None:
            positive_int(f"trainer.{name}", trainer[name])
    for name in ("gradient_clip_val", "checkpoint_every_s"):
        if trainer[name] is not None:
            positive_number(f"trainer.{name}", trainer[name])


def _run_checks(module: str, name: str, values: dict) -> None:
    """Runs the checks of class ``name`` of a module, those of its bases first."""
    own, found = module.startswith(("hyperdflash.", "tiny_target.")), None
    with suppress(ModuleNotFoundError):
        found = find_spec(module) if own else None
    if found is None:
        return
    body = ast.parse(Path(found.origin).read_text()).body
    places = {alias.name: node.module for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    known = {**vars(settings), **_literals(body)}
    for part in (node for node in body if isinstance(node, ast.ClassDef) and node.name == name):
        values = {**_literals(part.body), **values}
        for base in (base.id for base in part.bases if isinstance(base, ast.Name)):
            _run_checks(places.get(base, module), base, values)
        for check in (node for node in part.body if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"):
            check.body = [node for node in check.body if ast.unparse(node) != "super().__post_init__()"] or [ast.Pass()]
            exec(compile(ast.fix_missing_locations(ast.Module([check], [])), name, "exec"), known)
            try:
                known["__post_init__"](SimpleNamespace(**values))
            except ValueError:
                raise
            except Exception:  # it reads a name of its module
                return


def _literals(body: list[ast.stmt]) -> dict[str, object]:
    """Returns the constants and defaults that the statements of a module or class give as literals."""
    found = {}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        with suppress(ValueError, AttributeError, TypeError):
            found |= {target.id: ast.literal_eval(node.value) for target in targets}
    return found


@cache
def _named_in(folder: str) -> frozenset[str]:
    found = filter(Path.is_file, Path(folder).rglob("[!.]*.yaml"))
    named = re.compile(r"""_target_["']?: *["']?([\w.]+)""")
    return frozenset(name for path in found for name in named.findall(path.read_text(errors="replace")))


def check_keys(config: DictConfig, hydra: DictConfig) -> None:
    """Raises ValueError for a key of a command's configuration, or of one of its groups, that nothing reads. A group takes the
    keys of its option files in conf/ and the arguments of its class. ``hydra`` is the command's own; without "+" and option
    files of the user's, Hydra itself has refused any other key."""
    for word in hydra.overrides.hydra:
        place, node = "hydra.", hydra
        for name in word.lstrip("+").partition("=")[0].split(".")[1:]:
            if is_dataclass(kind := OmegaConf.get_type(node)) and name not in (names := [f.name for f in fields(kind)]):
                raise ValueError(no_option(place, name, names))
            place, node = f"{place}{name}.", OmegaConf.is_dict(node) and node._get_node(name)
    if absent := [folder for folder in own_folders(hydra) if not Path(folder).is_dir()]:
        raise ValueError(f"hydra.searchpath names {absent[0]}, and no folder of option files is there: give its path")
    if not own_folders(hydra) and not any(word.startswith("+") for word in hydra.overrides.task):
        return
    groups = {choice.partition("/")[0] for choice in hydra.runtime.choices if not choice.startswith("hydra/")}
    known = _known_keys(hydra.job.config_name, frozenset(groups))
    for name, node in config.items_ex(resolve=False):
        if name not in known[""]:
            raise ValueError(no_option("", name, known[""]))
        is_dict = isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation())
        keys = set(node) if is_dict and name not in ("hydra", *OPEN) else set()
        if keys - known[name]:
            allowed = known[name] | (_arguments(node._target_) if "_target_" in keys else set())
            if unknown := sorted(keys - allowed) if "" not in allowed else ():
                raise ValueError(no_option(f"{name}.", unknown[0], allowed - {"_target_", "_convert_"}))


@cache
def _known_keys(command: str, groups: frozenset[str]) -> defaultdict[str, set[str]]:
    """Returns the keys of the files of conf/ per group; "" has those of the command."""
    known: defaultdict[str, set[str]] = defaultdict(set)

    def add(path: Path, group: str) -> None:
        content = OmegaConf.to_container(OmegaConf.load(path))
        for default in content.pop("defaults", ()):
            if not group and isinstance(default, str) and default != "_self_":
                add(CONF / f"{default}.yaml", "")
        if group and "@package _global_" not in path.read_text():
            content = {group: content}
        for name, inner in content.items():
            known[""].add(name)
            known[name].update(inner if isinstance(inner, dict) else ())

    add(CONF / f"{command}.yaml", "")
    for group in groups:
        for path in (CONF / group).rglob("[!.]*.yaml"):
            add(path, group)
    return known


def _arguments(target: str) -> set[str]:
    """Returns the names of the arguments of a class or function; "" stands for any name, of a user's own."""
    found = inspect.signature(class_of(target)).parameters.values()
    free = any(p.kind is p.VAR_KEYWORD for p in found) and not target.startswith("hyperdflash.")
    return {p.name for p in found} | ({""} if free else set())
