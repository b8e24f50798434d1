"""Replays the texts of an evaluation by decoding, to check that the loop and replay agree.

1. texts     each method's texts, a document per turn
2. states    one plain forward over each text, rounded to the cache's dtype
3. replay    the same drafter on the same text
4. compare   T = 0: per round, a difference with its gap of logits. T > 0: random draws differ, so the difference of tau with
             its interval over prompts, which covers 0 if both draw from one distribution; several replays average out their
             own draws
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from hyperdflash.contracts import Document
from hyperdflash.decoding.agreement import RoundDifference, compare_rounds
from hyperdflash.decoding.metrics import document_counts
from hyperdflash.decoding.replay import concat_rounds, replay
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.evaluation.methods import Method
from hyperdflash.evaluation.turn_rows import as_generation
from hyperdflash.report.bootstrap import MEAN, Estimate, pooled_ratio, resample_prompts
from hyperdflash.report.tables import Block, Table, estimate_text, markdown
from hyperdflash.states.capture import live_states
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.store import make_shards
from hyperdflash.targets.load import Target
from hyperdflash.targets.producer import InProcess

BATCH = 16


@dataclass(frozen=True)
class Agreement:
    """One method at one temperature over ``texts``: ``rounds`` of the loop, tau of both, ``differences`` at T = 0, and at
    T > 0 the ``difference`` of the taus, loop minus replay, with its 95% interval over texts."""

    method: str
    temperature: float
    texts: int
    rounds: int
    loop_tau: float
    replay_tau: float
    differences: tuple[RoundDifference, ...]
    difference: Estimate


def agreements(
    rows: Sequence[dict], methods: Sequence[Method], modules: dict[str, DraftModel], target: Target, config: DictConfig
) -> list[Agreement]:
    """Compares every method with a drafter (``modules``, by name) at every temperature in ``rows``."""
    found = []
    for method in methods:
        for temperature in sorted({row["temperature"] for row in rows}):
            turns = [
                (f"{row['mode']}/{row['id']}#{number}", row["benchmark"], turn)
                for row in rows
                if row["temperature"] == temperature
                for number, turn in enumerate(row["methods"][method.name])
                if turn["rounds"]
            ]
            found.append(_agreement(method, modules[method.name], turns, temperature, target, config))
    return found


def _agreement(
    method: Method,
    drafter: DraftModel,
    turns: Sequence[tuple[str, str, dict]],
    temperature: float,
    target: Target,
    config: DictConfig,
) -> Agreement:
    codec = CODECS[config.cache.dtype]
    documents = {
        name: Document(
            name,
            benchmark,
            torch.tensor(turn["prompt_ids"] + turn["ids"]),
            torch.arange(len(turn["prompt_ids"]) + len(turn["ids"])) >= len(turn["prompt_ids"]),
        )
        for name, benchmark, turn in turns
    }
    generations = {name: as_generation(turn) for name, _, turn in turns}
    draws = range(config.seed, config.seed + (config.replay_draws if temperature else 1))
    names, looped, differences, sizes = [], [], [], []
    replayed = [[] for _ in draws]
    shards = make_shards(list(documents.values()), BATCH)
    for shard in tqdm(shards, desc=f"replay {method.name} T={temperature:g}", unit="batch", mininterval=2, leave=False):
        states = live_states(InProcess(target), shard, method.layer_ids, codec)
        own = [generations[name] for name in states.ids]
        for rounds, seed in zip(replayed, draws, strict=True):
            rounds.append(
                replay(drafter, states, target.heads, temperature, top_p=config.top_p if temperature else 1.0, seed=seed)
            )
        if temperature == 0:
            differences += compare_rounds(own, replayed[0][-1], drafter, states, target.heads)
        names += states.ids
        sizes.append(len(own))
        looped += own
    counts = [document_counts(concat_rounds(rounds, sizes), len(names)) for rounds in replayed]
    loop = np.array([[sum(len(r.emitted) for r in g.rounds), len(g.rounds)] for g in looped])
    resamples = resample_prompts(tuple(documents[name].domain for name in names), config.num_resamples, config.seed)
    own_tau = pooled_ratio(loop[:, 0], loop[:, 1], resamples)
    other_tau = pooled_ratio(sum(c.emitted for c in counts), sum(c.rounds for c in counts), resamples)
    taus = (float(ratio.value[-1]) for ratio in (own_tau, other_tau))
    difference = own_tau.minus(other_tau).estimates()[MEAN]
    return Agreement(method.name, temperature, len(names), int(loop[:, 1].sum()), *taus, tuple(differences), difference)


def agreement_markdown(found: Sequence[Agreement]) -> str:
    """Returns a row per method and temperature, and every greedy round that differs."""
    rows, wrong = [], []
    for a in found:
        ties = sum(d.tie for d in a.differences)
        row = [a.method, f"{a.temperature:g}", f"{a.texts:,}", f"{a.rounds:,}", f"{a.loop_tau:.3f}", f"{a.replay_tau:.3f}"]
        if a.temperature == 0:
            rows.append([*row, f"{ties}", f"{len(a.differences) - ties}", "", ""])
        else:
            covers = "yes" if a.difference.low <= 0 <= a.difference.high else "**no**"
            rows.append([*row, "", "", estimate_text(a.difference, signed=True), covers])
        for d in a.differences:
            accepted = [f"{d.loop_accepted}", f"{d.replay_accepted}"]
            wrong.append([a.method, str(d.anchor), *accepted, f"{d.gap:.1e}", "tie" if d.tie else ""])
    header = ["Method", "T", "texts", "rounds", "τ loop", "τ replay", "ties", "differ", "loop - replay", "covers 0"]
    blocks: list[Block] = [
        "### Loop and replay on the loop's own texts",
        Table(header, rows),
        "T = 0: rounds that the two accept differently, ties being those where the drafter's logits lie within its rounding; "
        "T > 0: the coins differ, so the taus are compared with a 95% bootstrap interval over texts. τ: mean over benchmarks.",
    ]
    if wrong:
        blocks.append(Table(["Method", "anchor", "loop accepted", "replay accepted", "gap of logits", ""], wrong))
    return markdown(blocks)
