"""Write an answer with a drafter: losslessly, the target's own greedy or sampled text, some tokens a round.

python -m src.generate prompt="Write a function that adds two numbers."                       drafts of the native MTP block
python -m src.generate prompt="..." run=runs/train/<run> temperature=1 max_new_tokens=256     of a trained drafter
python -m src.generate prompt="..." method=ar                                                  plain decoding

From Python:

    target = load_target(path="assets/tiny", dtype="fp32", attention="windowed", experts="dense")   # hyperdflash.targets.load
    drafter = load_drafter("runs/train/<run>", target)
    answer = generate(target, drafter, "Write a function that adds two numbers.")
    for piece in generate_stream(target, drafter, "..."): print(piece.text, end="")
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from hyperdflash.cli import entry_point, runs_dir
from hyperdflash.contracts import Conversation, Turn
from hyperdflash.data.chat import encode_prompt
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.display import RoundPrinter, TextStream, summary_line
from hyperdflash.decoding.loop import FirstToken, Generation, Round, collect, speculate
from hyperdflash.decoding.proposers import Autoregressive, LoopDrafter, MTPDrafter
from hyperdflash.settings import natural_int, one_of, positive_int
from hyperdflash.targets.load import Target
from hyperdflash.targets.sampling import Sampler
from hyperdflash.targets.session import TargetSession

tokenizer_of = lru_cache(maxsize=4)(load_tokenizer)


@dataclass(frozen=True)
class Piece:
    """What one event added: its ``text`` (complete characters, control tokens left out) and the event itself."""

    text: str
    event: FirstToken | Round


@dataclass(frozen=True)
class Answer:
    """``text`` without control tokens; ``generation`` its tokens, rounds and times."""

    text: str
    generation: Generation


def load_drafter(source: str | Path, target: Target, *, num_slots: int = 6) -> LoopDrafter:
    """``"ar"``, ``"mtp"`` (the target's own block, ``num_slots`` steps), or the directory of a finished training run.

    ValueError where the run is not finished or was trained on another target's weights.
    """
    from hyperdflash.evaluation.methods import method_of_run

    if source == "ar":
        return Autoregressive()
    if source == "mtp":
        return MTPDrafter(target.mtp, positive_int("num_slots", num_slots), target.heads)
    method, training = method_of_run(source, target.path)
    return method.loop_drafter(training, target.heads)


def generate_stream(
    target: Target,
    drafter: LoopDrafter,
    prompt: str | Conversation | Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    mode: str = "non_think",
    synchronize: bool = False,
) -> Iterator[Piece]:
    """The answer to ``prompt``, a piece a round, until the end token or ``max_new_tokens``.

    A string is one user turn in the chat encoding of ``mode``; token ids are taken as they are. See ``speculate`` for
    ``synchronize``.
    """
    tokenizer, stop_ids = tokenizer_of(target.path), stop_ids_of(target)
    if isinstance(prompt, str):
        prompt = Conversation("prompt", "chat", (Turn("user", prompt),))
    prompt_ids = encode_prompt(prompt, tokenizer, mode) if isinstance(prompt, Conversation) else list(prompt)
    generator = torch.Generator(target.model.device).manual_seed(seed)
    stream, count = TextStream(tokenizer), 0
    with TargetSession(target.model, drafter.layer_ids) as session:
        for event in speculate(
            session,
            drafter,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampler=Sampler(temperature, top_p, generator),
            synchronize=synchronize,
        ):
            added = [event.token_id] if isinstance(event, FirstToken) else event.emitted
            count += len(added)
            yield Piece(stream.push(added, last=count == max_new_tokens or added[-1] in stop_ids), event)


def generate(target: Target, drafter: LoopDrafter, prompt: str | Conversation | Sequence[int], **settings) -> Answer:
    """The whole answer; ``settings`` as ``generate_stream``."""
    return answer_of(list(generate_stream(target, drafter, prompt, **settings)), target)


def answer_of(pieces: Sequence[Piece], target: Target) -> Answer:
    """All pieces of ``generate_stream`` -> the whole answer."""
    generation = collect((piece.event for piece in pieces), stop_ids_of(target))
    return Answer("".join(piece.text for piece in pieces), generation)


def stop_ids_of(target: Target) -> set[int]:
    """What ends an answer."""
    return {special_ids(tokenizer_of(target.path), mask_id=0).eos}


def newest_run(target: Target) -> Path:
    """The last finished HyperDFlash run on this target's weights, of the latest stage; ValueError where there is none."""
    from hyperdflash.training.warm_start import read_record

    found = []
    for path in (runs_dir() / "train").glob("*/result.json"):
        record = read_record(path.parent)
        if record["target"] == target.fingerprint and _is_hyperdflash(record["decided_by"]):
            found.append((record["decided_by"]["stage"], path.stat().st_mtime, path.parent))
    if not found:
        raise ValueError(
            f"method=hyperdflash has no finished run on this target in {runs_dir() / 'train'}: run "
            "`python -m src.train experiment=stage1` first, or give run=<directory> or method=mtp"
        )
    return max(found)[-1]


def _is_hyperdflash(decided: dict) -> bool:
    """The paper's method alone, none of a sweep's variants: states before the HC head, by the gate of the target's HC head."""
    conditioning, reducer = decided["conditioning"] or {}, decided["reducer"] or {}
    gate = reducer.get("_target_", "").endswith(".HcGate") and reducer.get("init") == "inherit"
    return gate and conditioning.get("_target_", "").endswith(".PreHcHead")


def answer_prompt(config: DictConfig, console: Console) -> Answer:
    """Load, generate and show as the rounds come."""
    from hydra.utils import instantiate
    from transformers.utils import logging

    method = config.method or ("hyperdflash" if config.run else "mtp")
    one_of("method", method, ("hyperdflash", "mtp", "ar"))
    if OmegaConf.is_missing(config, "prompt"):
        raise ValueError("there is no prompt: give one, as in prompt='How many days are there in 3 weeks?'")
    if config.run and method != "hyperdflash":
        raise ValueError(f"run={config.run} brings its own drafter, method={method} another: leave one of them out")
    for name in ("num_slots", "max_new_tokens", "threads"):
        positive_int(name, config[name])
    natural_int("seed", config.seed)
    turns = ([Turn("system", str(config.system))] if config.system else []) + [Turn("user", str(config.prompt))]
    logging.disable_progress_bar()
    torch.set_num_threads(config.threads)
    target: Target = instantiate(config.target)
    source = (config.run or newest_run(target)) if method == "hyperdflash" else method
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
    """``prompt=`` and ``system=`` with their text quoted for Hydra, whose own grammar trips over commas and brackets."""
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
    sys.argv[1:] = map(quoted, sys.argv[1:])
    run_command()
