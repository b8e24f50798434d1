"""Builds the embedded corpus and prints its size: ``python -m tiny_target.corpus [--write-prompts]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hyperdflash.contracts import DOMAINS
from hyperdflash.data.prompts import eval_prompts_file
from tiny_target.corpus.embedded import load_embedded, text_bytes
from tiny_target.corpus.eval_prompts import write_prompts
from tiny_target.corpus.split import SPLITS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tiny_target.corpus", description=__doc__)
    parser.add_argument("--write-prompts", action="store_true", help=f"rewrite {eval_prompts_file().name}")
    options = parser.parse_args(arguments)
    splits = {split: load_embedded(split) for split in SPLITS}
    for split, conversations in splits.items():
        for domain in DOMAINS:
            found = [c for c in conversations if c.domain == domain]
            print(f"{split}, {domain}: {len(found):,} conversations, {sum(map(text_bytes, found)) / 1e6:.2f} MB")
    if options.write_prompts:
        print(f"{write_prompts(splits['heldout'])} prompts written to {eval_prompts_file()}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
