"""Checks that every method's drafter computes the same in training, in replay and in the loop.

1. prompts     the first turn of each prompt, encoded as decoding does                  (hyperdflash.data.chat.encode_prompt)
2. loop        the method writes its greedy texts
3. documents   prompt and answer as training encodes them, states from the cache as training reads them
4. paths       training with every anchor drawn, and replay, over those states
5. compare     check by check (checks.parity) into parity.json, parity.md and the terminal; ValueError names what differs
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from tqdm import tqdm

from hyperdflash.checks.parity import Parity, compare_views
from hyperdflash.checks.traces import View, observe_loop, observe_replay, observe_training, training_document
from hyperdflash.cli import command_of
from hyperdflash.contracts import Conversation
from hyperdflash.data.chat import encode_prompt, user_rounds
from hyperdflash.data.prompts import Prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.evaluation.methods import Method, make_methods, method_of_run
from hyperdflash.preparing.job import StatesJob
from hyperdflash.record import environment_record, write_json
from hyperdflash.report.tables import Block, Table, jsonable, markdown
from hyperdflash.settings import positive_int, positive_number
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.store import collate
from hyperdflash.targets.load import Target


def check_parity(config: DictConfig) -> dict[str, Parity]:
    """Returns parity per method; ValueError with the first difference, once the report is written."""
    if config.run:
        method, training = method_of_run(config.run, config.target.path)
        methods, config.cache.dtype = [method], training.cache.dtype
    else:
        methods = make_methods(config)
    benchmark: Prompts = instantiate(config.benchmarks)
    positive_int("threads", config.threads)
    if config.tolerance is not None:
        positive_number("tolerance", config.tolerance)
    torch.set_num_threads(config.threads)
    target: Target = instantiate(config.target)
    tokenizer = load_tokenizer(config.target.path)
    stop_ids = {special_ids(tokenizer, config.target.mask_token_id).eos}
    conversations = [user_rounds(prompt)[0] for prompt in benchmark.fitting(tokenizer, config.mode)]
    found = {}
    for method in tqdm(methods, desc="parity", unit="method", mininterval=2):
        module = method.drafter(config, target.heads)
        views = observe(method, module, target, conversations, tokenizer, config, benchmark.max_new_tokens, stop_ids)
        found[method.name] = compare_views(views, target.heads, module.context_window, config.tolerance)
    write_report(found, config, target, len(conversations))
    for name, parity in found.items():
        if parity.first_difference:
            raise ValueError(f"{name}: {parity.first_difference}; all checks are in {config.out}/parity.md")
    return found


def observe(
    method: Method,
    module: DraftModel,
    target: Target,
    conversations: list[Conversation],
    tokenizer,
    config: DictConfig,
    max_new_tokens: int,
    stop_ids: set[int],
) -> list[View]:
    """Runs training, replay and loop of one method on ``conversations``, each of which ends at a user turn."""
    prompts = {c.id: encode_prompt(c, tokenizer, config.mode) for c in conversations}
    drafter = module.proposer(target.heads, CODECS[config.cache.dtype])
    loop = observe_loop(module, drafter, target, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    documents = [training_document(c, loop.texts[c.id][len(prompts[c.id]) :], tokenizer, config.mode) for c in conversations]
    job = StatesJob(config)
    cached = job.states(documents, job.open_store(target.heads), method.layer_ids, job.producer_of(lambda: target))
    states = collate([cached[index] for index in range(len(cached))])
    return [observe_training(module, states, target.heads), observe_replay(module, states, target.heads), loop]


def write_report(found: dict[str, Parity], config: DictConfig, target: Target, num_prompts: int) -> None:
    """Writes parity.json and parity.md into ``config.out``, and prints the tables."""
    out = Path(config.out)
    record = {name: asdict(parity) | {"first_difference": parity.first_difference} for name, parity in found.items()}
    described = {"path": str(config.target.path), "fingerprint": target.fingerprint}
    environment = environment_record(command_of("src.parity"))
    write_json(
        out / "parity.json",
        jsonable({"target": described, "prompts": num_prompts, "methods": record, "environment": environment}),
    )
    text = parity_markdown(found, f"Target {config.target.path} ({target.fingerprint}), {num_prompts} prompts, T = 0")
    (out / "parity.md").write_text(text)
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    print(f"wrote parity.json, parity.md in {out}")


def parity_markdown(found: dict[str, Parity], setting: str) -> str:
    """Returns tau and logits per method, then the largest difference per check and method."""
    header = ["Method", "τ training", "τ replay", "τ loop", "rounds", "paths", "slots", "max |Δ logit|", "of σ", "first at"]
    rows = []
    for name, parity in found.items():
        taus = [f"{parity.taus[path]:.3f}" for path in ("training", "replay", "loop")]
        own = [name, *taus, f"{parity.rounds['loop']:,}"]
        for check in (c for c in parity.checks if c.name == "logits"):
            at = "-" if check.first is None else f"{check.first.document}, {check.first.position}"
            numbers = [f"{check.compared:,}", f"{check.absolute or 0.0:.1e}", f"{check.largest:.1e}"]
            rows.append([*own, " and ".join(check.paths), *numbers, at])
            own = [""] * 5
    names = dict.fromkeys(check.name for parity in found.values() for check in parity.checks)
    cells = [[name, *(_verdict(parity, name) for parity in found.values())] for name in names]
    differing = [f"- {name}: {parity.first_difference}" for name, parity in found.items() if parity.first_difference]
    blocks: list[Block] = ["### The same logits in training, in replay and in the loop?", Table(header, rows)]
    blocks.append(f"{setting}. σ: standard deviation of the logits over the vocabulary.")
    blocks += ["Largest relative difference of each check over all pairs of paths; 0 where things are equal:"]
    blocks.append(Table(["Check", *found], cells))
    return markdown([*blocks, *(["First differences:", "\n".join(differing)] if differing else ["All agree."])])


def _verdict(parity: Parity, name: str) -> str:
    mine = [check for check in parity.checks if check.name == name]
    if not any(check.compared for check in mine):
        return ""
    return "**differs**" if any(check.first for check in mine) else f"{max(check.largest for check in mine):.1e}"
