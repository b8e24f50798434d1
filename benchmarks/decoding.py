"""Measures where the time of a round goes by batch size: B rows in lockstep at equal lengths (the same prompt B times, T = 0),
all methods prompt by prompt in turn.

    python -m benchmarks.decoding

Needs the runs that an evaluation needs. A round's time is split into drafting, verification and the rest:

    tokens per round and row  tau = emitted tokens / (rounds * rows)
    predicted speedup         tau * T_ar / (T_draft + T_verify + T_rest), medians over rounds; T_ar is AR's sum of the three
                              over its own tau, which is 1 unless rows have ended
    measured speedup          tokens/s over AR's tokens/s, sums over all rounds

Both speedups are against AR at the same batch size, whose rows go in lockstep at equal lengths. Medians ignore a slow round,
sums do not: a ratio far from 1 shows that the typical round does not explain the time (few slow rounds, or rounds that grow
with the text).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from tqdm import tqdm

from benchmarks.result import option_parser, run
from hyperdflash.data.chat import encode_prompt
from hyperdflash.data.prompts import load_eval_prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.loop import Generation, decode
from hyperdflash.drafting.proposer import Autoregressive, Proposer
from hyperdflash.evaluation.methods import make_methods
from hyperdflash.identity import CONF
from hyperdflash.options import instantiate
from hyperdflash.report.measure import AUTOREGRESSIVE
from hyperdflash.report.tables import GAP, Block, Table, number_text
from hyperdflash.targets.load import Target

TERMS = ("draft", "verify", "rest")


def by_batch_size(
    target: Target,
    drafters: dict[str, Proposer],
    prompts: Sequence[Sequence[int]],
    batch_sizes: Sequence[int],
    max_new_tokens: int,
    stop_ids: set[int],
) -> list[dict]:
    """Returns the cost of every method at every batch size; per prompt another method comes first."""
    settings = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    found: dict[tuple[str, int], list[Generation]] = {(name, size): [] for size in batch_sizes for name in drafters}
    with tqdm(total=len(found) * len(prompts), desc="batch sizes", unit="text", mininterval=2) as bar:
        for size in batch_sizes:
            for index, prompt in enumerate(prompts):
                names = list(drafters)
                for name in names[index % len(names) :] + names[: index % len(names)]:
                    found[name, size].append(decode(target.model, drafters[name], prompt, copies=size, **settings))
                    bar.update()
    return with_speedups([cost_of(name, size, generations) for (name, size), generations in found.items()])


def cost_of(method: str, batch_size: int, generations: Sequence[Generation]) -> dict:
    """Returns ``cost`` of texts that were each decoded in ``batch_size`` rows in lockstep."""
    rounds = [r for generation in generations for r in generation.rounds]
    times = np.array([[getattr(r.seconds, term) for r in rounds] for term in TERMS])
    emitted = np.array([batch_size * len(r.emitted) for r in rounds])
    return cost(method, batch_size, times, emitted, np.array([g.first.seconds.total for g in generations]))


def cost(method: str, batch_size: int, times: np.ndarray, emitted: np.ndarray, first: np.ndarray) -> dict:
    """Returns medians in ms per round and per prefill, tau, and tokens/s; ValueError without a round or a prefill.

    ``times`` [3, R] seconds of the TERMS per round of all rows; ``emitted`` [R] tokens that all rows gain in it; ``first`` [N]
    seconds from the prompt to the first token.
    """
    if not len(emitted) or not len(first):
        raise ValueError(f"{method} at batch size {batch_size} has {len(emitted)} rounds and {len(first)} prefills; 1 is least")
    medians = [1e3 * float(np.median(values)) for values in (*times, first)]
    return {
        "method": method,
        "batch_size": batch_size,
        "rounds": len(emitted),
        **dict(zip(("draft_ms", "verify_ms", "rest_ms", "first_token_ms"), medians, strict=True)),
        "round_ms": sum(medians[:3]),
        "tau": float(np.sum(emitted)) / (len(emitted) * batch_size),
        "tokens_per_second": float(np.sum(emitted) / np.sum(times)),
    }


def with_speedups(costs: Sequence[dict]) -> list[dict]:
    """Adds ``predicted`` and ``measured`` speedups over AR at the same batch size and their ``ratio``; None without AR."""
    references = {own["batch_size"]: own for own in costs if own["method"] == AUTOREGRESSIVE}
    found = []
    for own in costs:
        predicted = measured = ratio = None
        if reference := references.get(own["batch_size"]):
            predicted = own["tau"] * reference["round_ms"] / own["round_ms"] / reference["tau"]
            measured = own["tokens_per_second"] / reference["tokens_per_second"]
            ratio = measured / predicted
        found.append({**own, "predicted": predicted, "measured": measured, "ratio": ratio})
    return found


def cost_blocks(costs: Sequence[dict], setting: str) -> list[Block]:
    """Returns one table; ``setting`` names what the times depend on: target, machine, length of the texts."""
    header = ["Batch", "Method", "T_draft", "T_verify", "T_rest", "round", "τ", "first token", "tokens/s"]
    rows, shown = [], None
    for own in costs:
        row = [str(own["batch_size"]) if own["batch_size"] != shown else "", own["method"]]
        row += [_ms(own[f"{term}_ms"]) for term in (*TERMS, "round")]
        row += [number_text(own["tau"]), _ms(own["first_token_ms"]), number_text(own["tokens_per_second"], 1)]
        row += [GAP if own[name] is None else f"{number_text(own[name])}×" for name in ("predicted", "measured")]
        rows.append([*row, GAP if own["ratio"] is None else number_text(own["ratio"]), str(own["rounds"])])
        shown = own["batch_size"]
    notes = (
        f"{setting}. Times in ms, medians over rounds (first token: over prefills); rows of a batch in lockstep at equal "
        "lengths. τ: tokens that a row gains per round. Predicted: τ · T_ar / (T_draft + T_verify + T_rest); measured: "
        f"tokens/s over AR's; both at the same batch size; {GAP}: no AR there. A tiny target's verification says nothing of a "
        "large one's: see the roofline (python -m src.roofline)."
    )
    return [Table([*header, "predicted speedup", "measured speedup", "measured / predicted", "rounds"], rows), notes]


def _ms(value: float) -> str:
    """Writes about three digits: 0.123, 1.23, 12.3, 123."""
    return number_text(value, 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3)


def measure(options: Namespace) -> dict:
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("evaluate", [f"methods=[{options.methods}]", *options.overrides])
        methods = make_methods(config)
    torch.set_num_threads(config.threads)
    target, tokenizer = instantiate(config.target), load_tokenizer(config.target.path)
    drafters: dict[str, Proposer] = {AUTOREGRESSIVE: Autoregressive()}
    drafters |= {method.name: method.loop_drafter(config, target.heads) for method in methods}
    domains = [load_eval_prompts(domain)[: options.prompts] for domain in ("math", "code", "chat")]
    prompts = [encode_prompt(prompt, tokenizer) for group in zip(*domains, strict=True) for prompt in group]
    stop_ids = {special_ids(tokenizer, config.target.mask_token_id).eos}
    decode(target.model, Autoregressive(), prompts[0], max_new_tokens=16, stop_ids=stop_ids)  # warms up
    place = f"Target {config.target.path} ({target.fingerprint}), {len(prompts)} prompts"
    costs = by_batch_size(target, drafters, prompts, options.batch_sizes, options.max_new_tokens, stop_ids)
    return {"setting": f"{place}, {config.threads} threads, CPU, T = 0", "costs": costs}


def blocks(record: dict) -> list[Block]:
    return cost_blocks(record["costs"], record["setting"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("decoding", __doc__)
    parser.add_argument("--prompts", type=int, default=4, help="of each domain")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--methods", default="mtp,dflash,hyperdflash", help="names of conf/method or runs' directories")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the evaluation's configuration, e.g. target=deep")
    run(parser, measure, blocks, arguments)


if __name__ == "__main__":
    main()
