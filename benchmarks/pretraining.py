"""Pretraining's tokens/s against transformers' own module used plainly, step by step, side by side in one run.

    python -m benchmarks.pretraining

Every rung adds one thing to the one above. Each rung's optimizer step is measured in turn, round after round, so that a slow
moment of the machine falls on all of them; medians over the rounds. Tokens are those of documents: padding does not count.
Then the logits of one model are compared between transformers' own functions and ours: it is the same class throughout.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.result import environment, option_parser, write_result
from hyperdflash.data.chat import encode
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.report.tables import markdown_table
from hyperdflash.targets.deepseek_v4.build import build_target, set_implementations, tiny_config
from tiny_target.corpus.embedded import load_embedded
from tiny_target.pretraining import PretrainSettings, make_optimizer, pack, plant_loops, train_step


@dataclass(frozen=True)
class Rung:
    """One way to train; defaults are transformers' own, fp32, documents padded side by side."""

    name: str
    packed: bool = False
    attention: str = "eager"
    experts: str = "eager"
    sinkhorn_iters: int = 20
    bf16: bool = False
    compile: bool = False


def ladder() -> list[Rung]:
    rungs = [Rung("transformers, plain")]
    for name, change in (
        ("+ packed rows", {"packed": True}),
        ("+ windowed attention", {"attention": "windowed"}),
        ("+ dense experts", {"experts": "dense"}),
        ("+ 4 Sinkhorn iterations of 20", {"sinkhorn_iters": 4}),
        ("+ bf16 autocast", {"bf16": True}),
        ("+ torch.compile of the layers", {"compile": True}),
    ):
        rungs.append(replace(rungs[-1], name=name, **change))
    return rungs


class Trainer:
    """A fresh model that makes one optimizer step at a time."""

    def __init__(self, rung: Rung, settings: PretrainSettings, documents: Sequence[Tensor], config: dict):
        self.name, self.settings = rung.name, replace(settings, bf16=rung.bf16)
        torch._dynamo.reset()
        self.model, self.mtp = build_target(tiny_config(**config, hc_sinkhorn_iters=rung.sinkhorn_iters), seed=0)
        set_implementations(self.model, self.mtp, attention=rung.attention, experts=rung.experts)
        self.optimizer = make_optimizer(self.model, self.mtp, settings)
        if rung.compile:
            for layer in [*self.model.model.layers, self.mtp.layer]:
                layer.compile(dynamic=False)
        self.batches = self._packed(documents) if rung.packed else self._padded(documents)
        self.done = 0

    def _packed(self, documents: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        rows = pack(documents, self.settings.context, seed=0, epoch=0).split(self.settings.batch_rows)
        return [(batch, batch[:, 1:].numel()) for batch in rows if len(batch) == self.settings.batch_rows]

    def _padded(self, documents: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
        """As many documents side by side as the packed batch has tokens; shorter ones padded to the longest."""
        budget, batches, waiting = self.settings.context * self.settings.batch_rows, [], []
        for document in documents:
            longest = max([len(document), *map(len, waiting)])
            if waiting and longest * (len(waiting) + 1) > budget:
                batches.append((torch.nn.utils.rnn.pad_sequence(waiting, batch_first=True), sum(map(len, waiting))))
                waiting = []
            waiting.append(document)
            if len(batches) == 64:
                break
        return batches

    def step(self) -> float:
        """One optimizer step -> document tokens per second."""
        rows, tokens = self.batches[self.done % len(self.batches)]
        generator = torch.Generator().manual_seed(self.done)
        rows, copies = plant_loops(rows, self.settings.loop_share, torch.tensor([0]), generator)
        self.done += 1
        started = time.perf_counter()
        train_step(self.model, self.mtp, self.optimizer, rows, copies, self.settings)
        return tokens / (time.perf_counter() - started)


@torch.no_grad()
def largest_logit_difference(rows: Tensor, config: dict) -> float:
    """Between transformers' own functions and ours on the same weights, fp32: max over |logits| differences."""
    model, mtp = build_target(tiny_config(**config), seed=0)
    ours = model(rows[:, :-1], use_cache=False).logits
    set_implementations(model, mtp, attention="eager", experts="eager")
    return float((model(rows[:, :-1], use_cache=False).logits - ours).abs().max())


def measure(
    documents: Sequence[Tensor], settings: PretrainSettings, config: dict, rounds: int, warm_up: int = 2
) -> tuple[dict[str, list[float]], float]:
    """Tokens/s of every rung in every round, and the largest difference between logits."""
    trainers = [Trainer(rung, settings, documents, config) for rung in ladder()]
    found: dict[str, list[float]] = {trainer.name: [] for trainer in trainers}
    with tqdm(total=len(trainers) * (rounds + warm_up), desc="bench pretraining", unit="step") as bar:
        for number in range(warm_up + rounds):
            for trainer in trainers:
                rate = trainer.step()
                if number >= warm_up:
                    found[trainer.name].append(rate)
                bar.update()
    return found, largest_logit_difference(trainers[-1].batches[0][0], config)


def table(rates: dict[str, list[float]], difference: float) -> list[str]:
    """Tokens/s (median, and the middle half), ratios to the first rung and the one above (medians over rounds)."""

    def ratio(name: str, other: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True)):.2f}"

    names, rows = list(rates), []
    for index, name in enumerate(names):
        low, middle, high = statistics.quantiles(rates[name], n=4)
        above = ratio(name, names[index - 1]) if index else ""
        rows.append([name, f"{middle:,.0f}", f"{low:,.0f} to {high:,.0f}", ratio(name, names[0]), above])
    header = ["rung", "tokens/s", "middle half", "against plain", "against the rung above"]
    note = f"Largest difference between logits, transformers' own functions against ours: {difference:.1e}."
    return [*markdown_table(header, rows), "", note]


def main(arguments: Sequence[str] | None = None) -> None:
    options = option_parser("pretraining", __doc__, rounds=10, threads=2).parse_args(arguments)
    torch.set_num_threads(options.threads)
    measured_in = environment("pretraining", arguments)
    tokenizer = load_tokenizer("assets/tiny")
    documents = [encode(conversation, tokenizer).input_ids for conversation in load_embedded("train")[:4000]]
    rates, difference = measure(documents, PretrainSettings(), {"vocab_size": len(tokenizer)}, options.rounds)
    record = {"tokens_per_s": rates, "largest_logit_difference": difference}
    write_result(options.out, "pretraining", record, table(rates, difference), measured_in)


if __name__ == "__main__":
    main()
