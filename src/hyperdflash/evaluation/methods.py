"""The methods that an evaluation compares: the target's own MTP block, and the drafters of finished training runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from hyperdflash.cli import CONF, given_overrides, train_run_dir
from hyperdflash.decoding.proposers import LoopDrafter, loop_drafter
from hyperdflash.decoding.replay import ReplayDrafter
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.settings import positive_int
from hyperdflash.states.codecs import CODECS
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import fingerprint, load_mtp
from hyperdflash.training.components import Parts, make_parts
from hyperdflash.training.warm_start import best_checkpoint, load_drafter_weights


@dataclass(frozen=True)
class Method:
    """A name and what made it: ``native_steps`` of the shipped MTP block, or a finished ``run`` with its ``parts``."""

    name: str
    native_steps: int | None = None
    run: Path | None = None
    parts: Parts | None = None

    @property
    def run_id(self) -> str:
        return "as shipped" if self.run is None else self.run.name

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return () if self.parts is None else self.parts.layer_ids

    def drafter(self, config: DictConfig, heads: TargetHeads) -> ReplayDrafter:
        """Ready to draft, in eval mode, on the heads' device."""
        if self.run is None:
            module = MTPChain(load_mtp(config.target.path, experts=config.target.experts), self.native_steps)
        else:
            module = self.parts.build(heads, config.target, seed=0)
            load_drafter_weights(module, self.run, fingerprint(heads))
        return module.eval().to(heads.lm_head.weight.device)

    def loop_drafter(self, config: DictConfig, heads: TargetHeads, module: ReplayDrafter | None = None) -> LoopDrafter:
        """The form of ``drafter`` that decoding takes, on states of the cache's dtype; ``module`` where it is made already."""
        module = self.drafter(config, heads) if module is None else module
        return loop_drafter(module, heads, CODECS[config.cache.dtype])


def method_of_run(run: str | Path, target_path: str | Path) -> tuple[Method, DictConfig]:
    """The drafter of a finished training run and the run's configuration; ValueError where it is not finished."""
    run = Path(run)
    best_checkpoint(run)
    training = OmegaConf.load(run / "config.yaml")
    training.target.path = str(target_path)
    # how it was trained does not matter any more; a run older than one of the trainer's options lacks it
    training.trainer = OmegaConf.merge(OmegaConf.load(Path(CONF) / "trainer" / "cpu.yaml"), training.trainer)
    return Method(run.name, run=run, parts=make_parts(training)), training


def make_methods(config: DictConfig) -> list[Method]:
    """Every method checked before anything is loaded: its run must exist."""
    methods = []
    for entry in config.methods:
        unknown = set(entry) - {"name", "native_steps", "train"}
        if unknown or ("native_steps" in entry) == ("train" in entry):
            raise ValueError(
                f"a method has a name and either native_steps or train, got {OmegaConf.to_container(entry)}: mend `methods`"
            )
        if "native_steps" in entry:
            methods.append(Method(entry.name, native_steps=positive_int("native_steps", entry.native_steps)))
            continue
        overrides = _merged([*_given("hydra.searchpath="), *shlex.split(config.training)], entry.train)
        training = compose(config_name="train", overrides=overrides, return_hydra_config=False)
        training.target, training.cache = config.target, config.cache
        run = train_run_dir(training)
        if not (run / "result.json").exists():
            raise ValueError(
                f"{entry.name!r} has no finished run {run}: run "
                f"`python -m src.train {shlex.join([*overrides, *_given('target', 'cache')])}` first, "
                "or leave the method out of `methods`"
            )
        methods.append(Method(entry.name, run=run, parts=make_parts(training)))
    if len({method.name for method in methods}) < len(methods):
        raise ValueError("two methods have one name: give each of `methods` its own")
    if config.baseline not in {method.name for method in methods}:
        raise ValueError(f"baseline={config.baseline!r} is not among the methods: {', '.join(m.name for m in methods)}")
    return methods


def _merged(common: Sequence[str], own: Sequence[str]) -> list[str]:
    """Overrides of every method's training, then a method's own, which win."""
    named = {override.partition("=")[0] for override in own}
    return [*(override for override in common if override.partition("=")[0] not in named), *own]


def _given(*names: str) -> list[str]:
    """The evaluation's own overrides that a training needs too: those that begin with one of ``names``."""
    return [override for override in given_overrides() if override.startswith(names)]
