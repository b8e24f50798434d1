"""Measures what replay costs beside the matrix products of drafting from all positions, and beside decoding the same texts.

    python -m benchmarks.replay
    python -m benchmarks.replay --prompts 0        # without the loop, which needs the runs that an evaluation needs

1. products  the drafter, the document and the vocabulary of the training step's benchmark (benchmarks/shapes.py), every
             position an anchor; benchmarks/products.py lists the products of all slots, each timed by itself. A slot after a
             rejected one does not reach the LM head, so replay runs once with every draft kept, which is the most that it can
             cost, and once with half of them, about the share of trained drafters on the tiny target
2. loop      every method writes its greedy texts; their states are taken in one forward of the target and replayed

T = 0. Times are of the processor (time.process_time) on one thread, each after one of its kind that is not counted.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from hydra import compose, initialize_config_dir
from tqdm import tqdm

from benchmarks.own_step import TORCH_DTYPES, Setup, build
from benchmarks.products import products, rate
from benchmarks.result import option_parser, run, seconds, verdict
from benchmarks.shapes import DTYPES, SHAPES, Case, StepShape
from hyperdflash.checks.traces import training_document
from hyperdflash.contracts import Conversation
from hyperdflash.data.chat import encode_prompt, user_rounds
from hyperdflash.data.prompts import load_eval_prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.loop import decode, loop_rounds
from hyperdflash.decoding.metrics import tau_of
from hyperdflash.decoding.replay import replay
from hyperdflash.drafting.draft_model import DraftModel
from hyperdflash.drafting.proposer import Proposer
from hyperdflash.evaluation.methods import make_methods
from hyperdflash.identity import CONF
from hyperdflash.numerics import fast_fp32_products, keep_freed_memory
from hyperdflash.options import instantiate
from hyperdflash.report.tables import Block, Table
from hyperdflash.states.readers import computed_states
from hyperdflash.states.store import collate, make_shards
from hyperdflash.targets.load import Target
from hyperdflash.targets.producer import InProcess

MOST = 1.5  # replay's time, times that of its products, at most
cpu_seconds = partial(seconds, clock=time.process_time)


def replayed(shape: StepShape) -> StepShape:
    """Returns ``shape`` with an anchor at every position that ``products`` allows one."""
    return replace(shape, num_anchors=shape.num_tokens - shape.block_size - 1)


def beside_products(shape: StepShape, dtype: str, kept: str, rounds: int, rate_s: float) -> dict:
    """Returns medians over ``rounds`` for a text whose drafts are kept ("all", or "half" of them): ``replay_s``; ``matmul_s``,
    each product at its own rate; their ``ratio`` round by round; ``peak_ratio``, all products at the rate of the fastest."""
    case = Case(replayed(shape), dtype, "own")
    setup, wanted = build(case), products(case.shape)
    setup.states.loss_mask[:, 0] = False  # replay needs a prompt
    keep_drafts(setup, kept)
    setup.drafter.eval()
    flops = sum(p.flops for p in wanted)
    times = []
    for number in range(rounds + 1):
        with fast_fp32_products():
            taken = cpu_seconds(lambda: replay(setup.drafter, setup.states, setup.heads, temperature=0.0))
        rates = [rate(product, TORCH_DTYPES[dtype], rate_s) for product in wanted]
        if number > 0:  # the first round compiles
            times.append((taken, sum(p.flops / r for p, r in zip(wanted, rates, strict=True)), flops / max(rates)))
    return {
        "shape": shape.name,
        "dtype": dtype,
        "kept": kept,
        "anchors": case.shape.num_anchors,
        "gflop": flops / 1e9,
        "replay_s": statistics.median(taken for taken, _, _ in times),
        "matmul_s": statistics.median(matmul for _, matmul, _ in times),
        "ratio": statistics.median(taken / matmul for taken, matmul, _ in times),
        "peak_ratio": statistics.median(taken / peak for taken, _, peak in times),
    }


def keep_drafts(setup: Setup, kept: str) -> None:
    """Makes all logits equal, of which the first counts as the largest: a draft of token 0 is kept, one of token 1 is not."""
    setup.heads.lm_head.weight.zero_()
    if kept == "half":
        setup.states.input_ids.random_(0, 2, generator=setup.generator)
    else:
        setup.states.input_ids.zero_()


# A method's drafter in the form of replay and in that of the loop, and the layers it taps
Drafters = tuple[DraftModel, Proposer, tuple[int, ...]]


def beside_loop(
    target: Target, tokenizer, methods: dict[str, Drafters], conversations: Sequence[Conversation], max_new_tokens: int
) -> list[dict]:
    """Returns per method its tau by the loop and by replay of the loop's texts, and the seconds of the loop, of the forward
    that takes the states, and of replay (median of 5)."""
    settings = {"max_new_tokens": max_new_tokens, "stop_ids": {special_ids(tokenizer).eos}}
    prompts, rows = [encode_prompt(conversation, tokenizer) for conversation in conversations], []
    for name, (module, loop, layer_ids) in tqdm(methods.items(), desc="loop", unit="method", mininterval=2):
        decode(target.model, loop, prompts[0], **settings)
        started = time.process_time()
        texts = [decode(target.model, loop, prompt, **settings) for prompt in prompts]
        loop_s = time.process_time() - started
        documents = [training_document(c, text.token_ids, tokenizer) for c, text in zip(conversations, texts, strict=True)]
        (shard,) = make_shards(documents, len(documents))
        take = partial(computed_states, InProcess(target), shard, layer_ids, loop.codec)
        states = collate(take())
        again = partial(replay, module, states, target.heads, temperature=0.0)
        rounds = again()
        taus = {"loop_tau": tau_of(loop_rounds(texts, module.num_slots)), "replay_tau": tau_of(rounds)}
        times = {"states_s": cpu_seconds(take), "replay_s": statistics.median(cpu_seconds(again) for _ in range(5))}
        rows.append({"method": name, "texts": len(prompts), **taus, "loop_s": loop_s, **times})
    return rows


def measure(options: Namespace) -> dict:
    torch.set_num_threads(1)
    keep_freed_memory()
    cases = [(shape, dtype, kept) for shape in (SHAPES[0], SHAPES[2]) for dtype in DTYPES for kept in ("half", "all")]
    rows = [beside_products(*case, options.rounds, 0.02) for case in tqdm(cases, desc="replay", unit="case", mininterval=2)]
    if not options.prompts:
        return {"rows": rows, "loop": []}
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("evaluate", options.overrides)
        target = instantiate(config.target)
        made = [(method, method.drafter(config, target.heads)) for method in make_methods(config)]
        methods = {m.name: (drafter, m.loop_drafter(config, target.heads, drafter), m.layer_ids) for m, drafter in made}
    prompts = [p for domain in ("math", "code", "chat") for p in load_eval_prompts(domain)[: options.prompts]]
    conversations = [user_rounds(prompt)[0] for prompt in prompts]
    tokenizer = load_tokenizer(config.target.path)
    return {"rows": rows, "loop": beside_loop(target, tokenizer, methods, conversations, max_new_tokens=96)}


def blocks(record: dict) -> list[Block]:
    cells = [
        [
            *(r["shape"], r["dtype"], r["kept"], str(r["anchors"]), f"{r['gflop']:.1f}"),
            *(f"{1e3 * r['replay_s']:.0f}", f"{1e3 * r['matmul_s']:.0f}", f"{r['peak_ratio']:.2f}", f"{r['ratio']:.2f}"),
            verdict(r["ratio"] <= MOST),
        ]
        for r in record["rows"]
    ]
    header = ["Shape", "dtype", "drafts kept", "anchors", "GFLOP", "replay, ms", "products, ms"]
    header += ["replay / FLOPs at peak", "replay / products", f"at most {MOST}"]
    note = "Products of all slots of all blocks, drafting and LM head, those that replay leaves out too."
    found = [Table(header, cells), note]
    loop = [
        [
            *(r["method"], str(r["texts"]), f"{r['loop_tau']:.3f}", f"{r['replay_tau']:.3f}"),
            *(f"{r[key]:.2f}" for key in ("loop_s", "states_s", "replay_s")),
            *(f"{r['loop_s'] / seconds:.1f}" for seconds in (r["replay_s"], r["replay_s"] + r["states_s"])),
        ]
        for r in record["loop"]
    ]
    header = ["Method", "texts", "tau, loop", "tau, replay", "loop, s", "states, s", "replay, s", "loop / replay"]
    return [*found, Table([*header, "loop / (states + replay)"], loop)] if loop else found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("replay", __doc__, rounds=7)
    parser.add_argument("--prompts", type=int, default=8, help="of each domain, for the loop; 0: no loop")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the evaluation's configuration, e.g. target=deep")
    run(parser, measure, blocks, arguments)


if __name__ == "__main__":
    main()
