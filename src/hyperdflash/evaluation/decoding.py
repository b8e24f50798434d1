"""Measures methods by decoding: every method on each prompt in turn, timed, in one process.

1. methods      plain autoregressive decoding (AR), then those of the configuration
2. decode       evaluation.conversations, each turn by the draft-verify loop
3. check        T = 0: the text equals AR's, or the gap of the logits is that of a tie
4. report       from rows.jsonl the paper's tables, Figure 1, and whether the texts are AR's
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyperdflash.contracts import Rounds
from hyperdflash.data.prompts import Prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.loop import Generation, decode
from hyperdflash.decoding.metrics import document_counts
from hyperdflash.drafting.proposer import Autoregressive, Proposer
from hyperdflash.evaluation.conversations import answer_all, samples_of, write_evaluation
from hyperdflash.evaluation.methods import Method, make_methods
from hyperdflash.options import instantiate
from hyperdflash.preparing.job import StatesJob
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.measure import AUTOREGRESSIVE as AR
from hyperdflash.report.measure import Sample
from hyperdflash.report.tables import Block, Table, markdown
from hyperdflash.settings import natural_int, number_between, positive_int
from hyperdflash.targets.load import Target
from hyperdflash.targets.sampling import Sampler, generator_for

# Largest gap of two logits that rounding can reverse: a forward over one token and one over seven round differently.
TIE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


def evaluate_by_decoding(config: DictConfig) -> Path:
    """Decodes, then writes the report; returns the folder."""
    natural_int("seed", config.seed)
    if not OmegaConf.is_list(config.stop) or not config.stop:
        raise ValueError(f"stop must be a list such as [0,0.3], got {config.stop!r}")
    if config.threads:
        torch.set_num_threads(positive_int("threads", config.threads))
    methods = make_methods(config)
    target = StatesJob(config).load()
    tokenizer = load_tokenizer(config.target.path)
    rows = decode_all(config, methods, target, tokenizer)
    eos_id = special_ids(tokenizer, config.target.mask_token_id).eos
    runs = {row_name(method, stop): method.run_id for method in methods for stop in config.stop}
    report(rows, config, runs, target.fingerprint, eos_id)
    return Path(config.out)


def row_name(method: Method, stop: float) -> str:
    return f"{method.name}, stop {number_between('stop', stop, 0, 1):g}" if stop else method.name


def decode_all(config: DictConfig, methods: Sequence[Method], target: Target, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Returns the rows of every method on every prompt."""
    benchmark: Prompts = instantiate(config.benchmarks)
    stop_ids = {special_ids(tokenizer, config.target.mask_token_id).eos}
    drafters: dict[str, Proposer] = {AR: Autoregressive()}
    for method in methods:
        module = method.drafter(config, target.heads)
        for stop in config.stop:
            drafter = drafters[row_name(method, stop)] = method.loop_drafter(config, target.heads, module)
            drafter.stop = stop

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
        "stop": list(config.stop),
        "data": {method.name: method.data for method in methods},
        "threads": torch.get_num_threads(),
        "device": str(target.model.device),
    }
    return answer_all(config, identity, benchmark, tokenizer, list(drafters), answer, complete=complete)


def report(rows: Sequence[dict], config: DictConfig, run_ids: dict[str, str], fingerprint: str, eos_id: int) -> None:
    """Writes paper.md with its companions, lossless.md and evaluation.json; ``run_ids`` per method."""
    texts = {"lossless.md": lossless_markdown([row for row in rows if row["temperature"] == 0])}
    target = {"path": str(config.target.path), "fingerprint": fingerprint}
    record = {"target": target, "prompts": len(rows), "runs": run_ids, "drafted": drafted_counts(rows)}
    samples = decoded_samples(rows, eos_id, run_ids)
    write_evaluation(samples, config, f"{config.target.path} ({fingerprint})", texts, record)


def decoded_samples(rows: Sequence[dict], eos_id: int, run_ids: dict[str, str]) -> list[Sample]:
    """Returns a sample per method, mode and temperature."""

    def count(name: str, prompts: list[list[dict]]) -> tuple[PromptCounts, list[float]]:
        found = [(index, turn, r) for index, own in enumerate(prompts) for turn in own for r in turn["rounds"]]
        num_slots = max((len(drafted) for _, _, (_, drafted, *_) in found), default=0)
        left = [len(turn["prompt_ids"]) + len(turn["ids"]) - 1 - r[0] for _, turn, r in found]  # tokens behind the anchor
        table = [(index, r[0], r[2], r[3], min(len(r[1]), n)) for (index, _, r), n in zip(found, left, strict=True)]
        rounds = Rounds(*torch.tensor(table, dtype=torch.int64).view(-1, 5).unbind(dim=1), num_slots=num_slots)
        seconds = [sum(sum(r[4:]) for turn in own for r in turn["rounds"]) for own in prompts]
        return document_counts(rounds, len(prompts)), seconds

    return samples_of(rows, eos_id, run_ids, count)


def drafted_counts(rows: Sequence[dict]) -> dict[str, dict[int, int]]:
    """Returns per method how many rounds at temperature 0 drafted n tokens, those that the end of a text cut left out."""
    found: dict[str, Counter] = {}
    for row in (row for row in rows if row["temperature"] == 0):
        for name, turns in row["methods"].items():
            rounds = (drafted for turn in turns for _, drafted, accepted, emitted, *_ in turn["rounds"] if emitted > accepted)
            found.setdefault(name, Counter()).update(map(len, rounds))
    return {name: dict(sorted(counts.items())) for name, counts in found.items()}


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


@torch.inference_mode()
def compare_greedy(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    expected: Sequence[int],
    got: Sequence[int],
    tolerance: float | None = None,
) -> dict | None:
    """Finds the first difference of two greedy texts; None where they are equal. Returns its ``position`` among the new tokens,
    both ids (None past a text's end), the ``gap`` from the target's best logit to the lower of the two, and whether it is a
    ``tie``: a gap of at most ``tolerance``, by default ``TIE``."""
    if tuple(expected) == tuple(got):
        return None
    shared = zip(expected, got, strict=False)
    position = next((i for i, (a, b) in enumerate(shared) if a != b), min(len(expected), len(got)))
    a, b = (ids[position] if position < len(ids) else None for ids in (expected, got))
    gap = float("inf")
    if a is not None and b is not None:
        text = torch.tensor([[*prompt_ids, *expected[:position]]], device=model.device)
        logits = model(text, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        gap = float(logits.max() - torch.minimum(logits[a], logits[b]))
    tie = gap <= (TIE[model.dtype] if tolerance is None else tolerance)
    return {"position": position, "expected_id": a, "got_id": b, "gap": gap, "tie": tie}


def compare_texts(model: PreTrainedModel, rows: dict[str, list[dict]]) -> None:
    """Adds ``differs`` to every turn whose greedy text is not AR's: position, gap of the logits, and whether it is a tie. Turns
    after a difference have another history, so ``compared`` is False there."""
    for turns in rows.values():
        parted = False
        for index, turn in enumerate(turns):
            if parted:
                turn["compared"] = False
                continue
            found = compare_greedy(model, turn["prompt_ids"], rows[AR][index]["ids"], turn["ids"])
            if found is not None:
                turn["differs"], parted = found, True


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
