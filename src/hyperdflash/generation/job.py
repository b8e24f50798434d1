"""The command that answers one prompt with a drafter and shows its drafts round by round.

python -m src.generate prompt="Write a function that adds two numbers."                       drafts of the native MTP block
python -m src.generate prompt="..." run=runs/train/<run> temperature=1 max_new_tokens=256     a trained drafter
python -m src.generate prompt="..." method=ar                                                 plain decoding
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from hyperdflash.cli import entry_point
from hyperdflash.contracts import Conversation, Turn
from hyperdflash.generation.api import Answer, answer_of, generate_stream, load_drafter, tokenizer_of
from hyperdflash.generation.display import RoundPrinter, summary_line
from hyperdflash.identity import runs_dir
from hyperdflash.settings import natural_int, positive_int
from hyperdflash.targets.load import Target


def newest_run(target: Target, method: str = "hyperdflash") -> Path:
    """Returns the newest finished run of ``method`` (conf/method) on this target's weights, from the latest stage; its loss may
    differ from the method's. ValueError without such a run."""
    from hyperdflash.evaluation.methods import compose_method, stated_options
    from hyperdflash.training.run_index import RunIndex

    stated = stated_options(compose_method(method))
    needed = {n: v for n, v in stated.items() if n.partition(".")[0] in ("conditioning", "reducer") or n == "drafter.option"}
    fitting = [run for run in RunIndex() if run.record["target"] == target.fingerprint and run.agrees(needed)]
    if not fitting:
        raise ValueError(
            f"method={method} has no finished run on this target in {runs_dir() / 'train'}: run "
            f"`python -m src.train method={method} experiment=stage1` first, or give run=<directory> or method=mtp"
        )
    return max(fitting, key=lambda run: (run.decided["stage"], run.finished_s)).directory


def answer_prompt(config: DictConfig, console: Console) -> Answer:
    """Loads target and drafter, generates, and shows each round as it ends."""
    from hydra.utils import instantiate

    method = config.drafted_by or ("hyperdflash" if config.run else "mtp")
    if OmegaConf.is_missing(config, "prompt"):
        raise ValueError("there is no prompt: give one, as in prompt='How many days are there in 3 weeks?'")
    if config.run and config.drafted_by not in (None, "hyperdflash"):
        raise ValueError(f"run={config.run} brings its own drafter, method={method} another: leave one of them out")
    for name in ("num_slots", "max_new_tokens", "threads"):
        positive_int(name, config[name])
    natural_int("seed", config.seed)
    turns = ([Turn("system", str(config.system))] if config.system else []) + [Turn("user", str(config.prompt))]
    torch.set_num_threads(config.threads)
    target: Target = instantiate(config.target)
    source = config.run or (method if method in ("mtp", "ar") else newest_run(target, method))
    drafter = load_drafter(source, target, num_slots=config.num_slots)
    plain = dict(style="dim", markup=False, highlight=False, soft_wrap=True)
    console.print(f"target {config.target.path}, drafter {source}, temperature {config.temperature}", **plain)
    printer = RoundPrinter(tokenizer_of(target.path), console, show_rejected=config.show_rejected)
    pieces = []
    for piece in generate_stream(
        target,
        drafter,
        Conversation("prompt", "chat", tuple(turns)),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        mode=config.mode,
        synchronize=True,
    ):
        printer.show(piece.event)
        pieces.append(piece)
    printer.end()
    answer = answer_of(pieces, target)
    console.print(summary_line(answer.generation), **plain)
    return answer


def quoted(argument: str) -> str:
    """Quotes the text of ``prompt=`` and ``system=`` for Hydra, whose grammar gives commas and brackets a meaning."""
    name, sign, text = argument.partition("=")
    if name not in ("prompt", "system") or not sign or text == "null" or re.fullmatch(r"(['\"]).*\1", text, re.DOTALL):
        return argument
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    text = re.sub(r"(\\+)$", r"\1\1", text).replace("${", "\\${")
    return f"{name}='{text}'"


@entry_point("generate")
def run_command(config: DictConfig) -> None:
    answer_prompt(config, Console())


def main() -> None:
    # Hydra would read method=NAME as an option of the group conf/method, which this command does not have
    sys.argv[1:] = [quoted(re.sub("^method=", "drafted_by=", argument)) for argument in sys.argv[1:]]
    run_command()
