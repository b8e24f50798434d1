"""Measures pretraining's tokens/s beside transformers' own module used plainly.

    python -m benchmarks.pretraining

Every rung adds one change to the rung above. The rungs take an optimizer step in turn, round after round; medians over the
rounds. Only tokens of documents count, not padding. All rungs use the same class: the last line compares the logits of one
model by transformers' own functions and by ours.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.result import in_turn, option_parser, run, seconds
from hyperdflash.data.chat import encode
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.report.tables import Block, Table
from hyperdflash.targets.deepseek_v4.build import build_target, set_implementations, tiny_config
from tiny_target.corpus.embedded import load_embedded
from tiny_target.pretraining import PretrainSettings, make_optimizer, pack, plant_loops, train_step

PLAIN = {"packed": False, "attention": "eager", "experts": "eager", "sinkhorn_iters": 20, "bf16": False, "compile": False}
CHANGES = (  # a rung's name -> its change from the rung above
    ("transformers, plain", {}),
    ("+ packed rows", {"packed": True}),
    ("+ windowed attention", {"attention": "windowed"}),
    ("+ dense experts", {"experts": "dense"}),
    ("+ 4 Sinkhorn iterations of 20", {"sinkhorn_iters": 4}),
    ("+ bf16 autocast", {"bf16": True}),
    ("+ torch.compile of the layers", {"compile": True}),
)


def ladder() -> dict[str, SimpleNamespace]:
    """Returns the rungs' options by name, from transformers' own (fp32, documents padded side by side) to ours."""
    rungs, options = {}, PLAIN
    for name, change in CHANGES:
        options = options | change
        rungs[name] = SimpleNamespace(**options)
    return rungs


class Trainer:
    """Makes one optimizer step of a new model at a time."""

    def __init__(self, rung: SimpleNamespace, settings: PretrainSettings, documents: Sequence[Tensor], config: dict):
        self.settings = replace(settings, bf16=rung.bf16)
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
        """Returns batches of as many tokens as a packed one, shorter documents padded to the longest."""
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
        """Makes one optimizer step; returns document tokens per second."""
        rows, tokens = self.batches[self.done % len(self.batches)]
        generator = torch.Generator().manual_seed(self.done)
        rows, copies = plant_loops(rows, self.settings.loop_share, torch.tensor([0]), generator)
        self.done += 1
        return tokens / seconds(lambda: train_step(self.model, self.mtp, self.optimizer, rows, copies, self.settings))


@torch.no_grad()
def largest_logit_difference(rows: Tensor, config: dict) -> float:
    """Returns max |difference| of the logits by transformers' own functions and by ours on the same weights, fp32."""
    model, mtp = build_target(tiny_config(**config), seed=0)
    ours = model(rows[:, :-1], use_cache=False).logits
    set_implementations(model, mtp, attention="eager", experts="eager")
    return float((model(rows[:, :-1], use_cache=False).logits - ours).abs().max())


def measure(options: Namespace) -> dict:
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer("assets/tiny")
    documents = [encode(conversation, tokenizer).input_ids for conversation in load_embedded("train")[:4000]]
    config = {"vocab_size": len(tokenizer)}
    trainers = {name: Trainer(rung, PretrainSettings(), documents, config) for name, rung in ladder().items()}
    sides = {name: lambda _, trainer=trainer: trainer.step() for name, trainer in trainers.items()}
    rates = in_turn(sides, options.rounds, "bench pretraining", warm_up=2)
    rows = next(reversed(trainers.values())).batches[0][0]
    return {"tokens_per_s": rates, "largest_logit_difference": largest_logit_difference(rows, config)}


def blocks(record: dict) -> list[Block]:
    """Returns tokens/s (median, and the middle half), ratios to the first rung and the one above (medians over rounds)."""
    rates, rows, above = record["tokens_per_s"], [], None
    first = next(iter(rates))

    def ratio(name: str, other: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True)):.2f}"

    for name, own in rates.items():
        low, middle, high = statistics.quantiles(own, n=4)
        rows.append(
            [name, f"{middle:,.0f}", f"{low:,.0f} to {high:,.0f}", ratio(name, first), ratio(name, above) if above else ""]
        )
        above = name
    difference = f"{record['largest_logit_difference']:.1e}"
    return [
        Table(["rung", "tokens/s", "middle half", "against plain", "against the rung above"], rows),
        f"Largest difference between logits by transformers' own functions and by ours: {difference}.",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    run(option_parser("pretraining", __doc__, rounds=10, threads=2), measure, blocks, arguments)


if __name__ == "__main__":
    main()
