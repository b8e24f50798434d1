"""The seven benchmarks: hub rows with their real columns, local files, choice of prompts, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyperdflash.contracts import Turn
from hyperdflash.data.benchmark_rows import BENCHMARKS, load_turns, main
from hyperdflash.data.prompts import PaperBenchmarks, benchmark_prompts

STEP = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LCB = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a correct "
    "Python program that matches the specification and passes all tests. You will NOT return anything except for the "
    "program\n\n### Question:\n{question}\n\n### Format: {wanted}\n```python\n{code}\n```\n\n"
    "### Answer: (use the provided format with backticks)"
)
CODE = 'def f(x):\n    """ Return x. """\n'
STARTER = "class Solution:\n    def f(self) -> int:\n        "
# (load_dataset's arguments, rows with the real columns, user turns of each row)
HUB = {
    "gsm8k": (
        {"path": "openai/gsm8k", "name": "main", "split": "test"},
        [{"question": "Ann has 3  eggs?", "answer": "3\n#### 3"}],
        [["Ann has 3  eggs?" + STEP]],
    ),
    "math500": (
        {"path": "HuggingFaceH4/MATH-500", "split": "test"},
        [{"problem": "Find $x$.", "solution": "s", "answer": "1", "subject": "Algebra", "level": 2, "unique_id": "u"}],
        [["Find $x$." + STEP]],
    ),
    "aime25": (
        {"path": "MathArena/aime_2025", "split": "train"},
        [{"problem_idx": 1, "problem": "Find $b$.", "answer": 70, "problem_type": ["Number Theory"]}],
        [["Find $b$." + STEP]],
    ),
    "humaneval": (
        {"path": "openai/openai_humaneval", "split": "test"},
        [{"task_id": "HumanEval/0", "prompt": CODE, "canonical_solution": "r", "test": "t", "entry_point": "f"}],
        [[f"Write a solution to the following problem and make sure that it passes the tests:\n```python\n{CODE}\n```"]],
    ),
    "mbpp": (
        {"path": "google-research-datasets/mbpp", "name": "sanitized", "split": "test"},
        [{"source_file": "f", "task_id": n, "prompt": "Write it.", "code": "c", "test_imports": [], "test_list": ["t"]}
         for n in (11, 12)],
        [["Write it."], ["Write it."]],
    ),
    "livecodebench": (
        {"path": "json", "split": "train", "data_files": [
            f"hf://datasets/livecodebench/code_generation_lite/test{n}.jsonl" for n in ("", "2", "3", "4", "5", "6")]},
        [{"question_title": "t", "question_content": f"Q{n}", "platform": "leetcode", "question_id": "1", "starter_code": code,
          "difficulty": "easy", "public_test_cases": "[]", "private_test_cases": "eJ", "metadata": "{}"}
         for n, code in enumerate(("", STARTER))],
        [[LCB.format(question="Q0", wanted="Write your code in the following format:", code="# YOUR CODE HERE")],
         [LCB.format(question="Q1", wanted="Use the following code structure:", code=STARTER)]],
    ),
    "mt-bench": (
        {"path": "HuggingFaceH4/mt_bench_prompts", "split": "train"},
        [{"prompt": ["Compose a post.", "Rewrite it."], "reference": [], "category": "writing", "prompt_id": 81}],
        [["Compose a post.", "Rewrite it."]],
    ),
}  # fmt: skip


def paper(**changed) -> PaperBenchmarks:
    fields = dict(names=list(BENCHMARKS), per_benchmark=None, seed=0, path=None, max_new_tokens=64, max_length=512)
    return PaperBenchmarks(**(fields | changed))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's files on disk, read by the real `datasets`: JSON lines for LiveCodeBench, parquet for the others."""
    import datasets

    real = datasets.load_dataset

    def load_dataset(path, name=None, split=None, data_files=None):
        asked = {"path": path, "name": name, "split": split, "data_files": data_files}
        asked = {key: value for key, value in asked.items() if value is not None}
        found = [benchmark for benchmark, (load, _, _) in HUB.items() if load == asked]
        assert found, f"nobody asked for {asked}"
        rows = datasets.Dataset.from_list(HUB[found[0]][1])
        if path == "json":
            file = tmp_path / "test.jsonl"
            rows.to_json(file)
        else:
            file = tmp_path / f"{found[0]}.parquet"
            rows.to_parquet(file)
        return real(file.suffix[1:].replace("jsonl", "json"), data_files=str(file), split="train", cache_dir=tmp_path / "cache")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path) -> Path:
    """The same prompts as local files."""
    root = tmp_path / "local"
    root.mkdir()
    for name, (_, _, turns) in HUB.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"turns": row}) + "\n" for row in turns), encoding="utf-8")
    return root


def test_hub_rows_become_the_published_prompts(hub, folder):
    for name, (_, _, turns) in HUB.items():
        assert load_turns(name) == turns, name
    two = ["mbpp", "mt-bench"]
    assert paper(names=two).conversations() == paper(names=two, path=folder).conversations()


def test_a_folder_is_written_for_machines_without_network(hub, tmp_path):
    main([str(tmp_path / "made"), "--names", "gsm8k", "mt-bench"])
    names = ["gsm8k", "mt-bench"]
    assert paper(names=names, path=tmp_path / "made").conversations() == paper(names=names).conversations()


def test_order_groups_and_turns(folder):
    prompts = paper(path=folder, names=["mt-bench", "mbpp", "gsm8k"]).conversations()
    assert [prompt.domain for prompt in prompts] == ["gsm8k", "mbpp", "mbpp", "mt-bench"]
    assert prompts[-1].turns == (Turn("user", "Compose a post."), Turn("user", "Rewrite it."))
    assert len({prompt.id for prompt in prompts}) == 4  # MBPP has one text twice
    assert prompts[2].id == prompts[1].id + "-2" and prompts[1].id.startswith("mbpp/")
    groups = {}
    for source in BENCHMARKS.values():
        groups.setdefault(source.group, []).append(source.title)
    assert groups == {
        "Math": ["GSM8K", "MATH-500", "AIME25"],
        "Code": ["HumanEval", "MBPP", "LiveCodeBench"],
        "Chat": ["MT-Bench"],
    }
    assert list(BENCHMARKS) == [name for name in HUB]
    assert sum(source.rows for source in BENCHMARKS.values()) == 3405


def test_the_question_is_found_in_its_wording(folder):
    bare = {name: [BENCHMARKS[name].question(row[0]) for row in load_turns(name, folder)] for name in BENCHMARKS}
    assert bare == {
        "gsm8k": ["Ann has 3  eggs?"],
        "math500": ["Find $x$."],
        "aime25": ["Find $b$."],
        "humaneval": [CODE],
        "mbpp": ["Write it.", "Write it."],
        "livecodebench": ["Q0", "Q1"],
        "mt-bench": ["Compose a post."],
    }


def test_a_cap_takes_a_seeded_choice_that_grows(tmp_path, caplog):
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps({"turns": [f"q {n}"]}) + "\n" for n in range(40)))

    def chosen(count, seed=0):
        return [
            c.turns[0].content for c in paper(names=["gsm8k"], path=tmp_path, per_benchmark=count, seed=seed).conversations()
        ]

    assert len(chosen(10)) == 10 and set(chosen(10)) < set(chosen(20)) and chosen(None) == chosen(99)
    assert chosen(10) == sorted(chosen(10), key=lambda text: int(text[2:]))
    assert chosen(10) == chosen(10) != chosen(10, seed=1)
    assert "GSM8K has 40 prompts here, 1319 were published" in caplog.text


def test_the_configuration(compose_config, folder, monkeypatch):
    from hydra.utils import instantiate

    from hyperdflash.data.prompts import Prompts
    from hyperdflash.identity import CONF

    monkeypatch.setenv("HYPERDFLASH_BENCHMARKS", str(folder))
    for option in sorted(path.stem for path in Path(CONF, "benchmarks").glob("*.yaml")):
        made = instantiate(compose_config("evaluate", [f"benchmarks={option}"]).benchmarks)
        assert isinstance(made, Prompts) and made.conversations()
    made = instantiate(
        compose_config(
            "evaluate", ["benchmarks=paper", "benchmarks.names=[mt-bench,mbpp]", "benchmarks.per_benchmark=1"]
        ).benchmarks
    )
    assert [prompt.domain for prompt in made.conversations()] == ["mbpp", "mt-bench"]
    monkeypatch.delenv("HYPERDFLASH_BENCHMARKS")
    assert compose_config("evaluate", ["benchmarks=paper"]).benchmarks.path is None


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"names": ["gsm8k", "mmlu"]}, r"names has 'mmlu'; wanted some of gsm8k, math500"),
        ({"names": []}, "at least one benchmark"),
        ({"names": ["mbpp", "mbpp"]}, "each once"),
        ({"per_benchmark": 0}, r"per_benchmark must be a positive integer"),
        ({"seed": -1}, r"seed must be an integer of at least 0"),
        ({"max_length": 0}, r"max_length must be a positive integer"),
        ({"path": "nowhere"}, r"benchmarks\.path=nowhere is not a folder: make it with `python -m src\.fetch_benchmarks"),
    ],
)
def test_wrong_fields_are_named(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        paper(**changed)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{}", "line 2 of .*mbpp.jsonl is not a JSON object with `turns`"),
        ('{"turns": ["cut', "line 2 of .*mbpp.jsonl"),
        ("[1]", "line 2 of .*mbpp.jsonl"),
        ('{"turns": ["\udcff"]}', r"line 2 of .*mbpp.jsonl is not .* in UTF-8"),
        ('{"turns": []}', "row 2 of mbpp has turns"),
        ('{"turns": ["a", " "]}', "row 2 of mbpp has turns"),
        ('{"turns": "one"}', "row 2 of mbpp has turns 'one'"),
    ],
)
def test_a_broken_row_is_no_silent_loss(tmp_path, line, sentence):
    (tmp_path / "mbpp.jsonl").write_bytes(f'{{"turns": ["fine"]}}\n{line}\n'.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=sentence):
        benchmark_prompts("mbpp", tmp_path)


def test_neither_hub_nor_file_is_one_sentence(monkeypatch, tmp_path):
    import datasets

    with pytest.raises(ValueError, match=r"no gsm8k\.jsonl in .*set benchmarks\.path=null for the hub"):
        paper(names=["gsm8k"], path=tmp_path).conversations()

    def unreachable(**_):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        ValueError, match=r"cannot load GSM8K from the hub \(ConnectionError: Couldn't.*HYPERDFLASH_BENCHMARKS"
    ) as e:
        paper(names=["gsm8k"]).conversations()
    assert "\n" not in str(e.value)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.Dataset.from_list([{"text": "x"}]))
    with pytest.raises(ValueError, match="GSM8K on the hub has no column 'question', only text"):
        paper(names=["gsm8k"]).conversations()
