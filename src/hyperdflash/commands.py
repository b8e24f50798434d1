"""The commands: `hyperdflash train ...` where the project is installed, `python -m src.train ...` in the repository. A command
imports what it runs when it runs, so that help comes within a second."""

import os
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from hyperdflash.cli import CONSOLE, entry_point, exit_code
from hyperdflash.export.formats import FORMATS
from hyperdflash.files import resource
from hyperdflash.identity import class_name
from hyperdflash.settings import MOST_RESAMPLES, check_sampling, natural_int, one_of, positive_int

# task -> command -> (module:function, what it does)
COMMANDS = {
    "train": {
        "train": ("hyperdflash.commands:train", "train a drafter"),
        "plan": ("hyperdflash.commands:plan", "say what a training takes in time, disk and memory"),
        "report": ("hyperdflash.evaluation.report_job:main", "write tables, figures and one page of a sweep"),
        "dashboard": ("hyperdflash.commands:dashboard", "make a W&B workspace for a project's runs"),
    },
    "measure": {
        "evaluate": ("hyperdflash.commands:evaluate", "measure accepted length and speed of methods"),
        "parity": ("hyperdflash.commands:parity", "check that training, replay and decoding agree"),
        "roofline": ("hyperdflash.commands:roofline", "compute what verification costs on the real target"),
        "table1": ("hyperdflash.commands:table1", "print the paper's Table 1 from real modules"),
    },
    "serve": {
        "generate": ("hyperdflash.commands:generate", "decode a prompt with a drafter, drafts in color"),
        "export": ("hyperdflash.commands:export", "write a trained drafter for an engine or for the Hub"),
        "check_engine": ("hyperdflash.commands:check_engine", "compare the states of a serving engine with the target's"),
    },
    "data": {
        "capture": ("hyperdflash.commands:capture", "write the target states that a training reads"),
        "regenerate": ("hyperdflash.commands:regenerate", "replace a corpus's answers by the target's own"),
        "fetch_benchmarks": ("hyperdflash.data.benchmark_rows:main", "write the benchmarks' prompts into a folder"),
    },
    "target": {
        "pretrain": ("tiny_target.commands:pretrain", "train a tiny DeepSeek-V4 target"),
        "card": ("tiny_target.commands:card", "measure a tiny target and write its model card"),
    },
}


def main() -> object:
    """The console script: runs one command, or lists all of them."""
    commands = {name: place for group in COMMANDS.values() for name, (place, _) in group.items()}
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name == "-sc":
        return complete(list(commands), sys.argv[2:])
    if name not in commands:
        meant = "".join(f" (did you mean {other}?)" for other in get_close_matches(name, commands, n=1))
        return f"error: no command {name!r}{meant}; there are {', '.join(commands)}: run `hyperdflash` to see what each does"
    os.environ[CONSOLE] = "1"
    sys.argv = [f"hyperdflash {name}", *sys.argv[2:]]
    return exit_code(lambda: function_of(commands[name])())


def complete(names: list[str], words: list[str]) -> int:
    """Serves Hydra's shell completion of `hyperdflash COMMAND ...`: prints what may stand next, or the script to install."""
    typed = re.match(r"\s*\S+\s+(\S+)(\s.*)$", os.environ.get("COMP_LINE", ""))
    if words[0].startswith("query=") and not typed:
        print(" ".join(names))
        return 0
    name = typed[1] if typed else "train"
    if typed:
        os.environ["COMP_LINE"] = f"hyperdflash{typed[2]}"
    if (resource("conf") / f"{name}.yaml").exists() or name in ("capture", "report"):  # these read the options of train
        entry_point("train" if name in ("capture", "report") else name)(lambda config: None)()
    return 0


def overview() -> str:
    lines = ["usage: hyperdflash COMMAND [OPTION=VALUE ...]    hyperdflash COMMAND --help lists a command's options"]
    lines.append("""tab completion: eval "$(hyperdflash -sc install=bash)\"""")
    for task, group in COMMANDS.items():
        lines += ["", task, *(f"  {name:<17} {line}" for name, (_, line) in group.items())]
    return "\n".join(lines)


def function_of(place: str) -> Callable:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)


def runs(config_name: str, place: str) -> Callable:
    """Returns the command that calls the function at ``place`` with the configuration ``config_name``."""
    return entry_point(config_name)(lambda config: function_of(place)(config))


@entry_point("train")
def train(config: DictConfig) -> float:
    """Returns the best validation tau, which a sweeper such as Optuna maximizes."""
    if OmegaConf.select(config, "method.native_steps"):
        raise ValueError("method=mtp is the target's block as shipped: nothing to train; method=mtp_finetuned fine-tunes it")
    return function_of("hyperdflash.training.job:train")(config)["val_tau"]


@entry_point("evaluate")
def evaluate(config: DictConfig) -> None:
    """By exact replay, by decoding, or in running servers."""
    one_of("by", config.by, ("replay", "decoding", None))
    if not OmegaConf.is_list(config.temperature) or not config.temperature:
        raise ValueError(f"temperature must be a list such as [0,1], got {config.temperature!r}")
    for temperature in config.temperature:
        check_sampling(temperature, config.top_p)
    positive_int("num_resamples", config.num_resamples, MOST_RESAMPLES)
    if config.engine.name is not None:
        if config.by is not None:
            raise ValueError(f"engine={config.engine.name} asks running servers: leave by={config.by} out, or engine")
        place = "engine_evaluation:evaluate_in_engine"
    elif config.by == "decoding" or (config.by is None and class_name(config.benchmarks) == "paper_benchmarks"):
        place = "decoding:evaluate_by_decoding"
    else:
        place = "evaluation:evaluate_by_replay"
    if config.stop != [0] and not place.startswith("decoding:"):
        raise ValueError(f"stop={config.stop} ends drafts in the loop alone: leave it out, or add by=decoding")
    function_of(f"hyperdflash.evaluation.{place}")(config)


@entry_point("generate")
def answer(config: DictConfig) -> None:
    """One prompt, or, on a terminal, a chat."""
    if OmegaConf.is_missing(config, "prompt") and not sys.stdin.isatty():
        raise ValueError("there is no prompt: give one, as in prompt='How many days are there in 3 weeks?'")
    if config.run and config.drafted_by not in (None, "hyperdflash"):
        raise ValueError(f"run={config.run} brings its own drafter, method={config.drafted_by} another: leave one of them out")
    for name in ("num_slots", "max_new_tokens", "threads"):
        positive_int(name, config[name])
    natural_int("seed", config.seed)
    check_sampling(config.temperature, config.top_p)
    function_of("hyperdflash.generation.job:generate")(config)


def generate() -> None:
    # Hydra would read method=NAME as an option of the group conf/method, which this command does not have
    sys.argv[1:] = [quoted(re.sub("^method=", "drafted_by=", argument)) for argument in sys.argv[1:]]
    answer()


def quoted(argument: str) -> str:
    """Quotes the text of ``prompt=`` and ``system=`` for Hydra, whose grammar gives commas and brackets a meaning."""
    name, sign, text = argument.partition("=")
    if name not in ("prompt", "system") or not sign or text == "null" or re.fullmatch(r"(['\"]).*\1", text, re.DOTALL):
        return argument
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    text = re.sub(r"(\\+)$", r"\1\1", text).replace("${", "\\${")
    return f"{name}='{text}'"


@entry_point("export")
def export(config: DictConfig) -> None:
    """Into a new folder."""
    for name in ("run", "to", "out"):
        if OmegaConf.is_missing(config, name):
            raise ValueError(
                f"there is no {name}: `python -m src.export run=DIR to=FORMAT out=DIR`, FORMAT {' or '.join(FORMATS)}"
            )
    one_of("to", config.to, FORMATS)
    if (out := Path(config.out)).exists() or out.is_symlink():
        raise ValueError(f"out={config.out} is there already: remove it, or give another folder")
    function_of("hyperdflash.export.job:export")(config)


def table1() -> None:
    about = "Prints the paper's Table 1 from real modules of DeepSeek-V4-Flash's sizes."
    ArgumentParser(prog="python -m src.table1", description=about).parse_args()
    function_of("hyperdflash.drafting.table1:main")()


capture = runs("train", "hyperdflash.preparing.dataset:capture_states")
regenerate = runs("regenerate", "hyperdflash.preparing.regeneration:regenerate")
parity = runs("parity", "hyperdflash.checks.parity_job:check_parity")
plan = runs("plan", "hyperdflash.planning.plan_job:write_plan")
roofline = runs("roofline", "hyperdflash.planning.roofline_job:write_roofline")
check_engine = runs("check_engine", "hyperdflash.checks.engine_states:check_engine")
dashboard = runs("dashboard", "hyperdflash.training.wandb_dashboard:make_dashboard")
