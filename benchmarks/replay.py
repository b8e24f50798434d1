"""What replay costs: beside the matrix products of drafting from all positions, and beside decoding the same texts.

    python -m benchmarks.replay
    python -m benchmarks.replay --prompts 0        # without the loop, which needs the runs that an evaluation needs

1. products  the drafter, the document and the vocabulary of the training step's bench (benchmarks/shapes.py), every position
             an anchor; the products are the forward ones of benchmarks/flops.py of all slots, each at its own measured rate. A
             slot after a rejected one does not reach the LM head: once every draft is kept, the most that replay can cost,
             and once half of them, about what trained drafters have on the tiny target
2. loop      every method writes its greedy texts; their states are taken in one forward of the target and replayed

T = 0. Times are of the processor (time.process_time) on one thread, each after one of its kind that is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from benchmarks.flops import Product, products
from benchmarks.own_step import TORCH_DTYPES, Setup, build
from benchmarks.peak import product_rates
from benchmarks.result import environment, option_parser, write_result
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
from hyperdflash.report.tables import markdown_table
from hyperdflash.states.capture import live_states
from hyperdflash.states.store import make_shards
from hyperdflash.targets.load import Target
from hyperdflash.targets.producer import InProcess

MOST = 1.5  # replay's time, times that of its products, at most


def replayed(shape: StepShape) -> StepShape:
    """With an anchor at every position that ``products`` allows one."""
    return replace(shape, num_anchors=shape.num_tokens - shape.block_size - 1)


def forward_products(case: Case) -> list[Product]:
    """Of drafting and reading the LM head, without a teacher."""
    drafted = [p for p in products(case) if p.name != "teacher's LM head"]
    return [replace(p, parts=("forward",), flops=p.flops // len(p.parts)) for p in drafted]


def measure(shape: StepShape, dtype: str, kept: str, rounds: int, rate_s: float) -> dict:
    """Of a text whose drafts are kept ("all", or "half" of them), medians over ``rounds``: ``replay_s``; ``matmul_s``, each
    product at its own rate; their ``ratio`` round by round; ``peak_ratio``, all products at the rate of the fastest; ``gflop``.
    """
    case = Case(replayed(shape), dtype, "own")
    setup, wanted = build(case), forward_products(case)
    setup.states.loss_mask[:, 0] = False  # replay wants a prompt
    keep_drafts(setup, kept)
    flops = sum(p.flops for p in wanted)
    drafter, replay_s, matmul_s, peak_s = setup.drafter.eval(), [], [], []
    for number in range(rounds + 1):
        started = time.process_time()
        with fast_fp32_products():
            replay(drafter, setup.states, setup.heads, temperature=0.0)
        taken = time.process_time() - started
        rates = {r["name"]: r["flops_per_s"] for r in product_rates(wanted, TORCH_DTYPES[dtype], rate_s)}
        if number > 0:  # the first one compiles
            replay_s.append(taken)
            matmul_s.append(sum(p.flops / rates[p.name] for p in wanted))
            peak_s.append(flops / max(rates.values()))
    return {
        "shape": shape.name,
        "dtype": dtype,
        "kept": kept,
        "anchors": case.shape.num_anchors,
        "gflop": flops / 1e9,
        "replay_s": statistics.median(replay_s),
        "matmul_s": statistics.median(matmul_s),
        "ratio": statistics.median(r / m for r, m in zip(replay_s, matmul_s, strict=True)),
        "peak_ratio": statistics.median(r / m for r, m in zip(replay_s, peak_s, strict=True)),
    }


def keep_drafts(setup: Setup, kept: str) -> None:
    """All logits become equal, of which the first counts as the largest: a draft of token 0 is kept, one of token 1 is not."""
    setup.heads.lm_head.weight.zero_()
    if kept == "half":
        setup.states.input_ids.random_(0, 2, generator=setup.generator)
    else:
        setup.states.input_ids.zero_()


@dataclass(frozen=True)
class Drafters:
    """One drafter in the form of replay and in that of the loop, and the layers it taps."""

    module: DraftModel
    loop: Proposer
    layer_ids: tuple[int, ...]


def beside_loop(
    target: Target, tokenizer, methods: dict[str, Drafters], conversations: Sequence[Conversation], max_new_tokens: int
) -> list[dict]:
    """For each method its tau by the loop and by replay of the loop's texts, and the seconds of the loop, of the forward that
    takes the states, and of replay (median of 5)."""
    stop_ids = {special_ids(tokenizer).eos}
    prompts = [encode_prompt(conversation, tokenizer) for conversation in conversations]
    rows = []
    with tqdm(total=len(methods) * len(prompts), desc="loop", unit="text", mininterval=2) as bar:
        for name, drafters in methods.items():
            documents, generations, loop_s = [], [], 0.0
            decode(target.model, drafters.loop, prompts[0], max_new_tokens=max_new_tokens, stop_ids=stop_ids)
            for conversation, prompt in zip(conversations, prompts, strict=True):
                started = time.process_time()
                generations.append(
                    decode(target.model, drafters.loop, prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
                )
                loop_s += time.process_time() - started
                documents.append(training_document(conversation, generations[-1].token_ids, tokenizer))
                bar.update()
            (shard,) = make_shards(documents, len(documents))
            for _ in range(2):
                started = time.process_time()
                states = live_states(InProcess(target), shard, drafters.layer_ids, drafters.loop.codec)
                states_s = time.process_time() - started
            replay(drafters.module, states, target.heads, temperature=0.0)
            replay_s = []
            for _ in range(5):
                started = time.process_time()
                rounds = replay(drafters.module, states, target.heads, temperature=0.0)
                replay_s.append(time.process_time() - started)
            looped = loop_rounds(generations, drafters.module.num_slots)
            taus = {"loop_tau": tau_of(looped), "replay_tau": tau_of(rounds)}
            times = {"loop_s": loop_s, "states_s": states_s, "replay_s": statistics.median(replay_s)}
            rows.append({"method": name, "texts": len(prompts), **taus, **times})
    return rows


def methods_of(config: DictConfig, target: Target) -> dict[str, Drafters]:
    """The methods of an evaluation."""
    made = {}
    for method in make_methods(config):
        module = method.drafter(config, target.heads)
        made[method.name] = Drafters(module, method.loop_drafter(config, target.heads, module), method.layer_ids)
    return made


def loop_markdown(rows: Sequence[dict]) -> str:
    cells = [
        [
            *(r["method"], str(r["texts"]), f"{r['loop_tau']:.3f}", f"{r['replay_tau']:.3f}"),
            *(f"{r[key]:.2f}" for key in ("loop_s", "states_s", "replay_s")),
            *(f"{r['loop_s'] / seconds:.1f}" for seconds in (r["replay_s"], r["replay_s"] + r["states_s"])),
        ]
        for r in rows
    ]
    header = ["Method", "texts", "tau, loop", "tau, replay", "loop, s", "states, s", "replay, s"]
    return "\n".join([*markdown_table([*header, "loop / replay", "loop / (states + replay)"], cells), ""])


def markdown(rows: Sequence[dict]) -> str:
    cells = [
        [
            *(r["shape"], r["dtype"], r["kept"], str(r["anchors"]), f"{r['gflop']:.1f}"),
            *(f"{1e3 * r['replay_s']:.0f}", f"{1e3 * r['matmul_s']:.0f}", f"{r['peak_ratio']:.2f}", f"{r['ratio']:.2f}"),
            "met" if r["ratio"] <= MOST else "**not met**",
        ]
        for r in rows
    ]
    header = ["Shape", "dtype", "drafts kept", "anchors", "GFLOP", "replay, ms", "products, ms"]
    header += ["replay / FLOPs at peak", "replay / products", f"at most {MOST}"]
    note = f"Products of all slots of all blocks, drafting and LM head, those that replay leaves out too. Threshold: {MOST}."
    return "\n".join([*markdown_table(header, cells), "", note]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("replay", __doc__, rounds=7)
    parser.add_argument("--prompts", type=int, default=8, help="of each domain, for the loop; 0: no loop")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the evaluation's configuration, e.g. target=deep")
    options = parser.parse_args(arguments)
    measured_in = environment("replay", arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("evaluate", options.overrides)
        target = instantiate(config.target) if options.prompts else None
        methods = methods_of(config, target) if options.prompts else {}
    cases = [(shape, dtype, kept) for shape in (SHAPES[0], SHAPES[2]) for dtype in DTYPES for kept in ("half", "all")]
    rows = [measure(*case, options.rounds, 0.02) for case in tqdm(cases, desc="replay", unit="case", mininterval=2)]
    lines, loop = markdown(rows).splitlines(), []
    if methods:
        prompts = [p for domain in ("math", "code", "chat") for p in load_eval_prompts(domain)[: options.prompts]]
        conversations = [user_rounds(prompt)[0] for prompt in prompts]
        loop = beside_loop(target, load_tokenizer(config.target.path), methods, conversations, max_new_tokens=96)
        lines += ["", *loop_markdown(loop).splitlines()]
    write_result(options.out, "replay", {"rows": rows, "loop": loop}, lines, measured_in)


if __name__ == "__main__":
    main()
