"""Checks that every method's drafter computes the same in training, in replay and in the loop.

1. prompts     the first turn of each prompt, encoded as decoding does                  (hyperdflash.data.chat.encode_prompt)
2. loop        the method writes its greedy texts
3. documents   prompt and answer as training encodes them, states from the cache as training reads them
4. paths       training with every anchor drawn, and replay, over those states
5. compare     check by check (checks.parity) into parity.json, parity.md and the terminal; ValueError names what differs
"""

from dataclasses import asdict

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from hyperdflash.checks.parity import CHECKS, Parity, compare_views
from hyperdflash.checks.traces import View, observe_loop, observe_replay, observe_training, training_document
from hyperdflash.cli import command_of
from hyperdflash.contracts import Conversation
from hyperdflash.data.chat import encode_prompt, user_rounds
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.evaluation.methods import Method, make_methods, method_of_run
from hyperdflash.options import instantiate
from hyperdflash.preparing.job import StatesJob
from hyperdflash.record import environment_record
from hyperdflash.report.results import write_report
from hyperdflash.report.tables import Table, markdown
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
    torch.set_num_threads(positive_int("threads", config.threads))
    if config.tolerance is not None:
        positive_number("tolerance", config.tolerance)
    benchmark, target = instantiate(config.benchmarks), instantiate(config.target)
    tokenizer = load_tokenizer(config.target.path)
    fitting = benchmark.fitting(tokenizer, config.mode, target.heads.config.max_position_embeddings)
    conversations = [user_rounds(prompt)[0] for prompt in fitting]
    found = {}
    for method in tqdm(methods, desc="parity", unit="method"):
        module = method.drafter(config, target.heads)
        views = observe(method, module, target, conversations, tokenizer, config)
        found[method.name] = compare_views(views, target.heads, config.tolerance)
    record = {
        "target": {"path": str(config.target.path), "fingerprint": target.fingerprint},
        "prompts": len(conversations),
        "methods": {name: asdict(parity) | {"first_difference": parity.first_difference} for name, parity in found.items()},
        "environment": environment_record(command_of("src.parity")),
    }
    text = parity_markdown(found, f"Target {config.target.path} ({target.fingerprint}), {len(conversations)} prompts, T = 0")
    write_report(config.out, {"parity.json": record, "parity.md": text})
    print(f"{text}\nwrote parity.json, parity.md in {config.out}")
    for name, parity in found.items():
        if parity.first_difference:
            raise ValueError(f"{name}: {parity.first_difference}; all checks are in {config.out}/parity.md")
    return found


def observe(
    method: Method, module: DraftModel, target: Target, conversations: list[Conversation], tokenizer, config: DictConfig
) -> list[View]:
    """Runs training, replay and loop of one method on ``conversations``, each of which ends at a user turn."""
    prompts = {c.id: encode_prompt(c, tokenizer, config.mode) for c in conversations}
    stop_ids = {special_ids(tokenizer, config.target.mask_token_id).eos}
    drafter, most = module.proposer(target.heads, CODECS[config.cache.dtype]), config.benchmarks.max_new_tokens
    loop = observe_loop(drafter, target, prompts, max_new_tokens=most, stop_ids=stop_ids)
    documents = [training_document(c, loop.texts[c.id][len(prompts[c.id]) :], tokenizer, config.mode) for c in conversations]
    job = StatesJob(config)
    cached = job.states(documents, job.open_store(target.heads), method.layer_ids, job.producer_of(lambda: target))
    states = collate([cached[index] for index in range(len(cached))])
    return [observe_training(module, states, target.heads), observe_replay(module, states, target.heads), loop]


def parity_markdown(found: dict[str, Parity], setting: str) -> str:
    """Returns tau and the largest difference per check for each method."""
    rows = []
    for method, parity in found.items():
        row = [method, *(f"{parity.taus[path]:.3f}" for path in ("training", "replay", "loop")), f"{parity.rounds['loop']:,}"]
        for name in CHECKS:
            own = [check for check in parity.checks if check.name == name and check.compared]
            largest = f"{max(check.largest for check in own):.1e}" if own else ""
            row.append("**differs**" if any(check.first for check in own) else largest)
        rows.append(row)
    differing = [f"- {name}: {parity.first_difference}" for name, parity in found.items() if parity.first_difference]
    return markdown(
        [
            "### The same drafts in training, in replay and in the loop?",
            Table(["Method", "τ training", "τ replay", "τ loop", "rounds", *CHECKS], rows),
            f"{setting}. Largest relative difference of each check over all pairs of paths; for logits in their standard "
            "deviations over the vocabulary.",
            *(["First differences:", "\n".join(differing)] if differing else ["All agree."]),
        ]
    )
