"""Runs every method on every prompt, resumable, for an evaluation by decoding or by a serving engine.

1. places       the prompts that fit (data.prompts), mode by mode and temperature by temperature
2. converse     per prompt all methods, in rotating order; every turn continues the history that its method wrote
3. rows.jsonl   one line per prompt after its last method: ``mode``, ``temperature``, ``benchmark``, ``id`` and ``methods``,
                name -> its turns. A killed evaluation resumes after the last line
4. samples      a Sample per method, mode and temperature (hyperdflash.report.measure)
5. report       the paper's tables and evaluation.json
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hyperdflash.cli import command_of
from hyperdflash.data.chat import Mode, encode_rounds, history_after
from hyperdflash.data.prompts import Prompts
from hyperdflash.decoding.metrics import ends_in_loop
from hyperdflash.files import reading
from hyperdflash.record import environment_record, write_json
from hyperdflash.report.bootstrap import PromptCounts
from hyperdflash.report.evaluation_tables import write_paper_report
from hyperdflash.report.measure import Sample
from hyperdflash.report.results import write_report
from hyperdflash.report.tables import show
from hyperdflash.targets.load import read_config

Answer = Callable[[str, list[int], float, str], dict]  # method, prompt ids, temperature, name of its draws -> a turn's row
# A method and the turns of each of N prompts -> its counts and the seconds of decoding of each prompt.
Count = Callable[[str, list[list[dict]]], tuple[PromptCounts, list[float]]]


class Rows(list):
    """The prompts' lines of rows.jsonl, which stand below a header of what decides them; drops a line that a kill cut short."""

    def __init__(self, path: Path, identity: dict):
        self.path, self.header = path, {"identity": json.loads(json.dumps(identity))}
        data = path.read_bytes() if path.exists() else b""
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        with reading(path, "remove it, or give another out="):
            header, *rows = map(json.loads, lines or [json.dumps(self.header)])
            found = header["identity"]
        if header != self.header:
            here = self.header["identity"]
            other = sorted(name for name in here.keys() | found.keys() if found.get(name) != here.get(name))
            raise ValueError(f"{path} was measured with another {', '.join(other)}: give another out=, or remove the file")
        if end < len(data):
            os.truncate(path, end)
        super().__init__(rows)

    def write(self, row: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            lines = [json.dumps(line) for line in ([row] if file.tell() else [self.header, row])]
            file.write("\n".join([*lines, ""]))
            file.flush()
            os.fsync(file.fileno())
        self.append(json.loads(lines[-1]))


def answer_all(
    config: DictConfig,
    identity: dict,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[str],
    answer: Answer,
    *,
    prepare: Callable[[list[int]], None] = lambda prompt_ids: None,
    complete: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Runs every method on every prompt, mode and temperature that rows.jsonl lacks; returns all its rows. ``identity`` decides
    the rows, with the seed, the methods and the prompts. ``prepare`` takes the first prompt's ids where any prompt is left;
    ``complete`` takes each row before it is written."""
    modes: list[Mode] = list(config.mode) if OmegaConf.is_list(config.mode) else [config.mode]
    context = read_config(config.target.path).max_position_embeddings
    fitting = {mode: prompts.fitting(tokenizer, mode, context) for mode in modes}
    places = [(mode, float(t), prompt) for mode in modes for t in config.temperature for prompt in fitting[mode]]
    shared = {"benchmarks": OmegaConf.to_container(config.benchmarks, resolve=True), "top_p": config.top_p, "seed": config.seed}
    rows = Rows(Path(config.out) / "rows.jsonl", {**identity, **shared})
    done = {(row["mode"], row["temperature"], row["id"]) for row in rows}
    left = [place for place in places if (place[0], place[1], place[2].id) not in done]
    if left:
        prepare(encode_rounds(places[0][2], tokenizer, places[0][0])[0])
    if len(left) < len(places):
        print(f"{len(places) - len(left)} of {len(places)} prompts are in {rows.path} already", flush=True)
    with tqdm(total=len(places), initial=len(places) - len(left), desc="decode", unit="prompt") as bar:
        for index, (mode, temperature, prompt) in enumerate(left):
            turns = {}
            for name in [*methods[index % len(methods) :], *methods[: index % len(methods)]]:
                bar.set_postfix_str(f"{prompt.domain} T={temperature:g} {name}", refresh=False)
                draws = f"{config.seed}:{mode}:{temperature}:{prompt.id}:{name}"
                turns[name] = converse(
                    lambda prompt_ids, turn, n=name, t=temperature, d=draws: answer(n, prompt_ids, t, f"{d}:{turn}"),
                    encode_rounds(prompt, tokenizer, mode),
                    tokenizer,
                    mode,
                )
            row = {"mode": mode, "temperature": temperature, "benchmark": prompt.domain, "id": prompt.id}
            row["methods"] = {name: turns[name] for name in methods}
            complete(row)
            rows.write(row)
            bar.update()
    return rows


def converse(
    answer: Callable[[list[int], int], dict], rounds: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, mode: Mode
) -> list[dict]:
    """Answers every user turn in order; ends early where an answer reaches its length limit. ``answer`` takes the prompt's ids
    and the turn's number, and returns a row with ``ids`` and ``ended_by``."""
    turns, before = [], []
    for number, added in enumerate(rounds):
        prompt_ids = [*before, *added]
        turns.append(answer(prompt_ids, number))
        if turns[-1]["ended_by"] == "length":  # nothing can follow a cut answer
            break
        before = history_after(prompt_ids, turns[-1]["ids"], tokenizer, mode)
    return turns


def samples_of(rows: Sequence[dict], eos_id: int, runs: dict[str, str], count: Count) -> list[Sample]:
    """Returns a sample per method, mode and temperature, summed over a prompt's turns."""
    found = []
    for mode, temperature in dict.fromkeys((row["mode"], row["temperature"]) for row in rows):
        prompts = [row for row in rows if (row["mode"], row["temperature"]) == (mode, temperature)]
        for name in prompts[0]["methods"]:
            turns = [row["methods"][name] for row in prompts]
            ids, groups = (tuple(row[key] for row in prompts) for key in ("id", "benchmark"))
            looped = np.array([any(ends_in_loop(turn["ids"], end_token_id=eos_id) for turn in own) for own in turns])
            counts, seconds = count(name, turns)
            found.append(Sample(name, temperature, ids, groups, counts, looped, runs.get(name, ""), mode, np.array(seconds)))
    return found


def write_evaluation(samples: Sequence[Sample], config: DictConfig, title: str, texts: dict[str, str], record: dict) -> None:
    """Writes and shows paper.md with its companions and the Markdown ``texts`` by file name; writes ``record`` with the command
    and the versions to evaluation.json. ``title`` names the target."""
    out = Path(config.out)
    written = write_paper_report(samples, out, title, config.num_resamples, config.seed) + write_report(out, texts)
    write_json(out / "evaluation.json", record | {"environment": environment_record(command_of("src.evaluate"))})
    show("\n".join(path.read_text() for path in written if path.suffix == ".md"))
    print(f"wrote {', '.join(path.name for path in written)}, evaluation.json in {out}")
