"""Targets and texts made on the spot: the tests need no shipped weights, no network and no scan of installed packages."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VERBS = ("returns", "adds", "counts", "joins", "sorts", "drops")
NOUNS = ("numbers", "names", "rows", "words", "files", "dates")
SMALL_TRAINING = [  # one draft layer on short rows with their own answers; a test adds target, rows and epochs
    "corpus=paper",
    "corpus.responses=original",
    "corpus.decontaminate=false",
    "corpus.heldout=0.2",
    "corpus.validation=5",
    "corpus.max_new_tokens=8",
    "corpus.max_length=64",
    "blocks.num_anchors=6",
    "drafter.num_layers=1",
    "drafter.intermediate_size=32",
    "optim.batch_size=4",
    "trainer.threads=1",
    "logger=csv",
]


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are tiny: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_rows(count: int) -> list[dict]:
    """Rows in EagleChat's schema, all different."""
    rows = []
    for i in range(count):
        verb, noun = VERBS[i % 6], NOUNS[(i // 6) % 6]
        answer = f"def f{i}(x):\n    return x + {i}" if i % 2 else f"It {verb} {i} {noun} and stops."
        rows.append(
            {
                "id": str(i),
                "conversations": [
                    {"role": "user", "content": f"Write a function that {verb} {i} {noun}."},
                    {"role": "assistant", "content": answer},
                ],
            }
        )
    return rows


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in text_rows(60)))
    return path


@pytest.fixture(scope="session")
def mini_target(tmp_path_factory) -> Path:
    """A target directory with random weights: 4 layers of all kinds, hidden 32, window 16, a 512-entry tokenizer."""
    from tiny_target.build import build_target, save_target, tiny_config
    from tiny_target.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("target")
    texts = [m["content"] for row in text_rows(400) for m in row["conversations"]]
    tokenizer = train_tokenizer(texts, vocab_size=320)
    config = tiny_config(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=4,
        moe_intermediate_size=16,
        num_attention_heads=2,
        head_dim=16,
        q_lora_rank=16,
        o_lora_rank=8,
        sliding_window=16,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        num_hash_layers=1,
        initializer_range=0.2,
    )
    model, mtp = build_target(config, seed=1)
    save_target(path, model, mtp)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def compose_config(monkeypatch, tmp_path):
    """compose_config("train", ["reducer=fc"]) -> DictConfig, with everything that is made going to tmp_path."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from hyperdflash.identity import CONF

    monkeypatch.setenv("HYPERDFLASH_RUNS", str(tmp_path))
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        yield lambda name, overrides=(): compose(config_name=name, overrides=list(overrides))
    GlobalHydra.instance().clear()


@pytest.fixture
def run_command(monkeypatch, capfd):
    """run_command("train", "reducer=fc") runs `python -m src.train reducer=fc` in this process, which saves its imports.

    The first argument may also be the function that an entry point decorates.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    def run(command, *words: str) -> subprocess.CompletedProcess:
        capfd.readouterr()
        code = 0
        with monkeypatch.context() as patch:
            quiet = (
                []
                if command in ("table1", "fetch_benchmarks", "report")
                else ["hydra/job_logging=none", "hydra/hydra_logging=none"]
            )
            patch.setattr(sys, "argv", [str(command), *words, *quiet])
            patch.setattr(GlobalHydra.instance(), "hydra", None)  # of compose_config
            patch.setattr(HydraConfig.instance(), "cfg", None)
            try:
                runpy.run_module(f"src.{command}", run_name="__main__") if isinstance(command, str) else command()
            except SystemExit as ended:
                code = ended.code or 0
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


@pytest.fixture
def mini_overrides(mini_target, rows_file) -> list[str]:
    """A training that takes seconds: the random target, 24 + 16 rows of a file, one draft layer."""
    rows = f"source: {rows_file}, domain: code"
    return [
        f"target.path={mini_target}",
        "corpus=paper",
        f"corpus.stage1=[{{{rows}, count: 24}}]",
        f"corpus.stage2=[{{{rows}, count: 16, skip: 30}}]",
        "corpus.decontaminate=false",
        "corpus.heldout=0.2",
        "corpus.validation=6",
        "corpus.max_new_tokens=24",
        "corpus.max_length=96",
        "blocks.num_anchors=8",
        "optim.batch_size=4",
        "trainer.max_epochs=2",
        "trainer.threads=1",
        "trainer.log_every_n_steps=2",
        "logger=csv",
        "logger.curves=false",
    ]


@pytest.fixture
def tiny_sizes() -> dict[str, int]:
    """Of a target that pretrains in seconds: 4 layers, hidden 32, window 16, 40 tokens."""
    return {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 16,
        "num_attention_heads": 2,
        "head_dim": 16,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "sliding_window": 16,
    }


@pytest.fixture
def shown_files(tmp_path, monkeypatch):
    """The modules and configurations that docs/add_a_*.md show, written to the working directory."""
    from hyperdflash import options

    docs = Path(__file__).resolve().parents[1] / "docs"
    text = "\n".join(path.read_text() for path in sorted(docs.glob("add_a_*.md")))
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", text, flags=re.DOTALL):
        name, _, rest = block.partition("\n")
        path = tmp_path / name.removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rest)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(options, "accepted", {*options.accepted, str(tmp_path / "my_conf")})
    yield tmp_path
    for name in ("my_heads", "my_losses", "my_pairs", "my_reducers"):
        sys.modules.pop(name, None)
