"""Where the time of a round goes by batch size, and whether it grows with the text. Needs the runs that an evaluation needs.

    python -m src.bench.decoding --out experiments/<date>-bench-decoding

1. batch sizes   B rows in lockstep at equal lengths (the same prompt B times, T = 0), all methods prompt by prompt in turn
2. growth        texts of 1,100 new tokens that no end token stops: median round around 100 and around 1,000 new tokens
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tqdm import tqdm

from src.corpus.chat import encode_prompt
from src.corpus.prompts import load_eval_prompts
from src.corpus.tokenizer import load_tokenizer, special_ids
from src.decode.drafters import Autoregressive, LoopDrafter, loop_drafter
from src.decode.loop import Generation, collect, speculate
from src.entry import CONF
from src.lit.methods import make_methods
from src.lit.record import environment_record, write_json
from src.report.cost import RoundTimes, write_cost_report
from src.report.records import AUTOREGRESSIVE
from src.report.tables import markdown_table
from src.target.load import Target
from src.target.session import TargetSession

EARLY, LATE, SPAN = 100, 1000, 50  # new tokens: rounds that begin within SPAN of these are compared


@dataclass(frozen=True)
class Growth:
    """Median milliseconds of a round's parts around EARLY and around LATE new tokens."""

    method: str
    early: tuple[float, float, float]
    late: tuple[float, float, float]


def decode(
    target: Target, drafter: LoopDrafter, prompt: Sequence[int], rows: int, max_new_tokens: int, stop_ids: set[int]
) -> Generation:
    with TargetSession(target.model, drafter.layer_ids) as session:
        events = speculate(session, drafter, prompt, max_new_tokens=max_new_tokens, stop_ids=stop_ids, copies=rows)
        return collect(events, stop_ids)


def by_batch_size(
    target: Target,
    drafters: dict[str, LoopDrafter],
    prompts: Sequence[Sequence[int]],
    batch_sizes: Sequence[int],
    max_new_tokens: int,
    stop_ids: set[int],
) -> list[RoundTimes]:
    """All rounds of every method at every batch size; the first method rotates."""
    found: dict[tuple[str, int], list[Generation]] = {(name, size): [] for size in batch_sizes for name in drafters}
    with tqdm(total=len(found) * len(prompts), desc="batch sizes", unit="text", mininterval=2) as bar:
        for size in batch_sizes:
            for index, prompt in enumerate(prompts):
                names = list(drafters)
                for name in names[index % len(names) :] + names[: index % len(names)]:
                    found[name, size].append(decode(target, drafters[name], prompt, size, max_new_tokens, stop_ids))
                    bar.update()
    times = []
    for (name, size), generations in found.items():
        rounds = [r for g in generations for r in g.rounds]
        draft, verify, rest = (np.array([getattr(r.seconds, part) for r in rounds]) for part in ("draft", "verify", "rest"))
        emitted = np.array([size * len(r.emitted) for r in rounds])
        first = np.array([g.first.seconds.total for g in generations])
        times.append(RoundTimes(name, size, draft, verify, rest, emitted, first))
    return times


def growth(target: Target, drafters: dict[str, LoopDrafter], prompts: Sequence[Sequence[int]]) -> list[Growth]:
    """Texts long enough to compare, all methods prompt by prompt in turn."""
    parts: dict[str, dict[int, list]] = {name: {EARLY: [], LATE: []} for name in drafters}
    for prompt in tqdm(prompts, desc="growth", unit="prompt", mininterval=2):
        for name, drafter in drafters.items():
            for r in decode(target, drafter, prompt, 1, LATE + 2 * SPAN, set()).rounds:
                for place in (EARLY, LATE):
                    if abs(r.anchor - len(prompt) - place) <= SPAN:
                        parts[name][place].append((r.seconds.draft, r.seconds.verify, r.seconds.rest))
    return [
        Growth(name, *(tuple(1e3 * np.median(np.array(found[place]), axis=0)) for place in (EARLY, LATE)))
        for name, found in parts.items()
    ]


def growth_markdown(found: Sequence[Growth]) -> str:
    """The same forward of the target stands in every method's T_verify; its growth is AR's."""
    rows = []
    for g in found:
        ratios = [sum(g.late) / sum(g.early), g.late[1] / g.early[1], (g.late[0] + g.late[2]) / (g.early[0] + g.early[2])]
        rows.append([g.method, *(f"{v:.2f}" for v in (*g.early, *g.late)), *(f"{v:.2f}" for v in ratios)])
    header = ["Method", *(f"{part} at {place}" for place in (EARLY, LATE) for part in ("T_draft", "T_verify", "T_rest"))]
    header += ["round, late / early", "T_verify", "T_draft + T_rest"]
    note = f"Milliseconds, medians of rounds within {SPAN} new tokens of {EARLY} and of {LATE}; batch size 1, T = 0."
    return "\n".join([*markdown_table(header, rows), "", note, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m src.bench.decoding", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-decoding"))
    parser.add_argument("--prompts", type=int, default=4, help="of each domain")
    parser.add_argument("--long-prompts", type=int, default=2, help="texts of 1,100 tokens a method; 0: no growth")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--compare", default="paper", help="an option of conf/compare")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the evaluation's configuration, e.g. target=deep")
    options = parser.parse_args(arguments)
    with initialize_config_dir(CONF, version_base="1.3"):
        config = compose("evaluate", [f"compare={options.compare}", *options.overrides])
        methods = make_methods(config)
    torch.set_num_threads(config.threads)
    target, tokenizer = instantiate(config.target), load_tokenizer(config.target.path)
    drafters: dict[str, LoopDrafter] = {AUTOREGRESSIVE: Autoregressive()}
    drafters |= {m.name: loop_drafter(m.drafter(config, target.heads), target.heads) for m in methods}
    domains = [load_eval_prompts(domain)[: options.prompts] for domain in ("math", "code", "chat")]
    prompts = [encode_prompt(prompt, tokenizer) for group in zip(*domains, strict=True) for prompt in group]
    stop_ids = {special_ids(tokenizer, config.target.mask_token_id).eos}
    decode(target, drafters[AUTOREGRESSIVE], prompts[0], 1, 16, stop_ids)  # warm up

    setting = (
        f"Target {config.target.path} ({target.fingerprint}), {len(prompts)} prompts, {config.threads} threads, CPU, T = 0"
    )
    times = by_batch_size(target, drafters, prompts, options.batch_sizes, options.max_new_tokens, stop_ids)
    written = write_cost_report(times, options.out, setting)
    if options.long_prompts:
        text = growth_markdown(growth(target, drafters, prompts[: options.long_prompts]))
        (options.out / "growth.md").write_text(f"{setting}.\n\n{text}")
        written.append(options.out / "growth.md")
    command = "python -m src.bench.decoding" + "".join(f" {a}" for a in arguments or [])
    write_json(options.out / "environment.json", environment_record(command))
    print((options.out / "cost.md").read_text())
    print(f"wrote {', '.join(path.name for path in written)} in {options.out}")


if __name__ == "__main__":
    main()
