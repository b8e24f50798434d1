"""The paper's seven benchmarks: where each one is on the hub, and how a row becomes user turns.

The wording follows the evaluation scripts of DFlash and its successors (DeepSpec's eval_datasets, z-lab/dflash), so that the
prompts equal those of the published acceptance lengths:

    GSM8K, MATH-500, AIME25   question + "\\nPlease reason step by step, and put your final answer within \\boxed{}."
    HumanEval                 "Write a solution to the following problem and make sure that it passes the tests:" + fenced code
    MBPP (sanitized)          the bare description
    LiveCodeBench             "You are an expert Python programmer. ..." + question + starter code or a placeholder
    MT-Bench                  both questions as they are; the second follows the model's own answer to the first
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_MATH_AFTER = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_HUMANEVAL_BEFORE = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
_LCB_BEFORE = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a correct "
    "Python program that matches the specification and passes all tests. You will NOT return anything except for the program"
    "\n\n### Question:\n"
)
_LCB_AFTER = "\n\n### Format: "
_LCB_FILES = [f"hf://datasets/livecodebench/code_generation_lite/test{n}.jsonl" for n in ("", 2, 3, 4, 5, 6)]


@dataclass(frozen=True)
class BenchmarkRows:
    """One benchmark. ``load`` holds the arguments of ``datasets.load_dataset``, ``rows`` the published number of prompts;
    ``turns`` maps a row to its user turns; ``before`` and ``after`` are the wording around a turn's question."""

    title: str
    group: str
    rows: int
    load: Mapping[str, object]
    turns: Callable[[Mapping], list[str]] = field(repr=False)
    before: str = ""
    after: str = ""

    def question(self, turn: str) -> str:
        """Returns a user turn without the wording around it."""
        return self._until_after(turn.removeprefix(self.before))

    def _until_after(self, text: str) -> str:
        return text.rpartition(self.after)[0] if self.after and self.after in text else text


def _worded(column: str, before: str = "", after: str = "") -> Callable[[Mapping], list[str]]:
    return lambda row: [before + row[column] + after]


def _livecodebench(row: Mapping) -> list[str]:
    starter = row.get("starter_code")
    wanted = "Use the following code structure:" if starter else "Write your code in the following format:"
    code = f"```python\n{starter or '# YOUR CODE HERE'}\n```"
    footer = "### Answer: (use the provided format with backticks)"
    return [f"{_LCB_BEFORE}{row['question_content']}{_LCB_AFTER}{wanted}\n{code}\n\n{footer}"]


def _math(title: str, rows: int, column: str, **load: str) -> BenchmarkRows:
    return BenchmarkRows(title, "Math", rows, load, _worded(column, after=_MATH_AFTER), after=_MATH_AFTER)


# In the paper's order; the keys are the names of the local files.
BENCHMARKS = {
    "gsm8k": _math("GSM8K", 1319, "question", path="openai/gsm8k", name="main", split="test"),
    "math500": _math("MATH-500", 500, "problem", path="HuggingFaceH4/MATH-500", split="test"),
    "aime25": _math("AIME25", 30, "problem", path="MathArena/aime_2025", split="train"),
    "humaneval": BenchmarkRows(
        "HumanEval", "Code", 164,
        {"path": "openai/openai_humaneval", "split": "test"},
        _worded("prompt", _HUMANEVAL_BEFORE, "\n```"), _HUMANEVAL_BEFORE, "\n```",
    ),
    "mbpp": BenchmarkRows(
        "MBPP", "Code", 257,
        {"path": "google-research-datasets/mbpp", "name": "sanitized", "split": "test"},
        _worded("prompt"),
    ),
    # The raw files of release 6: `datasets` does not run the loading script of this repository.
    "livecodebench": BenchmarkRows(
        "LiveCodeBench", "Code", 1055,
        {"path": "json", "data_files": _LCB_FILES, "split": "train"},
        _livecodebench, _LCB_BEFORE, _LCB_AFTER,
    ),
    "mt-bench": BenchmarkRows(
        "MT-Bench", "Chat", 80,
        {"path": "HuggingFaceH4/mt_bench_prompts", "split": "train"},
        lambda row: list(row["prompt"]),
    ),
}  # fmt: skip


def load_turns(name: str, path: str | Path | None = None) -> list[list[str]]:
    """Returns the user turns of each row of benchmark ``name`` in order, from ``path``/<name>.jsonl or from the hub (None).

    ValueError where the source cannot be read or a row has no turns.
    """
    turns = _from_hub(name) if path is None else _from_file(Path(path) / f"{name}.jsonl")
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
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line)["turns"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f'line {number} of {file} is not a JSON object with `turns`: wanted {{"turns": [text, ...]}}'
                ) from None
    return rows
