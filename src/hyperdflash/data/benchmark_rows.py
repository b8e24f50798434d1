"""The paper's seven benchmarks: where each one is on the hub, and how a row becomes user turns.

The wording follows the evaluation scripts of DFlash and its successors (DeepSpec's eval_datasets, z-lab/dflash), so that the
prompts equal those of the published acceptance lengths:

    GSM8K, MATH-500, AIME25   question + "\\nPlease reason step by step, and put your final answer within \\boxed{}."
    HumanEval                 "Write a solution to the following problem and make sure that it passes the tests:" + fenced code
    MBPP (sanitized)          the bare description
    LiveCodeBench             "You are an expert Python programmer. ..." + question + starter code or a placeholder
    MT-Bench                  both questions as they are; the second follows the model's own answer to the first

``python -m src.fetch_benchmarks FOLDER`` writes ``FOLDER/<name>.jsonl`` with a ``turns`` field, for machines without a network.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

_MATH = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_HUMANEVAL = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
_LCB = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a correct "
    "Python program that matches the specification and passes all tests. You will NOT return anything except for the program"
    "\n\n### Question:\n"
)
_LCB_FILES = [f"hf://datasets/livecodebench/code_generation_lite/test{n}.jsonl" for n in ("", 2, 3, 4, 5, 6)]
_LCB_HUB = {"path": "json", "data_files": _LCB_FILES, "split": "train"}


@dataclass(frozen=True)
class BenchmarkRows:
    """One benchmark. ``load`` holds the arguments of ``datasets.load_dataset``, ``rows`` the published number of prompts;
    ``column`` holds the question, or a list of user turns; ``before`` and ``after`` are the wording around a question."""

    title: str
    group: str
    rows: int
    load: Mapping[str, object]
    column: str
    before: str = ""
    after: str = ""

    def turns(self, row: Mapping) -> list[str]:
        asked = row[self.column]
        if isinstance(asked, list):
            return asked
        return [self.before + asked + self.after + (_starter_code(row) if self.before == _LCB else "")]

    def question(self, turn: str) -> str:
        """Returns a user turn without the wording around it."""
        turn = turn.removeprefix(self.before)
        return turn.rpartition(self.after)[0] if self.after and self.after in turn else turn


def _starter_code(row: Mapping) -> str:
    starter = row.get("starter_code")
    wanted = "Use the following code structure:" if starter else "Write your code in the following format:"
    code = f"```python\n{starter or '# YOUR CODE HERE'}\n```"
    return f"{wanted}\n{code}\n\n### Answer: (use the provided format with backticks)"


def _hub(path: str, split: str = "test", **more: object) -> dict[str, object]:
    return {"path": path, "split": split, **more}


# In the paper's order; the keys are the names of the local files. LiveCodeBench: the raw files of release 6, since `datasets`
# does not run the loading script of that repository.
BENCHMARKS = {
    "gsm8k": BenchmarkRows("GSM8K", "Math", 1319, _hub("openai/gsm8k", name="main"), "question", after=_MATH),
    "math500": BenchmarkRows("MATH-500", "Math", 500, _hub("HuggingFaceH4/MATH-500"), "problem", after=_MATH),
    "aime25": BenchmarkRows("AIME25", "Math", 30, _hub("MathArena/aime_2025", "train"), "problem", after=_MATH),
    "humaneval": BenchmarkRows("HumanEval", "Code", 164, _hub("openai/openai_humaneval"), "prompt", _HUMANEVAL, "\n```"),
    "mbpp": BenchmarkRows("MBPP", "Code", 257, _hub("google-research-datasets/mbpp", name="sanitized"), "prompt"),
    "livecodebench": BenchmarkRows("LiveCodeBench", "Code", 1055, _LCB_HUB, "question_content", _LCB, "\n\n### Format: "),
    "mt-bench": BenchmarkRows("MT-Bench", "Chat", 80, _hub("HuggingFaceH4/mt_bench_prompts", "train"), "prompt"),
}


def load_turns(name: str, path: str | Path | None = None) -> list[list[str]]:
    """Returns the user turns of each row of benchmark ``name`` in order, from ``path``/<name>.jsonl or from the hub (None).

    ValueError where the source cannot be read or a row has no turns.
    """
    turns = _from_hub(name) if path is None else _from_file(Path(path) / f"{name}.jsonl")
    if not turns:
        raise ValueError(f"{name} has no prompt in {path or 'the hub'}: fetch it again, or leave it out of benchmarks.names")
    for number, row in enumerate(turns, start=1):
        if not (isinstance(row, list) and row and all(isinstance(turn, str) and turn.strip() for turn in row)):
            raise ValueError(f"row {number} of {name} has turns {str(row)[:60]!r}: wanted a list of texts, one per user turn")
    return turns


def _from_hub(name: str) -> list[list[str]]:
    from datasets import load_dataset

    source = BENCHMARKS[name]
    try:
        rows = load_dataset(**source.load)
    except Exception as error:  # the hub's client and its HTTP library raise many unrelated exceptions
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else 'no message'}"
        raise ValueError(
            f"cannot load {source.title} from the hub ({reason}): run `python -m src.fetch_benchmarks FOLDER` where the hub "
            "can be reached and set HYPERDFLASH_BENCHMARKS=FOLDER, or leave it out of benchmarks.names"
        ) from error
    try:
        return [source.turns(row) for row in rows]
    except KeyError as error:
        raise ValueError(
            f"{source.title} on the hub has no column {error}, only {', '.join(rows.column_names)}: "
            "give its prompts as a .jsonl file with `turns` in the folder HYPERDFLASH_BENCHMARKS"
        ) from error


def _from_file(file: Path) -> list[list[str]]:
    if not file.is_file():
        raise ValueError(
            f'no {file.name} in {file.parent}: write it there, one row {{"turns": [text, ...]}} per prompt '
            "(`python -m src.fetch_benchmarks FOLDER` writes all seven from the hub), or set benchmarks.path=null for the hub"
        )
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            rows += [json.loads(line.decode("utf-8-sig"))["turns"]] if line.strip() else []
        except (ValueError, KeyError, TypeError):
            wanted = 'a JSON object with `turns` in UTF-8: wanted {"turns": [text, ...]}'
            raise ValueError(f"line {number} of {file} is not {wanted}") from None
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    about = "Writes the prompts of the paper's benchmarks from the hub."
    parser = argparse.ArgumentParser(prog="python -m src.fetch_benchmarks", description=about)
    parser.add_argument("folder", type=Path, help="folder for the files <name>.jsonl")
    parser.add_argument("--names", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), metavar="NAME")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in tqdm(options.names, unit="benchmark"):
        rows = load_turns(name)
        text = "".join(json.dumps({"turns": turns}, ensure_ascii=False) + "\n" for turns in rows)
        (options.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        tqdm.write(f"{name}: {len(rows)} prompts")
