"""Finds the methods that an evaluation compares: the target's own MTP block, and drafters of finished training runs. An entry
of ``methods`` is a method's name (conf/method), whose run the index finds; a run's directory; or a mapping that gives a row its
own name: {name: ..., run: DIRECTORY} or {name: ..., native_steps: N}."""

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hydra import compose
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hyperdflash.cli import given_overrides
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.drafting.mtp_chain import MTPChain
from hyperdflash.drafting.proposer import Proposer
from hyperdflash.files import reading
from hyperdflash.identity import METHOD, decided_by, runs_dir
from hyperdflash.report.results import AS_SHIPPED
from hyperdflash.report.sweep_runs import flat
from hyperdflash.settings import positive_int
from hyperdflash.states.codecs import CODECS
from hyperdflash.targets.heads import TargetHeads
from hyperdflash.targets.load import fingerprint, load_mtp
from hyperdflash.training.components import Parts, make_parts
from hyperdflash.training.run_index import FinishedRun, RunIndex, finished_run, load_drafter_weights

NEEDED = ("stage", "seed", "recipe", "target.path", "drafter.option")  # beside a method's other parts, to be its run


@dataclass(frozen=True)
class Method:
    """A row of the tables: ``native_steps`` of the shipped MTP block, or a finished ``run`` with its ``parts`` and a digest of
    the ``data`` that it was trained on; ``option`` of conf/method that names it, if any."""

    name: str
    native_steps: int | None = None
    run: Path | None = None
    parts: Parts | None = None
    option: str | None = None
    data: str | None = None

    @property
    def run_id(self) -> str:
        return AS_SHIPPED if self.run is None else self.run.name

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return () if self.parts is None else self.parts.layer_ids

    def drafter(self, config: DictConfig, heads: TargetHeads) -> DraftModel:
        """Returns the drafter in eval mode on the heads' device."""
        if self.run is None:
            module = MTPChain(load_mtp(config.target.path, experts=config.target.experts), self.native_steps)
        else:
            module = self.parts.build(heads, config.target, seed=0)
            load_drafter_weights(module, self.run, fingerprint(heads))
        return module.eval().to(heads.embed_tokens.weight.device)

    def loop_drafter(self, config: DictConfig, heads: TargetHeads, module: DraftModel | None = None) -> Proposer:
        """Returns the proposer of ``module`` (by default a new drafter) for states of the cache's dtype."""
        module = self.drafter(config, heads) if module is None else module
        return module.proposer(heads, CODECS[config.cache.dtype])


def method_of_run(run: str | Path, target_path: str | Path) -> tuple[Method, DictConfig]:
    """Returns the method of a finished run and its configuration, from its folder alone; ValueError for an unfinished one."""
    found = finished_run(run)
    path = found.directory / "config.yaml"
    with reading(path, f"fetch it again, or remove {found.directory} and train the run again"):
        training = OmegaConf.load(path)
        training.target.path = str(target_path)
    parts = make_parts(training, trains=False)
    return Method(found.directory.name, run=found.directory, parts=parts, data=found.record.get("data")), training


def make_methods(config: DictConfig) -> list[Method]:
    """Returns every method of ``config.methods``, or the run in ``config.run``; loads no weights."""
    entries = [config.run] if config.run else config.methods
    if not entries:
        raise ValueError("methods=[] names nothing to measure: give methods such as [best,mtp], or a run")
    methods = [method for entry in entries for method in methods_of(entry, config)]
    if len({method.name for method in methods}) < len(methods):
        raise ValueError("two methods have one name: give each of `methods` its own, as in {name: NAME, run: DIRECTORY}")
    if note := data_note(methods):
        print(note, flush=True)
    return methods


def data_note(methods: Sequence[Method]) -> str:
    """Returns a sentence where runs were trained on different data, which then counts in their differences; else empty."""
    named = {method.name: method.data for method in methods if method.data}
    if len(set(named.values())) < 2:
        return ""
    runs = ", ".join(f"{name} on {data}" for name, data in named.items())
    return f"These runs were trained on different data, which counts in their differences: {runs}."


def methods_of(entry: str | DictConfig, config: DictConfig) -> list[Method]:
    """Returns the rows of one entry; a method that ships with the target has one per number of steps."""
    if OmegaConf.is_dict(entry):
        if set(entry) == {"name", "native_steps"}:
            return [Method(entry.name, native_steps=positive_int("native_steps", entry.native_steps))]
        if set(entry) == {"name", "run"}:
            return [replace(method_of_run(entry.run, config.target.path)[0], name=entry.name)]
        raise ValueError(f"a method is a name, a run's directory, {{name, run}} or {{name, native_steps}}, got {entry}")
    if Path(entry).is_dir():
        return [method_of_run(entry, config.target.path)[0]]
    defined = compose_method(entry, config.training)
    title, native_steps = (OmegaConf.select(defined, f"method.{key}") for key in ("title", "native_steps"))
    if native_steps:
        return [Method(f"{title} ({steps})", native_steps=steps, option=entry) for steps in native_steps]
    method = method_of_run(find_run(entry, defined, config).directory, config.target.path)[0]
    return [replace(method, name=f"{title or entry} ({method.parts.drafter.num_slots})", option=entry)]


def compose_method(name: str, words: str = "") -> DictConfig:
    """Composes ``python -m src.train method=NAME experiment=stage2 WORDS``; ValueError for an unknown method."""
    try:
        return compose("train", overrides=training_words(name, words))
    except MissingConfigException as error:
        if error.missing_cfg_file != f"method/{name}":
            raise
        raise ValueError(
            f"{name!r} is neither a run's directory nor a method; methods are {', '.join(error.options or ())}"
        ) from error


def training_words(name: str, words: str) -> list[str]:
    """Returns the words of a method's training command, with those of this command and of its ``training``."""
    own = shlex.split(words)
    stage = [] if any(word.startswith("experiment=") for word in own) else ["experiment=stage2"]
    return [*_given("hydra.searchpath="), f"method={name}", *stage, *own]


def stated_options(config: DictConfig) -> dict[str, object]:
    """Returns the options that decide a training, but for interpolations outside ``objective``, which follow from others."""
    decided = flat(decided_by(config, resolve=False))
    return {name: value for name, value in decided.items() if "${" not in str(value) or name.startswith("objective.")}


def find_run(name: str, defined: DictConfig, config: DictConfig) -> FinishedRun:
    """Finds the finished run of a method: same parts, stage, seed and target, and the nearest in all else. Prints what else
    differs. ValueError, one sentence, where there is none, and where two are equally near."""
    defined.target, defined.cache.dtype = config.target, config.cache.dtype
    defined.target.path = str(config.target.path)  # stated, even where it follows from the environment
    stated = wanted = stated_options(defined)
    left_open = flat(decided_by(defined, resolve=False)).keys() - stated.keys()
    with contextlib.suppress(OmegaConfBaseException):  # what follows from other options may not fit this target
        wanted, left_open = flat(decided_by(defined)) | stated, ()

    def needed(option: str) -> bool:
        part = option.partition(".")[0]
        return option in NEEDED or part == "objective" or (part in METHOD and part != "drafter" and option in stated)

    found = RunIndex().nearest(wanted, needed, left_open)
    if not found:
        words = shlex.join([*training_words(name, config.training), *_given("target", "cache")])
        raise ValueError(
            f"method {name!r} has no finished run in {runs_dir() / 'train'}: run `python -m src.train {words}` first, or leave "
            "it out of `methods`"
        )
    run, differing = found[0]
    equal = [other.directory.name for other, its in found if len(its) == len(differing)]
    if len(equal) > 1:
        raise ValueError(
            f"method {name!r} has {len(equal)} finished runs that fit alike, {', '.join(equal)}: give one's directory in "
            "`methods`, or an option in which they differ in `training`"
        )
    if differing or len(found) > 1:
        print(f"{name}: takes {run.directory}, the nearest of {len(found)} runs")
    for option, (value, asked) in differing.items():
        print(f"  differs in {option}: the run has {value}, `python -m src.train method={name}` would take {asked}")
    return run


def baseline_of(config: DictConfig, methods: Sequence[Method]) -> str:
    """Returns the baseline's row: ``config.baseline`` (a row's or a method's name), or vanilla DFlash, or the first."""
    wanted = config.baseline or "dflash"
    for method in methods:
        if wanted in (method.name, method.option):
            return method.name
    if config.baseline:
        raise ValueError(f"baseline={wanted!r} is not among the methods: {', '.join(m.name for m in methods)}")
    return methods[0].name


def _given(*names: str) -> list[str]:
    return [override for override in given_overrides() if override.startswith(names)]
