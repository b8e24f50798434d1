"""Where the time of a round goes by batch size, and whether it grows with the text. Needs the runs that an evaluation needs.

    python -m benchmarks.decoding

1. batch sizes   B rows in lockstep at equal lengths (the same prompt B times, T = 0), all methods prompt by prompt in turn
2. growth        texts that no end token stops: median rounds after 100 and after 1,000 new tokens, measured in turn
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tqdm import tqdm

from benchmarks.result import environment, option_parser, write_result
from hyperdflash.data.chat import encode_prompt
from hyperdflash.data.prompts import load_eval_prompts
from hyperdflash.data.tokenizer import load_tokenizer, special_ids
from hyperdflash.decoding.loop import Generation, decode
from hyperdflash.drafting.proposer import Autoregressive, Proposer
from hyperdflash.evaluation.decoding_report import round_times
from hyperdflash.evaluation.methods import make_methods
from hyperdflash.identity import CONF
from hyperdflash.planning.cost import RoundTimes, cost_figure, cost_markdown, costs
from hyperdflash.report.measure import AUTOREGRESSIVE
from hyperdflash.report.tables import jsonable, markdown_table
from hyperdflash.targets.load import Target

EARLY, LATE, SPAN = 100, 1000, 48  # new tokens: the rounds of the SPAN tokens after EARLY and after LATE are compared
REPEATS = 4


@dataclass(frozen=True)
class Growth:
    """Median milliseconds of a round's parts (draft, verify, rest) after EARLY and after LATE new tokens."""

    method: str
    early: tuple[float, float, float]
    late: tuple[float, float, float]


def by_batch_size(
    target: Target,
    drafters: dict[str, Proposer],
    prompts: Sequence[Sequence[int]],
    batch_sizes: Sequence[int],
    max_new_tokens: int,
    stop_ids: set[int],
) -> list[RoundTimes]:
    """All rounds of every method at every batch size; the first method rotates."""
    settings = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids}
    found: dict[tuple[str, int], list[Generation]] = {(name, size): [] for size in batch_sizes for name in drafters}
    with tqdm(total=len(found) * len(prompts), desc="batch sizes", unit="text", mininterval=2) as bar:
        for size in batch_sizes:
            for index, prompt in enumerate(prompts):
                names = list(drafters)
                for name in names[index % len(names) :] + names[: index % len(names)]:
                    found[name, size].append(decode(target.model, drafters[name], prompt, copies=size, **settings))
                    bar.update()
    return [round_times(name, generations, size) for (name, size), generations in found.items()]


def growth(target: Target, drafters: dict[str, Proposer], prompts: Sequence[Sequence[int]]) -> list[Growth]:
    """Rounds after EARLY and after LATE tokens of the same text, one after the other, method by method and again REPEATS
    times, another one first each time: a slow moment of the machine falls on both places and on all methods alike."""
    parts: dict[tuple[str, int], list] = {(name, place): [] for name in drafters for place in (EARLY, LATE)}
    with tqdm(total=len(prompts) * (1 + REPEATS * len(parts)), desc="growth", unit="span", mininterval=2) as bar:
        texts = []
        for prompt in prompts:
            text = decode(target.model, Autoregressive(), prompt, stop_ids=(), max_new_tokens=LATE).token_ids
            texts.append({place: [*prompt, *text[:place]] for place in (EARLY, LATE)})
            bar.update()
        names = list(drafters)
        for repeat in range(REPEATS):
            for text in texts:
                for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                    for place in (EARLY, LATE) if repeat % 2 else (LATE, EARLY):
                        found = decode(target.model, drafters[name], text[place], stop_ids=(), max_new_tokens=SPAN)
                        parts[name, place] += [(r.seconds.draft, r.seconds.verify, r.seconds.rest) for r in found.rounds]
                        bar.update()
    medians = {key: tuple(1e3 * np.median(np.array(seconds), axis=0)) for key, seconds in parts.items()}
    return [Growth(name, medians[name, EARLY], medians[name, LATE]) for name in drafters]


def growth_lines(found: Sequence[Growth]) -> list[str]:
    """The same forward of the target stands in every method's T_verify; its growth is AR's."""
    rows = []
    for g in found:
        ratios = [sum(g.late) / sum(g.early), g.late[1] / g.early[1], (g.late[0] + g.late[2]) / (g.early[0] + g.early[2])]
        rows.append([g.method, *(f"{v:.2f}" for v in (*g.early, *g.late)), *(f"{v:.2f}" for v in ratios)])
    header = ["Method", *(f"{part} at {place}" for place in (EARLY, LATE) for part in ("T_draft", "T_verify", "T_rest"))]
    header += ["round, late / early", "T_verify", "T_draft + T_rest"]
    note = (
        f"Milliseconds, medians over the rounds of {SPAN} tokens after {EARLY} and after {LATE} new ones; batch size 1, T = 0."
    )
    return [*markdown_table(header, rows), "", note]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("decoding", __doc__)
    parser.add_argument("--prompts", type=int, default=4, help="of each domain")
    parser.add_argument("--long-prompts", type=int, default=3, help="texts of 1,000 tokens; 0: no growth")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--methods", default="mtp,dflash,hyperdflash", help="names of conf/method or runs' directories")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the evaluation's configuration, e.g. target=deep")
    options = parser.parse_args(arguments)
    measured_in = environment("decoding", arguments)
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
    decode(target.model, Autoregressive(), prompts[0], max_new_tokens=16, stop_ids=stop_ids)  # warm up

    setting = (
        f"Target {config.target.path} ({target.fingerprint}), {len(prompts)} prompts, {config.threads} threads, CPU, T = 0"
    )
    times = by_batch_size(target, drafters, prompts, options.batch_sizes, options.max_new_tokens, stop_ids)
    found = costs(times)
    record = {"setting": setting, "costs": [asdict(cost) | {"ratio": cost.ratio} for cost in found]}
    lines = cost_markdown(found, setting).splitlines()
    if options.long_prompts:
        grown = growth(target, drafters, prompts[: options.long_prompts])
        record["growth"] = [asdict(one) for one in grown]
        lines += ["", "## Growth", "", *growth_lines(grown)]
    write_result(options.out, "decoding", jsonable(record), lines, measured_in)
    cost_figure(found, options.out / "decoding.png", setting)


if __name__ == "__main__":
    main()
