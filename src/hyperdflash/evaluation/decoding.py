"""Measures methods by decoding: every method on each prompt in turn, timed, in one process.

1. methods      plain autoregressive decoding (AR), then those of the configuration
2. decode       evaluation.conversations, each turn by the draft-verify loop
3. check        T = 0: the text equals AR's, or the gap of the logits is that of a tie
4. report       from rows.jsonl the paper's tables, Figure 1, and whether the texts are AR's
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyperdflash.contracts import Document
from hyperdflash.data.prompts import Prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.agreement import RoundDifference, compare_greedy, compare_rounds
from hyperdflash.decoding.loop import FirstToken, Generation, Round, Seconds, decode, loop_rounds
from hyperdflash.decoding.metrics import document_counts
from hyperdflash.decoding.replay import concat_rounds, replay
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.drafting.proposer import Autoregressive, Proposer
from hyperdflash.evaluation.conversations import answer_all, samples_of, write_evaluation
from hyperdflash.evaluation.methods import Method, make_methods
from hyperdflash.options import instantiate
from hyperdflash.preparing.job import StatesJob
from hyperdflash.report.bootstrap import MEAN, Estimate, PromptCounts, pooled_ratio, resample_prompts
from hyperdflash.report.measure import AUTOREGRESSIVE as AR
from hyperdflash.report.measure import Sample
from hyperdflash.report.tables import Block, Table, estimate_text, markdown, show
from hyperdflash.settings import natural_int, positive_int
from hyperdflash.states.capture import live_states
from hyperdflash.states.codecs import CODECS
from hyperdflash.states.store import make_shards
from hyperdflash.targets.load import Target
from hyperdflash.targets.producer import InProcess
from hyperdflash.targets.sampling import Sampler, generator_for

BATCH = 16


def evaluate_by_decoding(config: DictConfig) -> Path:
    """Decodes, then writes the report; returns the folder."""
    natural_int("seed", config.seed)
    for name in ("replay_draws", "num_resamples"):
        positive_int(name, config[name])
    if config.threads:
        torch.set_num_threads(config.threads)
    methods = make_methods(config)
    target = StatesJob(config).load()
    tokenizer = load_tokenizer(config.target.path)
    modules = {method.name: method.drafter(config, target.heads) for method in methods}
    rows = decode_all(config, methods, modules, target, tokenizer)
    eos_id = special_ids(tokenizer, config.target.mask_token_id).eos
    report(rows, config, {method.name: method.run_id for method in methods}, target.fingerprint, eos_id)
    if config.check_replay:
        text = agreement_markdown(agreements(rows, methods, modules, target, config))
        (Path(config.out) / "agreement.md").write_text(text)
        show(text)
    return Path(config.out)


def decode_all(
    config: DictConfig,
    methods: Sequence[Method],
    modules: dict[str, DraftModel],
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict]:
    """Returns the rows of every method on every prompt; ``modules``: method name -> drafter."""
    benchmark: Prompts = instantiate(config.benchmarks)
    stop_ids = {special_ids(tokenizer, config.target.mask_token_id).eos}
    drafters: dict[str, Proposer] = {AR: Autoregressive()}
    drafters |= {m.name: m.loop_drafter(config, target.heads, modules[m.name]) for m in methods}

    def answer(name: str, prompt_ids: list[int], temperature: float, draws: str) -> dict:
        """Decodes one answer; ``draws`` alone seeds its draws, so earlier answers do not matter."""
        generation = decode(
            target.model,
            drafters[name],
            prompt_ids,
            stop_ids=stop_ids,
            max_new_tokens=benchmark.max_new_tokens,
            sampler=Sampler(temperature, config.top_p, generator_for(draws, target.model.device)),
            synchronize=target.model.device.type == "cuda",
        )
        return turn_row(prompt_ids, generation)

    def complete(row: dict) -> None:
        if row["temperature"] == 0:
            compare_texts(target.model, row["methods"])

    identity = {
        "target": target.fingerprint,
        "dtype": config.target.dtype,
        "cache.dtype": config.cache.dtype,
        "methods": {method.name: method.run_id for method in methods},
        "threads": torch.get_num_threads(),
        "device": str(target.model.device),
    }
    return answer_all(config, identity, benchmark, tokenizer, list(drafters), answer, complete=complete)


def report(rows: Sequence[dict], config: DictConfig, run_ids: dict[str, str], fingerprint: str, eos_id: int) -> None:
    """Writes paper.md with its companions, lossless.md and evaluation.json; ``run_ids`` per method."""
    texts = {"lossless.md": lossless_markdown([row for row in rows if row["temperature"] == 0])}
    target = {"path": str(config.target.path), "fingerprint": fingerprint}
    record = {"target": target, "prompts": len(rows), "runs": run_ids}
    samples = decoded_samples(rows, eos_id, run_ids)
    write_evaluation(samples, config, f"{config.target.path} ({fingerprint})", texts, record)


def decoded_samples(rows: Sequence[dict], eos_id: int, run_ids: dict[str, str]) -> list[Sample]:
    """Returns a sample per method, mode and temperature."""

    def count(name: str, prompts: list[list[dict]]) -> tuple[PromptCounts, list[float]]:
        turns = [[as_generation(turn) for turn in own] for own in prompts]
        generations = [generation for own in turns for generation in own]
        documents = [index for index, own in enumerate(turns) for _ in own]
        num_slots = max((len(r.drafted) for generation in generations for r in generation.rounds), default=0)
        counts = document_counts(loop_rounds(generations, num_slots, documents), len(prompts))
        return PromptCounts(**counts._asdict()), [sum(g.seconds.total for g in own) for own in turns]

    return samples_of(rows, eos_id, run_ids, count)


def turn_row(prompt_ids: Sequence[int], generation: Generation) -> dict:
    """Returns JSON values. ``rounds``: [anchor, drafted ids, accepted, emitted, draft s, verify s, rest s] each."""
    return {
        "prompt_ids": list(prompt_ids),
        "ids": list(generation.token_ids),
        "ended_by": generation.ended_by,
        "first_s": list(asdict(generation.first.seconds).values()),
        "rounds": [
            [r.anchor, list(r.drafted), r.accepted, len(r.emitted), *(round(s, 7) for s in asdict(r.seconds).values())]
            for r in generation.rounds
        ],
    }


def as_generation(turn: dict) -> Generation:
    """Inverts ``turn_row``; times are exact to a tenth of a microsecond."""
    place, rounds = 1, []
    for anchor, drafted, accepted, emitted, *seconds in turn["rounds"]:
        text = tuple(turn["ids"][place : place + emitted])
        rounds.append(Round(anchor, tuple(drafted), accepted, text, Seconds(*seconds)))
        place += emitted
    first = FirstToken(turn["ids"][0], Seconds(*turn["first_s"]))
    return Generation(tuple(turn["ids"]), turn["ended_by"], first, tuple(rounds))


def compare_texts(model: PreTrainedModel, rows: dict[str, list[dict]]) -> None:
    """Adds ``differs`` to every turn whose greedy text is not AR's: position, gap of the logits, and whether it is a tie.

    Turns after a difference have another history, so ``compared`` is False there.
    """
    for turns in rows.values():
        parted = False
        for index, turn in enumerate(turns):
            if parted:
                turn["compared"] = False
                continue
            found = compare_greedy(model, turn["prompt_ids"], tuple(rows[AR][index]["ids"]), tuple(turn["ids"]))
            if found is not None:
                turn["differs"], parted = asdict(found), True


def lossless_markdown(rows: Sequence[dict]) -> str:
    """Compares greedy texts with AR's per method, and lists those that differ."""
    if not rows:
        return "No prompts at temperature 0.\n"
    lines, differences = [], []
    for name in rows[0]["methods"]:
        turns = [(row, turn) for row in rows for turn in row["methods"][name]]
        other = [(row, turn["differs"]) for row, turn in turns if "differs" in turn]
        ties = sum(found["tie"] for _, found in other)
        tokens = sum(len(turn["ids"]) for _, turn in turns)
        skipped = sum(not turn.get("compared", True) for _, turn in turns)
        counts = (len(turns), tokens, len(turns) - len(other) - skipped, ties, len(other) - ties, skipped)
        lines.append([name, *(f"{n:,}" for n in counts)])
        for row, found in other:
            what = "tie" if found["tie"] else "**differs**"
            differences.append([name, row["id"], row["mode"], str(found["position"]), f"{found['gap']:.1e}", what])
    header = ["Method", "texts", "tokens", "same", "ties within rounding", "differ", "not compared"]
    blocks: list[Block] = ["### Temperature 0: is the text AR's?", Table(header, lines)]
    if any(line[-1] != "0" for line in lines):
        blocks.append("Not compared: turns after the first difference of a conversation, whose history is another one.")
    if differences:
        blocks.append(Table(["Method", "prompt", "mode", "first at", "gap of logits", ""], differences))
    return markdown(blocks)


@dataclass(frozen=True)
class Agreement:
    """One method at one temperature over ``texts``: ``rounds`` of the loop, tau of both, ``differences`` at T = 0, and the
    ``difference`` of the taus, loop minus replay, with its 95% interval over texts."""

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
    """Replays the loop's texts, a document per turn, by every method (``modules``, by name) at every temperature in ``rows``.

    Several replays average out their own draws.
    """
    found = []
    for method, temperature in product(methods, sorted({row["temperature"] for row in rows})):
        turns, documents = {}, []
        for row in (row for row in rows if row["temperature"] == temperature):
            for number, turn in enumerate(row["methods"][method.name]):
                if turn["rounds"]:
                    name, tokens = f"{row['mode']}/{row['id']}#{number}", torch.tensor(turn["prompt_ids"] + turn["ids"])
                    turns[name], new = turn, torch.arange(len(tokens)) >= len(turn["prompt_ids"])
                    documents.append(Document(name, row["benchmark"], tokens, new))
        draws = range(config.seed, config.seed + (config.replay_draws if temperature else 1))
        domains, looped, differences, sizes = [], [], [], []
        replayed = [[] for _ in draws]
        shards, desc = make_shards(documents, BATCH), f"replay {method.name} T={temperature:g}"
        for shard in tqdm(shards, desc=desc, unit="batch", mininterval=2, leave=False):
            states = live_states(InProcess(target), shard, method.layer_ids, CODECS[config.cache.dtype])
            own, drafter, top_p = [as_generation(turns[name]) for name in states.ids], modules[method.name], config.top_p
            for rounds, seed in zip(replayed, draws, strict=True):
                sampling = {"top_p": top_p if temperature else 1.0, "seed": seed}
                rounds.append(replay(drafter, states, target.heads, temperature, **sampling))
            if temperature == 0:
                differences += compare_rounds(own, replayed[0][-1], drafter, states, target.heads)
            domains += states.domains
            sizes.append(len(own))
            looped += own
        counts = [document_counts(concat_rounds(rounds, sizes), len(looped)) for rounds in replayed]
        emitted, rounds = np.array([[sum(len(r.emitted) for r in g.rounds), len(g.rounds)] for g in looped]).T
        resamples = resample_prompts(domains, config.num_resamples, config.seed)
        loop = pooled_ratio(emitted, rounds, resamples)
        other = pooled_ratio(sum(c.emitted for c in counts), sum(c.rounds for c in counts), resamples)
        taus = (float(ratio.value[-1]) for ratio in (loop, other))
        difference = loop.minus(other).estimates()[MEAN]
        sums = (len(looped), int(rounds.sum()))
        found.append(Agreement(method.name, temperature, *sums, *taus, tuple(differences), difference))
    return found


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
