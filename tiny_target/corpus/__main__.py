"""Reports the embedded corpus: ``python -m tiny_target.corpus [--tokenizer DIR] [--write-prompts] [--benchmarks hub]``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from hyperdflash.contracts import DOMAINS, Conversation
from hyperdflash.data.benchmark_rows import BENCHMARKS
from hyperdflash.data.benchmarks import benchmark_prompts
from hyperdflash.data.decontaminate import held_prompts
from hyperdflash.data.prompts import eval_prompts_file
from hyperdflash.data.tokenizer import load_tokenizer
from hyperdflash.stable_hash import content_hash
from tiny_target.corpus.embedded import load_embedded, text_bytes
from tiny_target.corpus.eval_prompts import write_prompts
from tiny_target.corpus.overlap import NGRAM, seen_share
from tiny_target.corpus.split import heldout_kind

DEFAULT_TOKENIZER = Path("assets/tiny")


def _counter(folder: Path) -> tuple[str, Callable[[str], Sequence[int]]]:
    """Returns ("tokens", encoder) of the tokenizer in ``folder``, or ("words", hashes of words) where there is none."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
        return "tokens", lambda text: tokenizer.encode(text, add_special_tokens=False)
    return "words", lambda text: [int(content_hash(word), 16) for word in text.split()]


def report(splits: dict[str, list[Conversation]], tokenizer: Path, samples: int, console: Console) -> None:
    """Prints the table of counts and overlaps, and samples of the training text."""
    unit, ids_of = _counter(tokenizer)
    table = Table(title=f"Embedded corpus ({unit} of {tokenizer if unit == 'tokens' else 'white space'})")
    for column in (
        "domain",
        "split",
        "conversations",
        "turns",
        "MB",
        unit,
        f"bytes / {unit[:-1]}",
        f"{NGRAM}-grams seen",
    ):
        table.add_column(column, justify="left" if column in ("domain", "split") else "right")
    for domain in DOMAINS:
        groups = {"train": [c for c in splits["train"] if c.domain == domain]}
        for conversation in (c for c in splits["heldout"] if c.domain == domain):
            kind = heldout_kind(conversation.id)
            groups.setdefault(f"heldout ({kind} templates)" if kind else "heldout", []).append(conversation)
        known: list[Sequence[int]] = []
        for name, conversations in groups.items():
            bar = tqdm(conversations, desc=f"{domain} {name}", unit="conversation", leave=False)
            ids = [ids_of("\n".join(turn.content for turn in conversation.turns)) for conversation in bar]
            num_bytes, num_ids = sum(map(text_bytes, conversations)), sum(map(len, ids))
            known = ids if name == "train" else known
            share = "" if name == "train" else f"{seen_share(known, ids):.1%}"
            turns = sum(len(conversation.turns) for conversation in conversations)
            row = (f"{len(conversations):,}", f"{turns:,}", f"{num_bytes / 1e6:.2f}", f"{num_ids:,}")
            table.add_row(domain, name, *row, f"{num_bytes / num_ids:.2f}", share)
    console.print(table)
    for domain in DOMAINS:
        for conversation in [c for c in splits["train"] if c.domain == domain][:samples]:
            console.rule(conversation.id)
            for turn in conversation.turns:
                console.print(f"[{turn.role}] {turn.content}", markup=False, highlight=False)


def report_contamination(train: list[Conversation], benchmarks: str, console: Console) -> None:
    """Prints one line per training conversation that holds a benchmark's prompt, and one with the counts."""
    path = None if benchmarks == "hub" else benchmarks
    names = held_prompts(train, (prompt for name in BENCHMARKS for prompt in benchmark_prompts(name, path)))
    held = {conversation.id: name for conversation, name in zip(train, names, strict=True) if name}
    for conversation_id, name in held.items():
        console.print(f"{conversation_id} holds a prompt of {name}", highlight=False)
    by_name = ", ".join(f"{count} {name}" for name, count in Counter(held.values()).most_common())
    console.print(
        f"{len(held):,} of {len(train):,} training conversations hold a benchmark's prompt{': ' * bool(held)}{by_name}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tiny_target.corpus", description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER, help="folder with tokenizer.json")
    parser.add_argument("--cache-dir", type=Path, help="default $HYPERDFLASH_RUNS/corpus, or runs/corpus")
    parser.add_argument("--samples", type=int, default=2, help="conversations shown per domain")
    parser.add_argument("--write-prompts", action="store_true", help=f"rewrite {eval_prompts_file().name} and stop")
    parser.add_argument("--benchmarks", help="folder of <name>.jsonl, or hub: count training texts that hold a prompt and stop")
    options = parser.parse_args(arguments)
    console = Console()
    if options.tokenizer != DEFAULT_TOKENIZER:
        load_tokenizer(options.tokenizer)  # a mistyped folder fails before the scan
    splits = {split: load_embedded(split, cache_dir=options.cache_dir) for split in ("train", "heldout")}
    if options.write_prompts:
        console.print(f"{write_prompts(splits['heldout'])} prompts written to {eval_prompts_file()}")
        return
    if options.benchmarks:
        report_contamination(splits["train"], options.benchmarks, console)
        return
    report(splits, options.tokenizer, options.samples, console)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
