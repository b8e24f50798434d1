"""Measure methods by decoding with them: each prompt by every method in turn, timed, in one process.

1. methods      plain autoregressive decoding (AR), then those of the configuration
2. prompts      the ones that fit (src.corpus.lengths), mode by mode and temperature by temperature
3. decode       prompt by prompt all methods, another one first each time; every turn on the history its method wrote
4. check        T = 0: the text is AR's; where it is not, the gap of the logits says whether that is a tie
5. rows.jsonl   one line a prompt, appended when all methods have ended: a killed evaluation goes on behind it
6. report       the paper's tables, Figure 1 and where the time goes, all from rows.jsonl (src.report)
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerBase

from src.contracts import Rounds
from src.corpus.chat import Mode, encode_rounds, without_reasoning
from src.corpus.prompts import Prompts
from src.corpus.tokenizer import load_tokenizer, special_ids
from src.decode.agreement import compare_greedy
from src.decode.drafters import Autoregressive, LoopDrafter, loop_drafter
from src.decode.loop import Generation, collect, speculate
from src.decode.looping import ends_in_loop
from src.decode.metrics import document_counts
from src.entry import command_of
from src.lit.agreement import agreement_markdown, agreements
from src.lit.methods import Method, make_methods
from src.lit.record import environment_record, write_json
from src.lit.states import lazy_target
from src.report.bootstrap import PromptCounts
from src.report.cost import RoundTimes, write_cost_report
from src.report.paper_cells import PAPER_COLUMNS, Column, PaperCell
from src.report.paper_tables import write_paper_report
from src.report.records import AUTOREGRESSIVE
from src.report.tables import markdown_table
from src.target.load import Target, fingerprint, load_heads
from src.target.sampling import Sampler
from src.target.session import TargetSession

AR = AUTOREGRESSIVE
GENERATE = "transformers generate()"


def evaluate_by_decoding(config: DictConfig) -> Path:
    """Decode, then write the report; returns the folder."""
    if config.threads:
        torch.set_num_threads(config.threads)
    modes = list(config.mode) if OmegaConf.is_list(config.mode) else [config.mode]
    methods = make_methods(config)
    target = lazy_target(config)()
    rows = list(read_rows(decode_all(config, methods, target, modes)))
    report(rows, config, {method.name: method.run_id for method in methods})
    if config.check_replay:
        text = agreement_markdown(agreements(rows, methods, target, config))
        (Path(config.out) / "agreement.md").write_text(text)
        print(text)
    return Path(config.out)


def report(rows: Sequence[dict], config: DictConfig, run_ids: dict[str, str]) -> None:
    """From an evaluation's rows: paper.md and its companions, cost/, cost_sampled/, lossless.md, evaluation.json."""
    out, fingerprint_ = Path(config.out), fingerprint(load_heads(config.target.path))
    tokenizer = load_tokenizer(config.target.path)
    eos_id = special_ids(tokenizer, config.target.mask_token_id).eos
    cells = paper_cells(rows, config.seed, eos_id, run_ids)
    target = f"{config.target.path} ({fingerprint_})"
    columns = PAPER_COLUMNS if {row["benchmark"] for row in rows} <= {c.name for c in PAPER_COLUMNS} else _plain_columns(rows)
    names = [name for name in run_ids if name != AR]
    written = write_paper_report(cells, out, target, columns, names, config.num_resamples, config.seed)
    greedy = [row for row in rows if row["temperature"] == 0]
    setting = f"Target {target}, batch size 1, {config.benchmarks.max_new_tokens} new tokens at most, {config.threads} threads"
    for part, name in ((greedy, "cost"), ([r for r in rows if r["temperature"] > 0], "cost_sampled")):
        if part:
            written += write_cost_report(round_times(part), out / name, setting)
    (out / "lossless.md").write_text(lossless_markdown(greedy))
    write_json(
        out / "evaluation.json",
        {
            "target": {"path": str(config.target.path), "fingerprint": fingerprint_},
            "runs": run_ids,
            "prompts": len(rows),
            "environment": environment_record(command_of("src.evaluate")),
        },
    )
    print((out / "paper.md").read_text() + "\n" + (out / "lossless.md").read_text())
    written += [out / "lossless.md", out / "evaluation.json"]
    print(f"wrote {', '.join(str(path.relative_to(out)) for path in written)} in {out}")


def _plain_columns(rows: Sequence[dict]) -> tuple[Column, ...]:
    """A column a domain, for prompts that are none of the paper's."""
    return tuple(Column(name, name, "Held-out") for name in dict.fromkeys(row["benchmark"] for row in rows))


def paper_cells(rows: Sequence[dict], seed: int, eos_id: int, run_ids: dict[str, str]) -> list[PaperCell]:
    """A cell a method, benchmark, mode and temperature; the turns of a prompt are summed."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["temperature"], row["benchmark"]), []).append(row)
    cells = []
    for (mode, temperature, benchmark), prompts in groups.items():
        for name in prompts[0]["methods"]:
            turns = [(i, turn) for i, row in enumerate(prompts) for turn in row["methods"][name]]
            num_slots = max((len(r[1]) for _, turn in turns for r in turn["rounds"]), default=0)
            counts = document_counts(rounds_of(turns, num_slots), len(prompts))
            seconds, looped = np.zeros(len(prompts)), np.zeros(len(prompts), dtype=bool)
            for i, turn in turns:
                seconds[i] += sum(sum(r[4:7]) for r in turn["rounds"])
                looped[i] |= ends_in_loop(turn["ids"], end_token_id=eos_id)
            cells.append(
                PaperCell(
                    method=name,
                    benchmark=benchmark,
                    mode=mode,
                    temperature=temperature,
                    seed=seed,
                    prompt_ids=tuple(row["id"] for row in prompts),
                    counts=PromptCounts(**counts._asdict()),
                    looped=looped,
                    seconds=seconds,
                    run_id=run_ids.get(name, ""),
                )
            )
    return cells


def rounds_of(turns: Sequence[tuple[int, dict]], num_slots: int) -> Rounds:
    """Turns' rows with the document each belongs to -> Rounds."""
    table = []
    for document, turn in turns:
        end = len(turn["prompt_ids"]) + len(turn["ids"]) - 1
        table += [(document, r[0], r[2], r[3], min(num_slots, end - r[0])) for r in turn["rounds"]]
    columns = torch.tensor(table, dtype=torch.int64).view(-1, 5).unbind(dim=1)
    return Rounds(*columns, num_slots=num_slots)


def round_times(rows: Sequence[dict]) -> list[RoundTimes]:
    """All rounds of each method at batch size 1."""
    found = []
    for name in rows[0]["methods"]:
        turns = [turn for row in rows for turn in row["methods"][name]]
        rounds = [r for turn in turns for r in turn["rounds"]]
        draft, verify, rest = (np.array([r[i] for r in rounds]) for i in (4, 5, 6))
        first = np.array([sum(turn["first_s"]) for turn in turns])
        found.append(RoundTimes(name, 1, draft, verify, rest, np.array([r[3] for r in rounds]), first))
    return found


def lossless_markdown(rows: Sequence[dict]) -> str:
    """T = 0: how many texts of each method are AR's; every other one with its gap; and AR beside transformers' generate()."""
    if not rows:
        return "No prompts at temperature 0.\n"
    lines, differences = [], []
    for name in rows[0]["methods"]:
        turns = [(row, turn) for row in rows for turn in row["methods"][name]]
        other = [(row, turn["differs"]) for row, turn in turns if "differs" in turn]
        ties = sum(found["tie"] for _, found in other)
        tokens = sum(len(turn["ids"]) for _, turn in turns)
        lines.append([name, *(f"{n:,}" for n in (len(turns), tokens, len(turns) - len(other), ties, len(other) - ties))])
        differences += [
            [
                name,
                row["id"],
                row["mode"],
                str(found["position"]),
                f"{found['gap']:.1e}",
                "tie" if found["tie"] else "**differs**",
            ]
            for row, found in other
        ]
    text = ["### Temperature 0: is the text AR's?", ""]
    text += markdown_table(["Method", "texts", "tokens", "same", "ties within rounding", "differ"], lines)
    if differences:
        text += ["", *markdown_table(["Method", "prompt", "mode", "first at", "gap of logits", ""], differences)]
    timed = [row["generate"] for row in rows if "generate" in row]
    if timed:
        ratios = [found["seconds"] / found["own_seconds"] for found in timed]
        same = sum(found["same_text"] for found in timed)
        text += [
            "",
            f"{GENERATE} on {len(timed)} of these prompts takes {np.median(ratios):.2f} times as long as AR (median of pairs; "
            f"{min(ratios):.2f} to {max(ratios):.2f}), prefill included; {same} of {len(timed)} texts are the same.",
        ]
    return "\n".join([*text, ""])


def decode_all(config: DictConfig, methods: Sequence[Method], target: Target, modes: Sequence[Mode]) -> Path:
    """Every method on every prompt, mode and temperature; what is already in rows.jsonl is not done again."""
    benchmark: Prompts = instantiate(config.benchmarks)
    tokenizer = load_tokenizer(config.target.path)
    stop_ids = {special_ids(tokenizer, config.target.mask_token_id).eos}
    drafters: dict[str, LoopDrafter] = {AR: Autoregressive()}
    for method in methods:
        drafters[method.name] = loop_drafter(method.drafter(config, target.heads), target.heads)
    rows = Rows(
        Path(config.out) / "rows.jsonl",
        {
            "target": target.fingerprint,
            "dtype": config.target.dtype,
            "benchmarks": OmegaConf.to_container(config.benchmarks, resolve=True),
            "methods": {method.name: method.run_id for method in methods},
            "top_p": config.top_p,
            "seed": config.seed,
        },
    )
    todo = [
        (mode, temperature, prompt)
        for mode in modes
        for prompts in [benchmark.fitting(tokenizer, mode)]
        for temperature in config.temperature
        for prompt in prompts
    ]
    left = [(m, t, p) for m, t, p in todo if (m, float(t), p.id) not in rows.done]
    if len(left) < len(todo):
        print(f"{len(todo) - len(left)} of {len(todo)} prompts are in {rows.path} already", flush=True)
    asked: Counter[tuple] = Counter()
    with tqdm(total=len(todo), initial=len(todo) - len(left), desc="decode", unit="prompt", mininterval=2) as bar:
        for index, (mode, temperature, prompt) in enumerate(left):
            names = list(drafters)
            names = names[index % len(names) :] + names[: index % len(names)]
            decoded = {}
            for name in names:
                bar.set_postfix_str(f"{prompt.domain} T={temperature:g} {name}", refresh=False)
                decoded[name] = decode_conversation(
                    target.model,
                    drafters[name],
                    encode_rounds(prompt, tokenizer, mode),
                    max_new_tokens=benchmark.max_new_tokens,
                    stop_ids=stop_ids,
                    sampler=partial(sampler_for, config, float(temperature), mode, prompt.id, name, target.model.device),
                    history=history_after(mode, tokenizer),
                )
            row = {"mode": mode, "temperature": float(temperature), "benchmark": prompt.domain, "id": prompt.id}
            row["methods"] = {name: [turn_row(prompt_ids, g) for prompt_ids, g in decoded[name]] for name in drafters}
            if temperature == 0:
                compare_texts(target.model, row["methods"], {name: decoded[name] for name in drafters})
                group = (mode, prompt.domain)
                if asked[group] < config.generate_prompts:
                    asked[group] += 1
                    prompt_ids, own = decoded[AR][0]
                    row["generate"] = plain_generate(target.model, prompt_ids, own, benchmark.max_new_tokens, stop_ids)
            rows.append(row)
            bar.update()
    return rows.path


def decode_conversation(
    model: DeepseekV4ForCausalLM,
    drafter: LoopDrafter,
    rounds: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: set[int],
    sampler: Callable[[int], Sampler],
    history: Callable[[list[int], list[int]], list[int]],
) -> list[tuple[list[int], Generation]]:
    """Answer user turn after user turn -> (prompt ids, generation) of each; ends early where an answer was cut."""
    turns, before = [], []
    for number, added in enumerate(rounds):
        prompt_ids = [*before, *added]
        with TargetSession(model, drafter.layer_ids) as session:
            events = speculate(
                session,
                drafter,
                prompt_ids,
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                sampler=sampler(number),
                synchronize=model.device.type == "cuda",
            )
            generation = collect(events, stop_ids)
        turns.append((prompt_ids, generation))
        if generation.ended_by == "length":  # cut: nothing can follow
            break
        before = history(prompt_ids, list(generation.token_ids))
    return turns


def history_after(mode: Mode, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int], list[int]], list[int]]:
    """What a later turn sees of a prompt and its answer."""
    if mode == "think_high":
        return lambda prompt_ids, answer: without_reasoning(prompt_ids, answer, tokenizer)
    return lambda prompt_ids, answer: [*prompt_ids, *answer]


def sampler_for(
    config: DictConfig, temperature: float, mode: Mode, prompt_id: str, method: str, device: torch.device, turn: int
) -> Sampler:
    """Draws that depend on the seed and on what is decoded, not on what was decoded before."""
    if temperature == 0:
        return Sampler()
    digest = hashlib.blake2b(f"{config.seed}:{mode}:{temperature}:{prompt_id}:{method}:{turn}".encode(), digest_size=8).digest()
    return Sampler(temperature, config.top_p, torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1))


def turn_row(prompt_ids: Sequence[int], generation: Generation) -> dict:
    """A generation as JSON. ``rounds``: [anchor, drafted ids, accepted, emitted, draft s, verify s, rest s] each."""
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


def compare_texts(
    model: DeepseekV4ForCausalLM, rows: dict[str, list[dict]], decoded: dict[str, list[tuple[list[int], Generation]]]
) -> None:
    """Write ``differs`` into every turn whose greedy text is not AR's: position, gap of the logits, and whether it is a tie.

    Turns after a difference have another history and are not compared.
    """
    for name, turns in decoded.items():
        for turn, (prompt_ids, generation), (_, own) in zip(rows[name], turns, decoded[AR], strict=False):
            found = compare_greedy(model, prompt_ids, own.token_ids, generation.token_ids)
            if found is not None:
                turn["differs"] = asdict(found)
                break


@torch.inference_mode()
def plain_generate(
    model: DeepseekV4ForCausalLM, prompt_ids: Sequence[int], own: Generation, max_new_tokens: int, stop_ids: set[int]
) -> dict:
    """transformers' own ``generate()`` on the same prompt, beside our AR loop: seconds of both, prefill included."""
    started = time.perf_counter()
    text = model.generate(
        torch.tensor([list(prompt_ids)], device=model.device),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=min(stop_ids),
    )[0, len(prompt_ids) :].tolist()
    seconds = time.perf_counter() - started
    return {
        "tokens": len(text),
        "seconds": seconds,
        "own_seconds": own.first.seconds.total + own.seconds.total,
        "same_text": tuple(text) == own.token_ids,
    }


class Rows:
    """rows.jsonl: a header that says what decides the rows, then one line a prompt. A line cut by a kill is dropped."""

    def __init__(self, path: Path, identity: dict):
        self.path = path
        self.done: set[tuple[str, float, str]] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"identity": json.loads(json.dumps(identity))}
        if path.exists():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                print(f"{path}: the last line was cut short and is done again", flush=True)
                os.truncate(path, len(whole))
            lines = whole.splitlines()
            if lines and json.loads(lines[0]) != header:
                found = json.loads(lines[0]).get("identity", {})
                other = sorted(k for k in identity.keys() | found.keys() if found.get(k) != header["identity"].get(k))
                raise ValueError(f"{path} was measured with another {', '.join(other)}: give another out=, or remove the file")
            self.done = {(r["mode"], r["temperature"], r["id"]) for r in map(json.loads, lines[1:])}
            if lines:
                return
        self.append(header)

    def append(self, row: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> Iterator[dict]:
    """The prompts' lines, the header left out."""
    with path.open() as lines:
        next(lines, None)
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)
